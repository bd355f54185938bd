"""Parts of evaluations: what settings say, problems, answers that vote, and figures of a run's own measurements."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.coin import write_coin
from support.runs import small_config

from hivegrpo.cli.evaluation_table import table
from hivegrpo.cli.operate import _status
from hivegrpo.cli.output import describe_accuracy, describe_version
from hivegrpo.cli.plot import plot_rewards
from hivegrpo.cli.progress import Progress
from hivegrpo.peer.evaluation.problems import addition_rows, load_problems
from hivegrpo.peer.evaluation.settings import BenchmarkSection, EvaluateConfig
from hivegrpo.peer.inference.answering import open_answering
from hivegrpo.peer.learn.data import Prompts, canonical_rows, require_same_columns
from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.sampler import Sampling, sample_within
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"greedy": False}, "nothing to measure"),
        ({"k": [1]}, "set n"),
        ({"temperature": 0.5}, "set n"),
        ({"n": 4, "k": [5]}, "each k is 1 to n, which is 4"),
        ({"n": 4, "k": [0]}, "each k is 1 to n"),
        ({"n": 513}, "n: Input should be less than or equal to 512"),
        ({"size": 5}, "size and seed belong to"),
        ({"source": "a.jsonl", "seed": 5}, "size and seed belong to"),
        ({"source": "a.jsonl", "split": "test"}, "belong to a hub dataset"),
        ({"split": "test"}, "name it as source"),
        ({"source": "addition:3", "revision": "main"}, "name it as source"),
        ({"source": "reasoning_gym:chain_sum", "split": "test"}, "takes no config, split or revision"),
        ({"source": "addition:3", "prompt_template": "x"}, "exactly once"),
        ({"prompt_template": "{prompt}", "system_prompt": "x"}, "write it into prompt_template"),
        ({"sauce": "a.jsonl"}, 'did you mean "source"?'),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EvaluateConfig.of({"benchmark": [tables]}, "evaluate.toml")
    assert says in str(refused.value)


def test_benchmarks_have_different_names() -> None:
    with pytest.raises(ConfigError, match=r"two benchmarks are called a\.csv: give each a name"):
        EvaluateConfig.of({"benchmark": [{"source": "x/a.csv"}, {"source": "y/a.csv"}]}, "evaluate.toml")


def test_each_k_is_measured_once() -> None:
    assert BenchmarkSection(n=8).sizes == (1, 8)
    assert BenchmarkSection(n=1).sizes == (1,)
    assert BenchmarkSection(n=8, k=(4, 2, 4)).sizes == (2, 4)
    assert BenchmarkSection().sizes == ()


@pytest.mark.parametrize("digits", [1, 2, 3, 18])
def test_addition_problems_are_different_and_right(digits: int) -> None:
    rows = Prompts.from_jsonl(b"".join(addition_rows(digits, 60, 1))).rows
    assert len({row["prompt"] for row in rows}) == 60
    for row in rows:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert len(a) == len(b) == digits
        assert "0" not in (a[0], b[0])
        assert row["answer"] == str(int(a) + int(b))


def test_addition_problems_are_the_same_everywhere() -> None:
    digest = hashlib.sha256(b"".join(addition_rows(3, 500, 0))).hexdigest()
    assert digest == "e01197ada3acec1ed655ae91679ecc51e00d4d29fe2b5e9e20768c25002e2506"
    assert load_problems(BenchmarkSection(source="addition:3", limit=7), None).digest == digest
    assert len(load_problems(BenchmarkSection(source="addition:1"), None).rows) == 81
    with pytest.raises(ConfigError, match="There are 81 problems"):
        load_problems(BenchmarkSection(source="addition:1", size=82), None)


def test_problems_come_from_the_test_split_s_columns_and_generators(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("question,solution,level\n1+1=,2,easy\n2+2=,4,hard\n")
    section = BenchmarkSection(source=str(file), prompt_column="question", answer_column="solution", columns=())
    assert load_problems(section, None).rows[1] == {"prompt": "2+2=", "answer": "4"}
    with pytest.raises(ConfigError, match=r'no column "answer".*\[\[benchmark\]\]'):
        load_problems(BenchmarkSection(source=str(file)), None)
    first, again, other = (
        load_problems(BenchmarkSection(source="reasoning_gym:chain_sum", size=5, seed=seed), None) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.digest != other.digest
    assert first.rows[0].keys() == {"prompt", "answer", "metadata"}
    with pytest.raises(ConfigError, match="no held-out problems"):
        load_problems(BenchmarkSection(), None)


@pytest.mark.parametrize(
    ("reward", "text", "answer"),
    [
        ("exact_match", " 46\n", "46"),
        ("exact_match", " \n", None),
        ("gsm8k_answer", "so 7 in all\n#### 1,234.50", "1234.5"),
        ("gsm8k_answer", "it is 1,000", "1000"),
        ("gsm8k_answer", "it is -0.00", "0"),
        ("gsm8k_answer", "none", None),
        ("math_verify", r"first \boxed{1}, then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        ("math_verify", r"the answer is 12", "12"),
        ("math_verify", r"it is \boxed{1", None),
        ("reasoning_gym:chain_sum", "<think>5</think> <answer> 7 </answer>", "7"),
        ("reasoning_gym:chain_sum", "<answer></answer>", None),
    ],
)
def test_answers_vote_by_what_the_reward_looks_at(reward: str, text: str, answer: str | None) -> None:
    [found] = find_rewards([reward])
    assert (found.answer_of(text) or None) == answer


def test_an_answer_is_found_in_linear_time() -> None:
    [found] = find_rewards(["math_verify"])
    for text in ("\\boxed{" * 200_000, "\\boxed{" + "{" * 1_000_000, "1" * 1_000_000):
        assert found.answer_of(text) is None


@pytest.fixture(scope="module")
def coin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coin")
    write_coin(folder)
    return folder


def test_rows_with_generators_of_their_own_draw_alone(coin: Path) -> None:
    """A row gets the same in any company, also where others end before it; with one generator it does not."""
    answering = open_answering(str(coin), device="cpu")
    prompts = [answering.encoder.encode(letter) for letter in "aeeffgx"]

    def drawn(rows: range, noise: Callable[[range], Any], budget: int = 10_000) -> list[list[int]]:
        sampling, part = Sampling(6, temperature=30.0), prompts[rows.start : rows.stop]
        ends = frozenset({1, *range(40, 60)})
        found = sample_within(budget, answering.model, part, 1, sampling, ends, noise(rows))
        return [completion.token_ids for completion in found]

    def own(rows: range) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    together = drawn(range(7), own)
    assert len({len(tokens) for tokens in together}) > 1
    assert [drawn(range(row, row + 1), own)[0] for row in range(7)] == together
    assert drawn(range(2, 6), own) == together[2:6]
    assert drawn(range(7), own, budget=14) == together, "two at a time"
    assert drawn(range(7), lambda rows: torch.Generator().manual_seed(0))[1:] != together[1:]


def version(**metrics: float) -> dict[str, Any]:
    return {"kind": "version", "version": 3, "versions": 9, "state_root": "ab" * 32, "metrics": metrics}


def test_a_measured_accuracy_is_shown_with_its_interval() -> None:
    metrics = Evaluation(solved=175, problems=500).metrics
    assert "accuracy 0.350 [0.309, 0.393] (version 2)" in describe_version(version(**metrics))
    assert describe_accuracy({"eval/accuracy": 0.35}) == "accuracy 0.350"
    for accuracy, problems in ((0.5, 0.0), (0.5, -3.0), (1.5, 10.0), (-0.5, 10.0), (0.5, 1e30)):
        shown = describe_accuracy({"eval/accuracy": accuracy, "eval/problems": problems})
        assert shown == f"accuracy {accuracy:.3f}", "a peer may report anything"


def test_the_status_shows_it_beside_the_reward() -> None:
    answer = {
        "run_id": "ef" * 32, "name": "test", "phase": "rollout", "paused": False, "version": 3, "versions": 9,
        "trouble": "", "peers": [], "banned": {}, "invites": [],
    }  # fmt: skip
    assert len(_status(answer | {"metrics": {}})) == 1
    shown = _status(answer | {"metrics": {"reward": 0.25, "eval/accuracy": 0.5, "eval/problems": 10.0}})
    assert shown[1] == "reward 0.250, accuracy 0.500 [0.237, 0.763] (version 2)"


def test_the_plot_has_its_intervals(tmp_path: Path) -> None:
    progress = Progress()
    progress.take({"kind": "status", "name": "test", "run_id": "ef" * 32})
    progress.take(version(reward=0.5, **{"eval/accuracy": 0.5, "eval/problems": 10.0}))
    progress.take(version(reward=0.5))
    progress.take(version(reward=0.5, **{"eval/accuracy": 1.5, "eval/problems": 10.0}))
    assert progress.accuracy_errors() == [pytest.approx((0.2634, 0.2634), abs=1e-4), (0.0, 0.0)]
    plot_rewards(progress, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_can_be_measured_on_rows_from_elsewhere(tmp_path: Path) -> None:
    """A task of reasoning-gym for a run that trains on a file with columns of other names."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "solution": "2", "level": 3}\n')
    config = small_config(
        dataset={
            "path": str(tmp_path / "rows.jsonl"),
            "prompt_column": "question",
            "answer_column": "solution",
            "columns": (),
        },
        evaluation={
            "name": "reasoning_gym:chain_sum",
            "size": 4,
            "seed": 1,
            "prompt_column": "prompt",
            "answer_column": "answer",
        },
    )
    train = Prompts.from_jsonl(canonical_rows(config.dataset))
    held_out = Prompts.from_jsonl(canonical_rows(config.dataset, config.evaluation))
    require_same_columns(train, held_out)
    assert train.rows == ({"answer": "2", "prompt": "1+1="},)
    assert len(held_out) == 4
    assert held_out.columns == {"prompt", "answer"}


def test_the_table_s_names_are_shown_and_not_obeyed() -> None:
    part = {"revision": "latest", "unfit": []}
    benchmark = {
        "name": "sums\x1b]0;owned\x07",
        "problems": 1,
        "scores": [],
        "differences": [],
        "completions": [part],
        "contamination": {"checked": False, "why": "none\nlatest: 100 %"},
    }
    lines = list(table({"models": [{"revision": "latest", "title": "a\x1b[2J"}], "benchmarks": [benchmark]}))
    assert lines[0] == "latest: a?[2J"
    assert lines[2] == "sums?]0;owned?, 1 problems"
    assert lines[-1] == "Not compared with the training rows: none latest: 100 %"
