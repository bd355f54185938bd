"""The worker processes of a pool, and the sharing out of calls among them."""

import selectors
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import structlog

from hivegrpo.peer.learn.cancel import Cancelled, check
from hivegrpo.peer.rewards.process import REAP_SECONDS, Call, WorkerLost, WorkerProcess
from hivegrpo.protocol.errors import ConfigError

POLL_SECONDS = 0.05
"""Between two looks at deadlines and at whether the work is given up."""

MAX_FAILURES = 100
"""Failures to start a process before they are the user's business, once one has loaded; there is a pause between."""

AHEAD = 8
"""Calls that a process is sent at once: waiting for each answer would cost more than most functions take."""
AHEAD_BYTES = 1 << 15
"""Of them together, so that sending them never waits for a process that is at work."""

log = structlog.get_logger(__name__)

Answer = tuple[Call, dict[str, Any]]
"""{"scores": ...}, as the function returned them, or {"error": why there are none}."""


class Crew:
    """Up to `count` processes, started when there is work and kept for more; one that is lost is replaced."""

    def __init__(self, functions: Sequence[str], memory: int, count: int) -> None:
        """functions: what each process loads, by name; memory: bytes that one may take above that."""
        self._functions = list(functions)
        self._memory = memory
        self._count = count
        self._workers: list[WorkerProcess] = []
        self._closed = False
        self._failures = 0
        """Processes in a row that could not be started, or did not load."""
        self._proved = False
        """Whether any has ever loaded."""
        self._running = threading.Lock()
        self._end_all = weakref.finalize(self, _end_all, self._workers)

    def run(
        self, calls: deque[Call], frame: Callable[[Call], bytes], cancelled: threading.Event | None
    ) -> Generator[Answer, None, None]:
        """Make the calls, those included that are added meanwhile, and give the answers as they come.

        frame: what is sent for a call; ValueError if it cannot be. Raises ConfigError if the functions cannot be
        loaded, Cancelled if the event is set or the crew closed. Whoever leaves early closes the generator.
        """
        with self._running:
            try:
                yield from self._listen(0.0, calls)  # to those that have ended since the last time
                while calls or self._busy():
                    check(cancelled)
                    if self._closed:
                        raise Cancelled
                    self._start(min(self._count, len(calls) + self._busy()))
                    yield from self._hand_out(calls, frame)
                    yield from self._listen(POLL_SECONDS, calls)
            finally:
                for worker in [worker for worker in self._workers if worker.calls]:
                    self._end(worker)

    def close(self) -> None:
        """End all processes, also from another thread than the one that runs calls: that one gets Cancelled."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()
        stopped = self._running.acquire(timeout=REAP_SECONDS)
        try:
            self._end_all()
        finally:
            if stopped:
                self._running.release()

    def _busy(self) -> int:
        return sum(len(worker.calls) > 0 for worker in self._workers)

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            try:
                self._workers.append(WorkerProcess(self._functions, self._memory))
            except OSError as error:
                self._count_failure(str(error))
                return

    def _hand_out(self, calls: deque[Call], frame: Callable[[Call], bytes]) -> Iterator[Answer]:
        for worker in [worker for worker in self._workers if worker.loaded and not worker.calls]:
            self._failures, self._proved = 0, True
            yield from self._send(worker, calls, frame, -(-len(calls) // self._count))

    def _send(
        self, worker: WorkerProcess, calls: deque[Call], frame: Callable[[Call], bytes], share: int
    ) -> Iterator[Answer]:
        """Give a process that waits the next of the calls."""
        taken: list[Call] = []
        frames = b""
        while calls and len(taken) < min(share, AHEAD):
            try:
                encoded = frame(calls[0])
            except ValueError as error:
                yield calls.popleft(), {"error": f"the batch {error}"}
                continue
            if taken and len(frames) + len(encoded) > AHEAD_BYTES:
                break
            taken.append(calls.popleft())
            frames += encoded
        if taken:
            try:
                worker.make(taken, frames)
            except WorkerLost as lost:
                yield from self._lose(worker, lost, calls)

    def _listen(self, seconds: float, calls: deque[Call]) -> Iterator[Answer]:
        """Answers that come within that time; what a process that is lost leaves undone goes back to the calls."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker, selectors.EVENT_READ)
            heard = {key.fileobj for key, _ in selector.select(seconds)}
        for worker in list(self._workers):
            answers = worker.receive() if worker in heard else []
            yield from answers
            if any(message.get("last") for _, message in answers):
                calls.extendleft(reversed(worker.calls))
                self._end(worker)
                continue
            try:
                worker.require_use()
            except WorkerLost as lost:
                yield from self._lose(worker, lost, calls)

    def _lose(self, worker: WorkerProcess, lost: WorkerLost, calls: deque[Call]) -> Iterator[Answer]:
        """The first call that it has not answered is the one it was lost by."""
        self._end(worker)
        if self._closed:
            raise Cancelled from None
        if not worker.loaded:
            self._count_failure(str(lost))
        if worker.calls:
            first = worker.calls.popleft()
            calls.extendleft(reversed(worker.calls))
            yield first, {"error": str(lost)}

    def _end(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.end()

    def _count_failure(self, why: str) -> None:
        """ConfigError at once before any process has loaded; afterwards, when the machine may be short of something
        for a while, only after `MAX_FAILURES`."""
        self._failures += 1
        if self._proved and self._failures < MAX_FAILURES:
            log.warning("a process for reward functions could not be started", reason=why)
            return
        names = ", ".join(self._functions)
        raise ConfigError(
            f"The reward functions ({names}) cannot be loaded in a process of their own: {why}.",
            "Correct the one at fault, update the package that offers it, or leave it out of the run.",
        )


def _end_all(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        worker.kill()
    while workers:
        workers.pop().end()
