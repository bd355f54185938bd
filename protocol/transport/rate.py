"""An upload cap: a token bucket, and the turns in which a node's streams take from it."""

import asyncio
import time
from collections.abc import Awaitable, Callable

SLICE_BYTES = 16 << 10
"""Most that is taken at once: a small frame waits no longer than so much takes."""

BURST_BYTES = 64 << 10
BURST_SECONDS = 0.05
"""What may leave at once after a pause: so many bytes, or so many seconds' worth if that is more. A timer that is late
by less costs no throughput."""

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
    """One node's cap, shared by all its streams. Bulk streams take turns; what is urgent goes before them.

    Nothing starves: an urgent slice waits for one bulk slice at most, beside the urgent ones that came first.
    """

    def __init__(
        self,
        mbit: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`mbit`: 10^6 bits a second, above 0."""
        rate = mbit * 1e6 / 8
        self.burst = max(BURST_BYTES, int(rate * BURST_SECONDS))
        self._bucket = TokenBucket(rate, self.burst, clock)
        self._sleep = sleep
        self._door = asyncio.Lock()
        self._bulk = asyncio.Lock()
        """Of bulk slices, one at a time stands at the door."""

    async def admit(self, size: int, urgent: bool) -> None:
        """Return when `size` bytes, at most SLICE_BYTES, may be written; the caller writes them without awaiting."""
        if urgent:
            await self._pass_door(size)
        else:
            async with self._bulk:
                await self._pass_door(size)

    async def _pass_door(self, size: int) -> None:
        """First come, first served: asyncio's locks are fair."""
        async with self._door:
            while (seconds := self._bucket.take(size)) > 0.0:
                await self._sleep(seconds)
