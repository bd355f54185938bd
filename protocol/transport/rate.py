"""A node's uplink: the turns in which its streams send, and a cap on all of them, a token bucket."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

SLICE_BYTES = 16 << 10
"""Most that is taken at once: a small frame waits no longer than so much takes."""

BURST_BYTES = 64 << 10
BURST_SECONDS = 0.05
"""What may leave at once after a pause: so many bytes, or so many seconds' worth if that is more. A timer that is late
by less costs no throughput."""

QUIET_SECONDS = 0.02
"""So long after the last frame of an exchange its streams count as silent: chunks follow each other faster."""

YIELD_SHARE = 16
"""While others send, blobs get one byte for so many of theirs."""

YIELD_SECONDS = 1.0
"""But no slice of a blob waits for others for longer."""

LEAST_WAIT = 1e-6
"""Seconds that any clock can be seen to have moved on by."""


class TokenBucket:
    """At most rate x window + burst bytes in any window of time. Starts full."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate`: bytes a second, above 0; `burst`: bytes."""
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._at = clock()

    def take(self, size: int) -> float:
        """Take `size` bytes, at most the burst, which are to leave at once, and return 0; or take nothing, and return
        the seconds after which it can work, if nobody else takes any."""
        now = self._clock()
        # A clock that went back gives nothing, and takes nothing away.
        self._tokens = min(float(self.burst), self._tokens + max(0.0, now - self._at) * self.rate)
        self._at = now
        if self._tokens >= size:
            self._tokens -= size
            return 0.0
        return max((size - self._tokens) / self.rate, LEAST_WAIT)


class UploadCap:
    """One node's uplink, shared by all its streams. Bulk streams take turns; what is urgent goes before them.

    Blobs yield to both, with a cap and without: what late joiners fetch keeps no round waiting. Those who fetch get
    equal shares, however many streams each has. Nothing starves: an urgent slice waits for one bulk slice and one of a
    blob at most, beside the urgent ones that came first; a blob's slice for `YIELD_SHARE` times its size, or
    `YIELD_SECONDS`.
    """

    def __init__(
        self,
        mbit: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`mbit`: 10^6 bits a second, above 0; None is no cap."""
        self.burst = 0
        """Most that leaves at once with a cap, bytes."""
        self._bucket: TokenBucket | None = None
        if mbit is not None:
            rate = mbit * 1e6 / 8
            self.burst = max(BURST_BYTES, int(rate * BURST_SECONDS))
            self._bucket = TokenBucket(rate, self.burst, clock)
        self._clock = clock
        self._sleep = sleep
        self._door = asyncio.Lock()
        self._bulk = asyncio.Lock()
        """Of bulk slices, one at a time stands at the door."""
        self._last = asyncio.Lock()
        """Of blobs' slices, too, when its remote has the turn."""
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        """A lock for each remote that fetches blobs, and how many hold it or wait for it."""
        self._sending = 0
        self._taking: dict[object, float] = {}
        """Writes of such frames that wait for their receiver, and since when."""
        self._sent = 0
        self._silent_since = -math.inf

    @property
    def capped(self) -> bool:
        """Whether there is a cap."""
        return self._bucket is not None

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """Around the sending of a frame of `size` bytes to which blobs yield."""
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1
            self._sent += size
            self._silent_since = self._clock()

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Around the wait for the receiver of such a frame: one that takes `YIELD_SECONDS` is yielded to no more."""
        mark = object()
        self._taking[mark] = self._clock()
        try:
            yield
        finally:
            del self._taking[mark]

    async def admit(self, size: int, urgent: bool) -> None:
        """Return when `size` bytes, at most SLICE_BYTES, may be written; the caller writes them without awaiting."""
        if urgent:
            await self._pass_door(size)
        else:
            async with self._bulk:
                await self._pass_door(size)

    async def admit_last(self, size: int, remote: str) -> None:
        """As `admit`, for a blob's slice on its way to `remote`."""
        async with self._turn_of(remote), self._last:
            began, before = self._clock(), self._sent
            while self._is_busy():
                if self._sent - before >= YIELD_SHARE * size or self._clock() - began >= YIELD_SECONDS:
                    break
                await self._sleep(QUIET_SECONDS)
            await self._pass_door(size)

    def _is_busy(self) -> bool:
        """Whether frames to which blobs yield are on their way, or were until just now."""
        now = self._clock()
        stuck = sum(now - since >= YIELD_SECONDS for since in self._taking.values())
        return self._sending > stuck or now - self._silent_since < QUIET_SECONDS

    @asynccontextmanager
    async def _turn_of(self, remote: str) -> AsyncIterator[None]:
        """One slice of each remote at a time waits for its turn."""
        lock, users = self._turns.get(remote, (asyncio.Lock(), 0))
        self._turns[remote] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns.pop(remote)
            if users > 1:
                self._turns[remote] = lock, users - 1

    async def _pass_door(self, size: int) -> None:
        """First come, first served: asyncio's locks are fair."""
        if self._bucket is None:
            return
        async with self._door:
            while (seconds := self._bucket.take(size)) > 0.0:
                await self._sleep(seconds)
