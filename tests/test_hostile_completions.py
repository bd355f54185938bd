"""Hostile completions against every built-in scorer: no file, no process, no budget overrun, and honest ones score."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.payloads import payloads

from hivegrpo.peer.rewards.base import Scored
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.peer.rewards.process import MARGIN_SECONDS
from hivegrpo.peer.rewards.puzzles import OWN
from hivegrpo.peer.rewards.registry import BUILT_IN, find_rewards
from hivegrpo.peer.rewards.tasks import ALLOWED

pytestmark = pytest.mark.slow

SECONDS = 1.0
"""Of one completion. Honest ones take 0.1 s at most, the first one of a process included."""
MEMORY_MIB = 512
LOADED_MIB = 400
"""What a worker takes before its first call: 180 MiB with reasoning-gym and sympy loaded, and room for others."""

OPTIONS: dict[str, dict[str, Any]] = {
    "length_penalty": {"max_length": 100},
    "soft_overlong_punishment": {"max_completion_len": 100, "soft_punish_cache": 50},
}


class Watch:
    """What the children that this process gets from now on take, and what becomes of the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary
        self.peak = 0
        """Bytes of the largest child."""
        self.largest: list[str] = []
        """Its command."""
        self._before = set(psutil.Process().children(recursive=True))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for child in set(psutil.Process().children(recursive=True)) - self._before:
                try:
                    if (taken := child.memory_info().rss) > self.peak:
                        self.peak, self.largest = taken, child.cmdline()
                except psutil.NoSuchProcess:
                    continue

    def left(self) -> list[str]:
        """Files and processes that were not there before."""
        processes = set(psutil.Process().children(recursive=True)) - self._before
        named = [process for process in psutil.process_iter(["cmdline"]) if self._is_named(process)]
        folders = [Path.cwd(), self.canary.parent]
        files = [path for folder in folders for path in folder.iterdir()]
        files += Path(tempfile.gettempdir()).glob("hivegrpo-rewards-*")
        return [str(found) for found in (*processes, *named, *files)]

    def _is_named(self, process: psutil.Process) -> bool:
        return any(str(self.canary) in word for word in process.info["cmdline"] or [])


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """With an empty working folder and an empty folder for temporary files; both stay so."""
    for name in ("here", "there", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with Watch(tmp_path / "there" / "CANARY") as watch:
        yield watch
    assert watch.left() == []
    assert 0 < watch.peak < (LOADED_MIB + MEMORY_MIB) << 20, watch.largest


@contextmanager
def pool(names: list[str], workers: int = 2) -> Iterator[RewardPool]:
    options = {name: OPTIONS[name] for name in names if name in OPTIONS}
    rewards = find_rewards(names, options)
    with RewardPool(rewards, seconds=SECONDS, memory_mib=MEMORY_MIB, workers=workers) as made:
        yield made


def score(rewards: RewardPool, completions: list[str], **row: str) -> list[Scored]:
    """All completions as answers to one row."""
    count = len(completions)
    ids = [list(range(min(len(text), 5000))) for text in completions]
    return rewards.score(["?"] * count, completions, ids, {name: [value] * count for name, value in row.items()})


def interleaved(honest: list[str], hostile: list[str]) -> list[str]:
    """An honest one before each hostile one, in turn, and all of them again at the end."""
    mixed = []
    for number, text in enumerate(hostile):
        mixed += [honest[number % len(honest)], text]
    return [*mixed, *honest]


def given(scored: Scored, completions: list[str], text: str) -> set[Any]:
    """The scores of all completions with this text."""
    return {score for score, completion in zip(scored.scores, completions, strict=True) if completion == text}


def test_there_are_payloads_enough(tmp_path: Path) -> None:
    assert len(set(payloads(tmp_path / "CANARY").values())) >= 60


def test_the_canary_appears_where_reasoning_gym_evaluates(tmp_path: Path) -> None:
    """What the other tests look for does happen."""
    code = (
        "import sys\n"
        "from reasoning_gym.factory import create_dataset\n"
        "dataset = create_dataset('countdown', size=1, seed=1)\n"
        "dataset.score_answer(answer=sys.argv[1], entry=dataset[0])\n"
    )
    canary = tmp_path / "CANARY"
    subprocess.run([sys.executable, "-c", code, payloads(canary)["call"]], check=True, timeout=60)
    assert canary.exists()


def test_built_in_rewards(watch: Watch) -> None:
    hostile = payloads(watch.canary)
    completions = interleaved(["42", "41"], list(hostile.values()))
    with pool(sorted(BUILT_IN)) as rewards:
        scored = dict(zip(sorted(BUILT_IN), score(rewards, completions, answer="42"), strict=True))
    for name in ("exact_match", "gsm8k_answer", "math_verify"):
        assert given(scored[name], completions, "42") == {1.0}
        assert given(scored[name], completions, "41") == {0.0}
    assert given(scored["format_tags"], completions, "42") == {0.0}
    assert given(scored["length_penalty"], completions, "42") == {-0.02}
    assert given(scored["soft_overlong_punishment"], completions, "42") == {0.0}
    assert given(scored["repetition_penalty"], completions, "42") == {0.0}
    assert [name for name in scored if scored[name].failed] == ["math_verify"]
    unscored = {text for text, given in zip(completions, scored["math_verify"].scores, strict=True) if given is None}
    assert unscored <= set(hostile.values())
    assert hostile["power tower in a box"] in unscored


@pytest.mark.parametrize("name", ["power tower in a box", "factorials", "parentheses in dollars"])
def test_a_completion_that_takes_for_ever_is_given_up_in_time(name: str, watch: Watch) -> None:
    with pool(["math_verify"], workers=1) as rewards:
        score(rewards, ["42"], answer="42")  # starts the worker
        begin = time.monotonic()
        (scored,) = score(rewards, ["42", payloads(watch.canary)[name]], answer="42")
        seconds = time.monotonic() - begin
    assert scored.scores == [1.0, None]
    assert scored.failed == 1
    # The honest one, the budget, the margin, and 2 s for a machine that is busy with something else.
    assert seconds < SECONDS + MARGIN_SECONDS + 2


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"math_verify"}))
def test_rewards_in_the_caller_s_thread_take_time_proportional_to_the_completion(name: str, tmp_path: Path) -> None:
    (reward,) = find_rewards([name], OPTIONS)
    assert not reward.isolated
    for text in payloads(tmp_path / "CANARY").values():
        begin = time.process_time()
        reward.function(completions=[text], completion_ids=[[1] * 5000], answer=["42"], **reward.options)
        assert time.process_time() - begin < 1  # a megabyte at 1 us a character


