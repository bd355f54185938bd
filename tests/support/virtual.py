"""An event loop whose time passes only when there is nothing else to do: hours of waiting take no time at all.

Work for other threads is done on the loop's own, a little later: so a run depends on nothing but what runs in it.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
WORK_SECONDS = 0.005
"""Until another thread has done its work, in which the loop goes on: a sync to disk takes as long."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time` jumps to the next timer as soon as the loop would sleep."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Skipping(self))

    def time(self) -> float:
        return self._now

    def skip(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, function: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()

        def work() -> None:
            try:
                settle = partial(future.set_result, function(*args))
            except Exception as error:  # noqa: BLE001 - it is the waiter's
                settle = partial(future.set_exception, error)
            if not future.cancelled():
                settle()

        self.call_later(WORK_SECONDS, work)
        return future


class _Skipping(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Never sleeps: it lets the time pass instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise RuntimeError("nothing will ever happen again")
            self._loop.skip(timeout)
        return list(found)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
