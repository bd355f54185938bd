"""Running reward functions: what hostile completions, careless functions and ends of all kinds leave standing."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.programs import gone
from support.scorers import ODD, install

from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.rewards import process
from hivegrpo.peer.rewards.base import Reward, Scored
from hivegrpo.peer.rewards.crew import AHEAD
from hivegrpo.peer.rewards.frames import Channel, encode
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.peer.rewards.process import Call, WorkerLost, WorkerProcess
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.errors import ConfigError

MIB = 256
SECONDS = 30.0
"""Enough for what is to succeed on a machine that does much else."""
IN_WORKER = """
import os, sys, time
if getattr(sys.modules["__main__"].__spec__, "name", "") == "hivegrpo.peer.rewards.worker":
    """


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    names = ("obey", "count", "short", "together", "scaled")
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path_factory.mktemp("installed"), patch, **{name: f"support.scorers:{name}" for name in names})
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[RewardPool]:
    """One for all tests that leave it usable."""
    with pool(single()) as on:
        yield on


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def pool(reward: Reward | str, *, seconds: float = SECONDS, workers: int = 2) -> RewardPool:
    rewards = find_rewards([reward]) if isinstance(reward, str) else [reward]
    return RewardPool(rewards, seconds=seconds, memory_mib=MIB, workers=workers)


def single() -> Reward:
    """`obey`, called as the built-in isolated functions are: one completion at a time."""
    (reward,) = find_rewards(["obey"])
    return replace(reward, batched=False)


def score(on: RewardPool, words: Sequence[str], cancelled: threading.Event | None = None, **columns: Any) -> Scored:
    """Completions of two tokens each; the columns have one value for all."""
    many = len(words)
    lists = {name: [value] * many for name, value in columns.items()}
    (scored,) = on.score(["p"] * many, list(words), [[1, 2]] * many, lists, cancelled)
    return scored


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_for(happened: Callable[[], bool]) -> None:
    """For what tells nobody that it has happened."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pids(on: RewardPool) -> list[int]:
    return [int(number) for number in score(on, ["pid"] * 8 * AHEAD).scores if isinstance(number, float)]


