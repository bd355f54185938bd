"""Simulated time: what happens next, and nothing else moves the clock."""

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any


class Scheduler:
    """A discrete-event scheduler; what is due at the same moment happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the simulation began."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` in so many seconds."""
        heappush(self._queue, (self.now + seconds, next(self._order), action, args))

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at a time, or now if it has passed."""
        due = when if when > self.now else self.now
        heappush(self._queue, (due, next(self._order), action, args))

    def run(self, steps: int) -> bool:
        """Let the next so many things happen; False if there are not as many left."""
        queue = self._queue
        for _ in range(steps):
            if not queue:
                return False
            self.now, _, action, args = heappop(queue)
            action(*args)
        return True
