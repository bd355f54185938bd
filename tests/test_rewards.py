"""Reward functions: what they give, and how they are found."""

import json
import math
import re
import time
from collections.abc import Callable
from decimal import Decimal
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from hivegrpo.peer.rewards import registry
from hivegrpo.peer.rewards.exact import exact_match
from hivegrpo.peer.rewards.gsm8k import final_number, gsm8k_answer
from hivegrpo.peer.rewards.registry import Reward, find_rewards, reward_versions
from hivegrpo.protocol.errors import ConfigError

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"

SOLUTIONS = [
    "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18",
    "It takes 2/2=<<2/2=1>>1 bolt.\nSo that is 2+1=<<2+1=3>>3 bolts.\n#### 3",
    "The value rose by 80,000*1.5=<<80000*1.5=120000>>120,000.\n#### 70000",
    "He runs 3*3=<<3*3=9>>9 times.\nSo 9*60=<<9*60=540>>540 metres.\n#### 540",
    "It costs 5*.6=$<<5*.6=3>>3 each.\n#### 64",
    "That is 1,500,000 in all.\n#### 1,500,000",
    "He owes 20 and has 5.\nSo he is at 5-20=<<5-20=-15>>-15.\n#### -15",
    "Half of 5 is 5/2=<<5/2=2.5>>2.5.\n#### 2.5",
    "Nothing is left: 4-4=<<4-4=0>>0.\n#### 0",
    "12 dozen are 12*12=<<12*12=144>>144.\n#### 144",
    "2 weeks have 2*7=<<2*7=14>>14 days.\n#### 14",
    "30% of 90 is <<30*90/100=27>>27.\n#### 27",
]

FORMS: dict[str, Callable[[Decimal], str]] = {
    "marker": lambda number: f"First 7, then 12.\n#### {number:,}",
    "prefix": lambda number: f"First 7, then 12.\nA: {number}",
    "boxed": lambda number: f"First 7, then 12: \\boxed{{{number}}}",
    "sentence": lambda number: f"First 7, then 12. The answer is ${number:,.2f}.",
    "bare": lambda number: f"First 7, then 12.\n{number}",
}


def solutions() -> list[str]:
    """The benchmark's test set where it lies beside the repository, else a dozen rows of its form."""
    if not GSM8K.exists():
        return SOLUTIONS
    return [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def reference_answer(solution: str) -> Decimal:
    """The number after the marker, read as the benchmark's authors read it."""
    found = re.search(r"#### (-?[0-9.,]+)", solution)
    assert found is not None
    return Decimal(found[1].replace(",", ""))


@pytest.mark.parametrize("form", FORMS)
def test_gsm8k_gives_one_to_gold_in_each_form_and_zero_to_another_number(form: str) -> None:
    gold = solutions()
    numbers = [reference_answer(solution) for solution in gold]
    right = [FORMS[form](number) for number in numbers]
    wrong = [FORMS[form](number + 1) for number in numbers]
    assert gsm8k_answer(completions=right, answer=gold) == [1.0] * len(gold)
    assert gsm8k_answer(completions=wrong, answer=gold) == [0.0] * len(gold)


def test_gsm8k_gives_one_to_the_gold_solution_itself() -> None:
    gold = solutions()
    assert gsm8k_answer(completions=gold, answer=gold) == [1.0] * len(gold)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18\nQuestion: how many?\n#### 5", "18"),  # the first marker: what follows is another problem
        ("#### about 18 eggs in 3 days", "18"),
        ("7-5", "5"),  # no minus 5
        ("it falls to -5", "-5"),
        ("-$1,234.50", "-1234.50"),
        ("16, 18", "18"),
        ("1,2345", "2345"),
        ("18.", "18"),
        ("9" * 32, "9" * 32),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "12 ####", "٣٤٥", "¹²", "9" * 33, "1" + ",000" * 20])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


def test_gsm8k_skips_an_answer_without_a_number() -> None:
    assert gsm8k_answer(completions=["", "3"], answer=["none", "3"]) == [None, 1.0]


@pytest.mark.parametrize("text", ["9", "1,", "(", "- ", "-", "$", "1,000", ",111", "####", "9.", "\\boxed{"])
def test_gsm8k_takes_time_proportional_to_a_long_completion(text: str) -> None:
    """A megabyte in well under the 5 s that even mild backtracking would need many times over."""
    begin = time.process_time()
    gsm8k_answer(completions=[text * (1_000_000 // len(text))], answer=["1"])
    assert time.process_time() - begin < 5


def test_exact_match_ignores_only_white_space_around() -> None:
    scores = exact_match(completions=[" 12\n", "12.", "1 2", "7"], answer=["12", "12", "12", 7])
    assert scores == [1.0, 0.0, 0.0, 1.0]


def test_rewards_are_found_by_name_with_their_versions() -> None:
    rewards = find_rewards(["gsm8k_answer", "exact_match"])
    assert [reward.name for reward in rewards] == ["gsm8k_answer", "exact_match"]
    assert reward_versions(rewards) == {"gsm8k_answer": 1, "exact_match": 1}


def test_an_unknown_reward_names_those_installed_and_the_way_to_install() -> None:
    with pytest.raises(ConfigError, match=r"exact_match, gsm8k_answer.*hivegrpo\.rewards"):
        find_rewards(["no_such_reward"])


def test_a_name_is_never_an_import_path() -> None:
    with pytest.raises(ConfigError):
        find_rewards(["os.path:exists"])


def constant(*, completions: list[str], **_: Any) -> list[float | None]:
    return [0.5 for _ in completions]


constant.version = 3  # type: ignore[attr-defined]  # as an installed package would


def test_an_installed_package_offers_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("constant", "somewhere:constant", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: constant)
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    (reward,) = find_rewards(["constant"])
    assert (reward.name, reward.version) == ("constant", 3)
    assert reward.score(["p"], ["c"], [[1]], {}) == [0.5]


def test_scores_that_are_none_or_no_number_count_as_missing() -> None:
    odd = Reward("odd", 1, lambda **_: [1, None, math.inf, math.nan])
    scores = odd.score(["p"] * 4, ["c"] * 4, [[1]] * 4, {})
    assert scores[0] == 1.0
    assert all(map(math.isnan, scores[1:]))


def test_too_few_scores_are_an_error() -> None:
    with pytest.raises(ConfigError, match="1 scores for 2 completions"):
        Reward("short", 1, lambda **_: [1.0]).score(["p"] * 2, ["c"] * 2, [[1]] * 2, {})


def test_a_reward_gets_trl_s_keywords_and_the_columns() -> None:
    seen: dict[str, Any] = {}

    def spy(**keywords: Any) -> list[float | None]:
        seen.update(keywords)
        return [0.0]

    Reward("spy", 1, spy).score(["p"], ["c"], [[1, 2]], {"answer": ["a"]})
    assert seen == {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1, 2]], "answer": ["a"]}
