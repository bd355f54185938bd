"""Reward functions: what they give, and how they are found."""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.scorers import install

from hivegrpo.peer.rewards.base import Reward, Score, checked, text_of
from hivegrpo.peer.rewards.exact import exact_match
from hivegrpo.peer.rewards.formats import format_tags
from hivegrpo.peer.rewards.lengths import length_penalty, soft_overlong_punishment
from hivegrpo.peer.rewards.registry import BUILT_IN, find_rewards, installed, load_function, reward_versions
from hivegrpo.peer.rewards.repetition import repetition_penalty
from hivegrpo.protocol.errors import ConfigError

GOOD = "<think>\n2 + 2\n</think>\n <answer>4</answer>"


def test_exact_match_ignores_only_white_space_around() -> None:
    message = [{"role": "assistant", "content": "12 "}]
    scores = exact_match(completions=[" 12\n", "12.", "1 2", "7", message], answer=["12", "12", "12", 7, "12"])
    assert scores == [1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1.0),
        (f"  {GOOD}\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a<b></think><answer>x < y > z</answer>", 1.0),
        (f"So: {GOOD}", 0.0),
        (f"{GOOD} done", 0.0),
        (f"{GOOD}{GOOD}", 0.0),
        ("<think>a</think> then <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),
        ("<think><think>a</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer></answer>", 0.0),
        ("<think>a<answer>4</answer>", 0.0),
        ("<THINK>a</THINK><answer>4</answer>", 0.0),
        ("</think><think><answer>4</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_tags(text: str, score: float) -> None:
    message = [{"role": "assistant", "content": text}]
    assert format_tags(completions=[text, message]) == [score, score]


def test_format_tags_of_other_names() -> None:
    scores = format_tags(completions=["<a>x</a><b-2>y</b-2>", GOOD], think_tag="a", answer_tag="b-2")
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize("text", ["<think>", "</think>", "<answer>", "<", " ", "<think></think>", "a"])
def test_format_tags_takes_time_proportional_to_a_long_completion(text: str) -> None:
    """A megabyte takes some milliseconds; mild backtracking would take many times the second."""
    begin = time.process_time()
    format_tags(completions=[f"<think>{text * (1_000_000 // len(text))}</answer>"])
    assert time.process_time() - begin < 1.0


def test_length_penalty() -> None:
    ids = [[1] * length for length in (0, 1, 5, 10, 11)]
    assert length_penalty(completion_ids=ids, max_length=10) == [0.0, -0.1, -0.5, -1.0, -1.0]


def test_soft_overlong_punishment() -> None:
    """Free up to 100 - 20 tokens, then a twentieth for each token, -1 at 100 and beyond."""
    ids = [[1] * length for length in (0, 80, 81, 90, 100, 101)]
    scores = soft_overlong_punishment(completion_ids=ids, max_completion_len=100, soft_punish_cache=20)
    assert scores == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]
    assert soft_overlong_punishment(completion_ids=ids, max_completion_len=100, soft_punish_cache=0)[-2:] == [0.0, -1.0]


def test_repetition_penalty() -> None:
    """[5, 5, 5, 5] has two 3-grams, one of them distinct; [1, 2, 1, 2, 1] three, two of them distinct."""
    ids = [[], [1, 2], [1, 2, 3, 4], [5, 5, 5, 5], [1, 2, 1, 2, 1]]
    assert repetition_penalty(completion_ids=ids) == [0.0, 0.0, 0.0, -0.5, pytest.approx(-1 / 3, abs=1e-15)]
    assert repetition_penalty(completion_ids=[[1, 1, 2, 2]], ngram_size=1, max_penalty=-2.0) == [-1.0]


@pytest.mark.parity
def test_penalties_equal_trl_s() -> None:
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    draw = random.Random(0)
    ids = [[draw.randrange(4) for _ in range(length)] for length in range(60)]
    for size, most in ((1, -1.0), (2, -0.3), (3, -1.0), (5, -7.0), (3, 0.0)):
        ours = repetition_penalty(completion_ids=ids, ngram_size=size, max_penalty=most)
        assert ours == get_repetition_penalty_reward(size, most)(ids)
    for longest, cache in ((50, 20), (50, 50), (50, 0), (30, 7)):
        lengths = {"max_completion_len": longest, "soft_punish_cache": cache}
        ours = soft_overlong_punishment(completion_ids=ids, **lengths)
        assert ours == get_soft_overlong_punishment(**lengths)(ids)


def test_rewards_are_found_by_name_with_their_versions() -> None:
    rewards = find_rewards(["gsm8k_answer", "exact_match"])
    assert [reward.name for reward in rewards] == ["gsm8k_answer", "exact_match"]
    assert reward_versions(rewards) == {"gsm8k_answer": 2, "exact_match": 1}


def test_built_in_functions_are_of_the_name_they_are_found_by() -> None:
    assert {name: reward.name for name, reward in BUILT_IN.items()} == {name: name for name in BUILT_IN}
    assert [load_function(name).__name__ for name in BUILT_IN] == list(BUILT_IN)


def test_naming_a_reward_imports_nothing_slow() -> None:
    code = (
        "import sys\nfrom hivegrpo.peer.rewards.registry import find_rewards\n"
        "find_rewards(['math_verify', 'exact_match'])\n"
        "assert not {'sympy', 'torch', 'numpy', 'math_verify'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_reward_names_those_installed_and_the_way_to_install() -> None:
    with pytest.raises(ConfigError, match=r"exact_match, format_tags.*reasoning_gym:TASK.*hivegrpo\.rewards"):
        find_rewards(["no_such_reward"])


def test_a_name_is_never_an_import_path() -> None:
    with pytest.raises(ConfigError):
        find_rewards(["os.path:exists"])


def test_an_installed_package_offers_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, scaled="support.scorers:scaled", plain="support.scorers:count")
    scaled, plain = find_rewards(["scaled", "plain"], {"scaled": {"scale": 2}})
    assert (scaled.version, scaled.isolated, scaled.batched, scaled.options) == (7, True, True, {"scale": 2})
    assert plain.version == 1
    assert {"scaled", "plain"} <= set(installed())


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, broken="support.no_such_module:f")
    with pytest.raises(ConfigError, match=r'"broken" cannot be loaded: ModuleNotFoundError.*update the package'):
        find_rewards(["broken"])