@pytest.mark.parametrize("batched", [False, True])
def test_what_fails_costs_only_its_own_completion(
    batched: bool, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    bad = [
        "grow",
        "hog",
        "end",
        "die",
        "leave",
        "interrupt",
        "raise",
        "unspeakable",
        "recurse",
        "forge",
        "lie",
        "write",
    ]
    words = [word for pair in zip(bad, ["good"] * len(bad), strict=True) for word in pair]
    with pool(replace(single(), batched=batched)) as on:
        scored = score(on, words)
    assert scored.scores[1::2] == [1.0] * len(bad)
    assert scored.scores[::2] == [None] * len(bad)
    assert scored.failed == len(bad)
    assert list(folders.iterdir()) == []


@pytest.mark.parametrize("word", ["wait", "compute"])
def test_a_completion_that_takes_too_long_is_given_up(word: str) -> None:
    """Sleeping, and in C code that nothing interrupts: each costs its own budget, and no other completion."""
    with pool(single(), seconds=1.0) as on:
        scored = score(on, ["good", word, "good", "good"])
    assert scored == Scored([1.0, None, 1.0, 1.0], 1, "it took more than 1 s")


@pytest.fixture
def unwatched() -> Iterator[WorkerProcess]:
    """A worker that has loaded `obey`; the test is its parent."""
    worker = WorkerProcess(["obey"], MIB << 20)
    try:
        while not worker.loaded:
            worker.receive()
            worker.require_use()
        yield worker
    finally:
        worker.end()


def call(word: str) -> tuple[Call, bytes]:
    """For one completion, with a fifth of a second, and its frame."""
    arguments = {"completions": [word]}
    return Call(0, [0], 0.2, 100, 1), encode({"key": 1, "seconds": 0.2, "function": 0, "arguments": arguments})


def test_a_worker_that_nobody_watches_ends_itself_when_its_time_is_over(unwatched: WorkerProcess) -> None:
    compute, frame = call("compute")
    unwatched.make([compute], frame)
    assert unwatched._process.wait(60) == -signal.SIGALRM


def test_what_ended_a_worker_is_not_judged_by_the_clock_of_its_parent(unwatched: WorkerProcess) -> None:
    """A parent that hears an answer and the end at once, long after both, cannot know how long the call took."""
    calls, frames = zip(call("good"), call("compute"), strict=True)
    unwatched.make(calls, b"".join(frames))
    unwatched._process.wait(60)
    assert [answer["scores"] for _, answer in unwatched.receive()] == [[1.0]]
    assert unwatched.receive() == []
    with pytest.raises(WorkerLost, match=r"took more than 0\.2 s"):
        unwatched.require_use()


def test_what_a_completion_started_ends_with_the_worker_that_ran_out_of_time(tmp_path: Path) -> None:
    with pool(single(), seconds=1.0) as on:
        assert score(on, ["leave behind"], told=str(tmp_path)).why == "it took more than 1 s"
        assert gone([int(folder.name) for folder in tmp_path.iterdir()], 5.0)


def test_memory_is_bounded(shared: RewardPool) -> None:
    """By what is allowed above that of the process itself."""
    assert score(shared, ["take"], size=(MIB << 20) * 9 // 10) == Scored([1.0])
    assert score(shared, ["take"], size=(MIB << 20) * 11 // 10) == Scored([None], 1, "MemoryError: ")


@pytest.mark.parametrize("word", ODD)
def test_nonsense_counts_as_failure_and_odd_sense_as_what_it_is(word: str, shared: RewardPool) -> None:
    scored = score(shared, ["good", word, "good"])
    meant = {"steps": ((0, 0.25), (1, -1.0)), "no steps": None, "none": None, "true": 1.0, "whole": 3.0}
    assert scored.scores == [1.0, meant.get(word), 1.0]
    assert scored.failed == (0 if word in meant else 1)
    assert ("it returned" in scored.why or "encode" in scored.why) == (word not in meant)


def test_output_goes_nowhere(shared: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert score(shared, ["print", "good"]) == Scored([1.0, 1.0])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("raise", "ValueError: no  [31m such thing"),
        ("unspeakable", "Unspeakable"),
        ("leave", "SystemExit: "),
        ("interrupt", "KeyboardInterrupt: "),
        ("hog", "MemoryError: "),
        ("end", "its process died"),
    ],
)
def test_the_reason_is_one_plain_line(word: str, why: str, shared: RewardPool) -> None:
    assert score(shared, [word]).why == why


def test_a_function_sees_the_whole_batch() -> None:
    with pool("count") as on:
        assert score(on, ["a", "b", "c"]) == Scored([3.0] * 3)


def test_a_batch_that_fails_is_scored_one_by_one() -> None:
    with pool("count") as on:
        scored = score(on, ["a", "raise", "c"])
    assert (scored.scores, scored.failed) == ([1.0, None, 1.0], 1)


def test_another_number_of_scores_than_of_completions_fails_them_all() -> None:
    with pool("short") as on:
        assert score(on, ["a", "b"]) == Scored([None, None], 2, "it returned 0 scores for 1 completion")


def test_an_async_function_runs_its_batch_at_once() -> None:
    with pool("together") as on:
        assert score(on, ["a", "b", "c"]) == Scored([0.5] * 3)


def test_several_functions_keep_their_order_options_and_columns() -> None:
    options = {"scaled": {"scale": 2.0, "extra": 1}, "length_penalty": {"max_length": 4}}
    rewards = find_rewards(["scaled", "exact_match", "count", "length_penalty"], options)
    columns = {"answer": ["a", "x"], "weight": [1.0, 5.0], "extra": [9, 9], "prompt": ["not", "used"]}
    with RewardPool(rewards, seconds=SECONDS, memory_mib=MIB, workers=2) as on:
        scored = on.score(["p"] * 2, ["a", "b"], [[1], [1, 2]], columns)
    assert [one.scores for one in scored] == [[3.0, 11.0], [1.0, 0.0], [2.0, 2.0], [-0.25, -0.5]]


def test_chat_messages_reach_functions_as_they_are(shared: RewardPool) -> None:
    """As in TRL; `obey` knows no such word, and the lists are unhashable to it."""
    message = [{"role": "assistant", "content": "raise"}]
    (scored,) = shared.score([[{"role": "user", "content": "p"}]], [message], [[1]], {})
    assert scored == Scored([None], 1, "TypeError: unhashable type: 'list'")


def test_columns_that_json_has_no_form_for_arrive_as_text() -> None:
    (reward,) = find_rewards(["obey"])
    with RewardPool([reward], seconds=SECONDS, memory_mib=MIB, workers=1) as on:
        (scored,) = on.score(["p"], ["good"], [[1]], {"day": [Path("x")], "odd": [{"\ud800": b"\xff"}]})
    assert scored == Scored([1.0])


def test_an_empty_batch_starts_nothing() -> None:
    before = children()
    with pool("obey") as on:
        assert on.score([], [], [], {}) == [Scored([])]
        assert children() == before


def test_a_function_that_runs_here_and_raises_gives_none() -> None:
    def broken(*, completions: list[str], **_: Any) -> list[float]:
        raise ZeroDivisionError(len(completions))

    with pool(Reward("broken", 1, broken)) as on:
        assert score(on, ["a", "b"]) == Scored([None, None], 2, "ZeroDivisionError: 2")


def test_a_missing_column_is_named(shared: RewardPool) -> None:
    with pool("exact_match") as on, pytest.raises(ConfigError, match=r"exact_match.*needs the column answer.*gives b"):
        on.score(["p"], ["a"], [[1]], {"b": [1]})


def test_processes_are_few_kept_and_replaced(shared: RewardPool) -> None:
    first = set(pids(shared))
    assert 1 <= len(first) <= 2
    assert set(pids(shared)) == first
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    assert gone(list(first), SECONDS)
    scored = score(shared, ["pid"] * 4)
    assert scored.failed == 0  # they were idle: no completion is to blame
    assert not first & set(scored.scores)


def test_a_process_that_is_full_of_leftovers_is_replaced_before_it_fails() -> None:
    with pool(single(), workers=1) as on:
        scored = score(on, ["keep", "pid"] * 4, size=(MIB << 20) * 6 // 10)
    assert scored.failed == 0
    assert len(set(scored.scores[1::2])) == 4


def test_functions_see_no_environment_of_ours(shared: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVEGRPO_SECRET", "x")
    with pool(single(), workers=1) as on:
        assert score(on, ["secret"]) == Scored([0.0])


def test_a_request_that_is_too_long_fails_only_its_own_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivegrpo.peer.rewards.frames.MAX_BYTES", 1000)
    with pool("count") as on:
        scored = score(on, ["a", "b" * 2000, "c"])
    assert scored == Scored([1.0, None, 1.0], 1, "the batch is longer than 1000 bytes")


def test_long_and_short_completions_together(shared: RewardPool) -> None:
    words = ["x" * 1_000_000 if index % 3 == 0 else "good" for index in range(30)]
    assert score(shared, words) == Scored([1.0] * 30)


def test_sending_never_waits_for_a_process_that_is_at_work() -> None:
    """What does not fit between the two is sent when there is an answer: the parent is free to look at its clock."""
    with pool(single(), seconds=1.0, workers=1) as on:
        scored = score(on, ["wait", *["x" * 1_000_000] * 3])
    assert scored == Scored([None, 1.0, 1.0, 1.0], 1, "it took more than 1 s")


@pytest.mark.parametrize(("target", "says"), [("dies", "its process died"), ("raises", "ImportError: on purpose")])
def test_a_function_that_cannot_be_loaded_is_the_users_to_correct(
    target: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text(f"{IN_WORKER}os._exit(1)\ndef f(): pass\n")
    (tmp_path / "raises.py").write_text(f"{IN_WORKER}raise ImportError('on purpose')\ndef f(): pass\n")
    folder = tmp_path / "other"
    folder.mkdir()
    install(folder, monkeypatch, unloadable=f"{target}:f")
    monkeypatch.syspath_prepend(tmp_path)
    before = children()
    with pool("unloadable") as on, pytest.raises(ConfigError, match=f"unloadable.*{says}"):
        score(on, ["a"])
    assert children() == before


def test_a_function_that_loads_for_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(f"{IN_WORKER}time.sleep(1000)\ndef f(): pass\n")
    folder = tmp_path / "other"
    folder.mkdir()
    install(folder, monkeypatch, slow="slow:f")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    with pool("slow") as on, pytest.raises(ConfigError, match="cannot be loaded"):
        score(on, ["a"])


def test_work_can_be_given_up_half_way(tmp_path: Path) -> None:
    """The event ends it at once, and the process that was busy; the pool goes on."""
    cancelled = threading.Event()
    with pool(single()) as on:
        give_up_once_begun(on, tmp_path, cancelled, cancelled.set)
        assert score(on, ["good"]) == Scored([1.0])
        with pytest.raises(Cancelled):
            score(on, ["good"], cancelled)


def test_closing_ends_a_batch_in_another_thread(tmp_path: Path) -> None:
    before = children()
    on = pool(single())
    give_up_once_begun(on, tmp_path, threading.Event(), on.close)
    assert children() == before
    with pytest.raises(Cancelled):
        score(on, ["good"])


def test_nothing_is_left_after_closing(folders: Path) -> None:
    before = children()
    with pool(single()) as on:
        spawned = [int(number) for number in score(on, ["spawn", "pid", "spawn"]).scores if number is not None]
        assert not gone(spawned)
        on.close()
        assert gone(spawned, 5.0)
        assert children() == before
        assert list(folders.iterdir()) == []


def test_nothing_is_left_of_a_pool_that_nobody_holds() -> None:
    on = pool(single())
    workers = pids(on)
    del on
    gc.collect()
    assert gone(workers, 5.0)


@pytest.mark.parametrize("word", ["pid", "compute"])
def test_workers_die_with_their_parent(word: str, tmp_path: Path) -> None:
    """Killed, it has no time to say goodbye: idle workers end, and so do those that are stuck in C code."""
    code = (
        "import sys\n"
        f"sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "from test_reward_pool import pool, score, single\n"
        "on = pool(single(), seconds=600.0, workers=1)\n"
        "print(int(score(on, ['pid']).scores[0]), flush=True)\n"
        f"score(on, [{word!r}])\n"
        "sys.stdin.read()\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # where a killed process leaves an empty folder
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        before = worker.cpu_times().user
        if word == "compute":
            wait_for(lambda: worker.cpu_times().user > before + 0.1)
        parent.kill()
    assert gone([worker.pid], 5.0)


def give_up_once_begun(on: RewardPool, folder: Path, cancelled: threading.Event, give_up: Callable[[], None]) -> None:
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        scoring = threads.submit(score, on, ["tell"], cancelled, pipe=str(pipe))
        assert pipe.read_bytes() == b"!"
        give_up()
        with pytest.raises(Cancelled):
            scoring.result(SECONDS)


def test_a_message_is_bounded_before_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        theirs.sendall(encode({"a": "b" * 100}))
        assert channel.receive()
        with pytest.raises(ValueError, match="of 108 bytes, above 107"):
            channel.next(107)
        assert channel.next(108) == {"a": "b" * 100}
        assert channel.empty


def test_messages_are_written_as_json_writes_them() -> None:
    """In parts, but with the same bytes, whatever is in them."""
    odd: list[Any] = [(1, [2]), {"a": {}, "b": [], "c": {"d": [None, True, 1.5, float("nan")]}}, {1: 2}, Path("p"), "é"]
    for message in ({}, {"a": odd}, {"arguments": {"x": odd, "y": [[odd]], "z": {}}, "key": 1}, {"a": {True: odd}}):
        expected = json.dumps(message, default=str, separators=(",", ":")).encode()
        assert encode(message) == len(expected).to_bytes(4, "big") + expected


def test_a_message_that_is_too_long_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a column's 1,000 values of 1 MiB, only as many are written as the limit lets through, and one more."""
    monkeypatch.setattr("hivegrpo.peer.rewards.frames.MAX_BYTES", 3 << 20)
    column = ["x" * (1 << 20)] * 1000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="longer than"):
            encode({"key": 1, "arguments": {"column": column}})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # its bytes, a value in JSON, the copy to ASCII, and room that a bytearray grows by


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"{", b"\xff", b"[" * 10_000, b'{"a":' * 5_000])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        theirs.sendall(len(body).to_bytes(4, "big") + body)
        assert channel.receive()
        with pytest.raises(ValueError, match=r"a message that is no (JSON|object)"):
            channel.next()
