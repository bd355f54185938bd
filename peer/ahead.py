"""Sampling under a lease ahead, on the learner's thread, while the event loop exchanges the version before."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import structlog

from hivegrpo.peer.desk import LeaseDesk
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.swarm.session import Session
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol import hivegrpo_pb2 as pb

log = structlog.get_logger(__name__)


class AheadSampler:
    """Samples under one lease at a time; the desk's next work on that lease, which queues behind, goes on from it."""

    def __init__(self, desk: LeaseDesk, session: Session, versions: Versions, worker: Executor) -> None:
        self._desk = desk
        self._session = session
        self._versions = versions
        self._worker = worker
        self._tried = 0
        """Newest lease that was begun."""
        self._sampled: tuple[int, float, float] = (0, 0.0, 0.0)
        """Lease, and when its sampling began and ended."""
        self._exchanged: tuple[float, float | None] = (0.0, 0.0)
        """When the latest exchange began and ended; None while it lasts."""

    async def run(self, wanted: Callable[[pb.Lease], bool]) -> None:
        """Until cancelled: sample under each lease ahead that is `wanted`, for as long as it is the newest."""
        while True:
            lease = await self._session.wait(lambda: self._next(wanted))
            self._tried = lease.id
            try:
                await self._sample(lease, wanted)
            except Cancelled:
                log.info("stopped sampling ahead", lease=lease.id)
            except Exception:
                log.exception("could not sample ahead; it is done again when the version is there", lease=lease.id)

    def exchange_began(self) -> None:
        """A version's exchange is under way, in its first attempt or another."""
        if self._exchanged[1] is not None:
            self._exchanged = time.perf_counter(), None

    def exchange_ended(self) -> None:
        """The version is here."""
        if self._exchanged[1] is None:
            self._exchanged = self._exchanged[0], time.perf_counter()

    def hidden(self, lease: int) -> float:
        """Seconds of the lease's sampling that ran while an exchange was under way."""
        sampled, began, ended = self._sampled
        first, last = self._exchanged
        if sampled != lease or last is None:
            return 0.0
        return max(0.0, min(ended, last) - max(began, first))

    def _next(self, wanted: Callable[[pb.Lease], bool]) -> pb.Lease | None:
        if self._session.lease is None:
            return None
        lease = self._session.lease.message
        if not lease.ahead or lease.id <= self._tried or not wanted(lease):
            return None
        held = self._versions.chain.height == self._versions.version == lease.version - 1
        return lease if held else None

    async def _sample(self, lease: pb.Lease, wanted: Callable[[pb.Lease], bool]) -> None:
        def over() -> bool | None:
            session = self._session
            newest = session.lease is not None and session.lease.message.id == lease.id
            passed = session.head is not None and session.head.message.version > lease.version
            return None if newest and not passed and wanted(lease) else True

        loop, cancelled = asyncio.get_running_loop(), threading.Event()
        parameters = self._versions.state.parameters
        work = loop.run_in_executor(self._worker, self._desk.sample, lease, parameters, cancelled)
        watch = asyncio.create_task(self._session.wait(over))
        try:
            running: set[asyncio.Future[Any]] = {work, watch}
            await asyncio.wait(running, timeout=lease.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.set()
            watch.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)
        self._sampled = lease.id, *await work