def test_a_package_cannot_take_the_place_of_a_built_in_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, exact_match="support.scorers:count")
    (reward,) = find_rewards(["exact_match"])
    assert reward.function is exact_match
    assert load_function("exact_match") is exact_match


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("length_penalty", {}, "needs max_length. It takes max_length: int"),
        ("soft_overlong_punishment", {"max_completion_len": 9}, "needs soft_punish_cache"),
        ("length_penalty", {"max_length": 1.5}, "does not take max_length = 1.5"),
        ("length_penalty", {"max_length": "9"}, "does not take max_length = '9'"),
        ("length_penalty", {"max_length": True}, "does not take max_length = True"),
        ("repetition_penalty", {"max_penalty": "x"}, "does not take max_penalty"),
        ("repetition_penalty", {"ngram": 3}, "does not take ngram = 3. It takes ngram_size: int = 3, max_penalty"),
        ("format_tags", {"completions": "x"}, "does not take completions"),
        ("exact_match", {"_": "x"}, "does not take _"),
        ("scaled", {}, "needs scale"),
        ("scaled", {"scale": 1.0, "scales": 2.0}, "does not take scales"),
        # values that the function itself refuses
        ("length_penalty", {"max_length": 0}, "max_length is 0"),
        ("repetition_penalty", {"ngram_size": 0}, "ngram_size is 0"),
        ("repetition_penalty", {"max_penalty": 0.5}, "max_penalty 0.5"),
        ("soft_overlong_punishment", {"max_completion_len": 5, "soft_punish_cache": 6}, "soft_punish_cache is 6"),
        ("format_tags", {"think_tag": "<a>"}, '"<a>" is no name of a tag'),
        ("format_tags", {"think_tag": "answer"}, "are the same"),
    ],
)
def test_options_are_looked_at_when_the_function_is_found(
    name: str, options: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, scaled="support.scorers:scaled")
    with pytest.raises(ConfigError) as refused:
        find_rewards([name], {name: options})
    assert says in str(refused.value)


def test_options_that_fit_are_kept() -> None:
    options = {"repetition_penalty": {"max_penalty": -1}, "other": {"x": 1}}
    first, second = find_rewards(["repetition_penalty", "exact_match"], options)
    assert (first.options, second.options) == ({"max_penalty": -1}, {})


def test_a_function_gets_the_lists_that_it_takes_and_its_options_hide_columns() -> None:
    def picky(*, completions: list[str], answer: list[str], size: int = 1, **_: Any) -> list[float]:
        raise AssertionError

    def greedy(*, answer: list[str], size: int = 1, **rest: Any) -> list[float]:
        raise AssertionError

    lists = {name: [name] for name in ("prompts", "completions", "completion_ids", "answer", "size", "colour")}
    assert set(Reward("picky", 1, picky).arguments(lists)) == {"completions", "answer"}
    everything = {"prompts", "completions", "completion_ids", "answer", "colour"}
    assert set(Reward("greedy", 1, greedy).arguments(lists)) == everything
    assert set(Reward("greedy", 1, greedy, options={"colour": "red"}).arguments(lists)) == everything - {"colour"}


def test_a_missing_column_is_an_error_before_the_function_is_called() -> None:
    (reward,) = find_rewards(["exact_match"])
    reward.require_columns(["answer", "other"])
    with pytest.raises(ConfigError, match=r'"exact_match" needs the column answer; the dataset gives other, more\.'):
        reward.require_columns(["prompts", "other", "more"])


def test_text_of_a_completion() -> None:
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}]) == "a"


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        (None, None),
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        ([], None),
        ([[0, 1], (2, -1.0)], ((0, 1.0), (2, -1.0))),
        (((1, 0.5),), ((1, 0.5),)),
    ],
)
def test_scores_that_are_kept(score: object, kept: Score) -> None:
    assert checked(score, 3) == kept


@pytest.mark.parametrize(
    "score",
    [
        *(float("nan"), float("inf"), 10**400, "1", b"1", {}, object(), 1j),
        *([1.0], [[1]], [(0, 1.0, 2)], [(0, None)], [(0, float("nan"))], ["ab"]),
        *([(-1, 1.0)], [(3, 1.0)], [(0.0, 1.0)], [(True, 1.0)], [("0", 1.0)]),
        *([(1, 1.0), (0, 1.0)], [(1, 1.0), (1, 1.0)]),
    ],
)
def test_scores_that_are_nonsense(score: object) -> None:
    with pytest.raises(ValueError, match=r"^(a|steps)"):
        checked(score, 3)


@pytest.mark.parametrize("score", [1.1e6, -1.1e6, 1.7e308, 10**400, [(0, 1e300)]])
def test_a_score_beyond_all_measure_is_nonsense(score: Any) -> None:
    """Sums and deviations of such scores overflow."""
    with pytest.raises(ValueError, match="at most 1e"):
        checked(score, tokens=3)
    assert checked(1e6, tokens=3) == 1e6