COMMON = {
    "numbers": [9, 3, 4, 1],
    "target": 24,
    "direction": "ascending",
    "valid_answers": ["_ Q\nQ _"],
    "initial_state": {"0.5_0.5": ["box_red", "target_red"]},
    "puzzle": {"vertices": [0, 1], "edges": [[0, 1]], "color_options": [1, 2]},
    "board_config": "oooooooooooooooAAooooooooooooooooooo",
    "result": [7.0, 0.0],
    "num_disks": 1,
    "num_pegs": 3,
    "start_peg": 1,
    "target_peg": 3,
    "solution_length": 1,
}
"""Metadata of a row that is one of all these tasks at once."""

RIGHT_OF_A_LIST = {
    "countdown": "(9 - 3) * 4 * 1",
    "puzzle24": "(9 - 3) * 4 * 1",
    "number_sorting": "[24]",
    "spiral_matrix": "[24]",
    "binary_matrix": "[24]",
    "string_insertion": "[24]",
    "game_of_life_halting": "[24]",
    "n_queens": "_ Q\nQ _",
}
"""By task, what is right where gold is "[24]": the own scorers that read more than a number."""

RIGHT_OF_A_NUMBER = {
    "arc_agi": "7",
    "rearc": "7",
    "bitwise_arithmetic": "0x7",
    "gcd": "7",
    "chain_sum": "+7.0",
    "coin_flip": "14/2",
    "complex_arithmetic": "7 + 0i",
    "decimal_arithmetic": "7.0",
    "gsm_symbolic": "It is 7.",
    "polynomial_equations": "7.0",
    "pool_matrix": "7.0",
    "power_function": "7.00",
    "prime_factorization": "7",
    "graph_color": '{"0": 1, "1": 2}',
    "boxnet": '[{"Agent[0.5, 0.5]": "move(box_red, target_red)"}]',
    "rush_hour": "A+1",
    "tower_of_hanoi": "Move disk 1 from Peg 1 to Peg 3",
}
"""By task, what is right where gold is "7": the other own scorers, and reasoning-gym's of each kind."""


@pytest.mark.parametrize(
    ("gold", "right"), [("[24]", RIGHT_OF_A_LIST), ("7", RIGHT_OF_A_NUMBER)], ids=["gold is a list", "gold is a number"]
)
def test_tasks_of_reasoning_gym(gold: str, right: dict[str, str], watch: Watch) -> None:
    completions = interleaved(sorted({*right.values(), "wrong"}), list(payloads(watch.canary).values()))
    with pool([f"reasoning_gym:{task}" for task in right]) as rewards:
        scored = dict(zip(right, score(rewards, completions, answer=gold, metadata=json.dumps(COMMON)), strict=True))
    for task, text in right.items():
        assert given(scored[task], completions, text) == {1.0}, task
        assert max(given(scored[task], completions, "wrong")) <= 0.05, task  # type: ignore[type-var]
        assert scored[task].failed == 0, scored[task].why  # none above its time or memory


def test_every_own_scorer_is_among_them() -> None:
    assert OWN.keys() <= RIGHT_OF_A_LIST.keys() | RIGHT_OF_A_NUMBER.keys()


SWEEP = """
import json, resource, sys, time
from pathlib import Path
from support.payloads import payloads
from hivegrpo.peer.rewards.reasoning import generate_rows, load_reward
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
hostile = payloads(Path(sys.argv[1]))
for task in sys.argv[2:]:
    (row,) = generate_rows(task, 1, 5)
    score = load_reward(task)
    score(completions=["x"], answer=[row["answer"]], metadata=[row["metadata"]])
    for name, text in hostile.items():
        begin = time.process_time()
        (given,) = score(completions=[text], answer=[row["answer"]], metadata=[row["metadata"]])
        seconds = time.process_time() - begin
        print(json.dumps([task, name, given, seconds, text.strip() == row["answer"]]))
"""


def test_every_task_by_itself(watch: Watch) -> None:
    """In one process with no budget but 1 GiB: none is needed."""
    tasks = sorted(ALLOWED | OWN.keys())
    path = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{SWEEP}", str(watch.canary), *tasks],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]  # a scorer prints too
    assert len(results) == len(tasks) * len(payloads(watch.canary))
    for task, name, given, seconds, right in results:
        assert seconds < SECONDS, (task, name)
        assert given is not None, (task, name)
        assert given < 1 or right, (task, name)
