"""Which engine answers: the newest that is ready. One that is lost is started again; one that is replaced drains."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from hivegrpo.peer.serving.engine import Engine
from hivegrpo.peer.serving.refusals import unavailable
from hivegrpo.peer.serving.releases import Release
from hivegrpo.protocol.errors import HiveError

DRAIN_SECONDS = 600.0
"""How long an engine that was replaced may take for the requests that it has."""
MAX_RESTARTS = 5
RESTART_WINDOW = 600.0
"""Seconds in which an engine may be lost so often, before that is the user's business."""
BACKOFF_SECONDS = 2.0
"""Before the second restart in a row; each further one waits twice as long."""

Start = Callable[[Release], Awaitable[Engine]]
Record = dict[str, Any]
Tell = Callable[[Record], None]
"""Takes what happens: {"kind": "serving" | "lost" | "drained" ..., ...}."""


class Engines:
    """The engine that new requests go to, and those that still have old ones."""

    def __init__(self, start: Start, tell: Tell, backoff: float = BACKOFF_SECONDS) -> None:
        self._start = start
        self._tell = tell
        self._backoff = backoff
        self._current: Engine | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining: set[Engine] = set()
        self._losses: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def current(self) -> Engine:
        """The engine for a new request; Refusal while there is none."""
        if self._current is None or self._current.lost:
            raise unavailable("The model's engine is being started again.")
        return self._current

    async def switch(self, release: Release) -> None:
        """Send new requests to this release once it is ready, and end the engine before it when that is done.

        HiveError if no engine can be started on it: then nothing has changed.
        """
        async with self._changing:
            engine = await self._start(release)
            replaced, self._current = self._current, engine
            self._run(self._watch(engine))
            self._tell({"kind": "serving", "version": release.version, "model": release.name})
        if replaced is not None and not replaced.lost:
            self._draining.add(replaced)
            self._run(self._drain(replaced))

    async def failed(self) -> None:
        """HiveError once the engine is lost for good."""
        await asyncio.shield(self._failed)

    async def close(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        engines = [*self._draining, *([self._current] if self._current is not None else [])]
        await asyncio.gather(*(engine.close() for engine in engines))

    async def _drain(self, engine: Engine) -> None:
        done = await engine.idle(DRAIN_SECONDS)
        self._draining.discard(engine)
        self._tell({"kind": "drained", "version": engine.release.version, "done": done})
        await engine.close()

    async def _watch(self, engine: Engine) -> None:
        """See it end: if that was not for another, start it again."""
        await engine.child.ended()
        engine.lost = True
        if self._current is not engine:
            return
        self._tell({"kind": "lost", "version": engine.release.version, "said": engine.child.said()})
        async with self._changing:
            if self._current is engine:
                await self._restart(engine.release)
        await engine.close()  # after that: it holds the release's folder

    async def _restart(self, release: Release) -> None:
        while True:
            now = time.monotonic()
            recent = sum(now - lost < RESTART_WINDOW for lost in self._losses)
            if recent == MAX_RESTARTS:
                problem = f"The engine was lost {MAX_RESTARTS + 1} times within {RESTART_WINDOW / 60:.0f} minutes."
                self._failed.set_exception(HiveError(problem, "See what it said last, above; is there enough memory?"))
                return
            self._losses.append(now)
            if recent > 0:
                await asyncio.sleep(self._backoff * 2.0 ** (recent - 1))
            try:
                self._current = await self._start(release)
            except HiveError as error:
                self._tell({"kind": "trouble", "message": str(error)})
                continue
            self._run(self._watch(self._current))
            self._tell({"kind": "serving", "version": release.version, "model": release.name})
            return

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        """An error that nobody expects ends the command, instead of leaving it without an engine."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)
