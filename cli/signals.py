"""The first SIGINT or SIGTERM asks a daemon to stop, the second ends it at once."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType


class StopSignals:
    """Catches signals from its construction on, before the imports that take seconds; `bind` hands them to a loop."""

    def __init__(self, name: str, last: Callable[[], None] | None = None) -> None:
        """`name` is who stops; `last` is called before the end at once."""
        self._name = name
        self._last = last
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def bind(self, event: asyncio.Event) -> None:
        """From now on, and if it has been asked before, a stop sets `event`. Call it inside the loop."""
        self._loop = asyncio.get_running_loop()
        self._event = event
        # Without this a handler runs only when the loop wakes up for something else.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._handle, number)
        if self._asked:
            event.set()

    def _handle(self, number: int, _frame: FrameType | None = None) -> None:
        if self._asked:
            if self._last is not None:
                self._last()
            os._exit(128 + number)
        self._asked = True
        print(f"Stopping {self._name}; once more to stop at once.", file=sys.stderr, flush=True)
        if self._event is not None:
            self._event.set()
