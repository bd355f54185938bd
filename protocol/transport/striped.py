"""A stream in several lanes: libp2p streams to the same peer, which carry its frames in turn.

libp2p's multiplexer, yamux, lets a stream have 256 KiB under way before the other side grants more. The grant waits
behind everything that the other side has queued on the same connection: where both upload a megabyte over home lines,
for a second and more, in which the stream stands still. Each lane has such a window of its own.

A lane's first frame is its hello: the stream's id, the lane's place, and how many lanes there are.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.base import Stream, StreamHandler
from hivegrpo.protocol.transport.frames import FramedStream

LANE = "/lane"
"""At the end of the name under which lanes are opened."""

MAX_LANES = 16
LANE_BYTES = 128 << 10
"""What a lane should have to carry: a frame of chunks, or of a span. Two, with their framing, exceed the window."""

LANE_SECONDS = 10.0
"""How long a lane waits for the others, which are opened within as long."""

LOOK_SECONDS = 0.5
"""How often it looks whether it is still open itself."""

ID_BYTES = 16
HELLO_BYTES = ID_BYTES + 2


def lanes_for(size: int, most: int = MAX_LANES) -> int:
    """Lanes of a stream that carries `size` bytes at a time: as many as let all of them be under way, up to `most`."""
    return max(1, min(most, MAX_LANES, -(-size // LANE_BYTES)))


class StripedStream(Stream):
    """The i-th frame, each way, travels on lane i modulo their number."""

    def __init__(self, lanes: Sequence[FramedStream]) -> None:
        """`lanes`: to one peer, by their places."""
        self.remote = lanes[0].remote
        self.bytes_sent = self.bytes_received = 0
        self._lanes = lanes
        self._sent = self._received = 0

    @property
    def lanes(self) -> int:
        """How many there are."""
        return len(self._lanes)

    @property
    def usable(self) -> bool:
        """Whether all lanes are."""
        return all(lane.usable for lane in self._lanes)

    async def send(self, frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        """See `Stream.send`. If it fails, or is cancelled, the stream ends: the two sides' turns could differ."""
        lane = self._lanes[self._sent % len(self._lanes)]
        try:
            await lane.send(frame, timeout)
        except BaseException:
            self.abort()
            raise
        self._sent += 1
        self.bytes_sent = sum(lane.bytes_sent for lane in self._lanes)

    async def receive(self, limit: int, timeout: float | None = 30.0) -> bytes:
        """See `Stream.receive`. After a timeout, or when cancelled, the stream can be read on."""
        frame = await self._lanes[self._received % len(self._lanes)].receive(limit, timeout)
        self._received += 1
        self.bytes_received = sum(lane.bytes_received for lane in self._lanes)
        return frame

    async def close(self) -> None:
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    def abort(self) -> None:
        """Drop all lanes at once, with whatever was not sent yet."""
        for lane in self._lanes:
            lane.abort()


def hellos(lanes: int) -> list[bytes]:
    """The first frames of a new stream's lanes, by their places."""
    name = secrets.token_bytes(ID_BYTES)
    return [name + bytes((place, lanes)) for place in range(lanes)]


class _Arriving:
    """A stream whose lanes come in."""

    def __init__(self, count: int) -> None:
        self.lanes: list[FramedStream | None] = [None] * count
        self.whole = asyncio.Event()
        self.over = asyncio.Event()
        """Set when the stream has been served."""
        self.broken = False
        """Whether a lane has ended before the stream was whole: it never will be."""

    def add(self, place: int, count: int, lane: FramedStream) -> list[FramedStream]:
        """All lanes that are here now."""
        if count != len(self.lanes) or self.lanes[place] is not None:
            raise FrameError(f"a second lane {place}, or another number of lanes than {len(self.lanes)}")
        self.lanes[place] = lane
        return [lane for lane in self.lanes if lane is not None]


class LaneServer:
    """Puts incoming lanes together, and has every stream that is whole served."""

    def __init__(self, handler: StreamHandler, max_per_peer: int) -> None:
        """A peer's streams above `max_per_peer` at once are refused."""
        self._handler = handler
        self._most = max_per_peer
        self._arriving: dict[tuple[str, bytes], _Arriving] = {}
        self._served: Counter[str] = Counter()

    async def serve(self, lane: Stream) -> None:
        """Serve one lane, until the stream that it belongs to has been served; the last one to come serves it."""
        assert isinstance(lane, FramedStream)
        name, place, count = _read_hello(await lane.receive(HELLO_BYTES, LANE_SECONDS))
        key = lane.remote, name
        arriving = self._arriving.setdefault(key, _Arriving(count))
        lanes = arriving.add(place, count, lane)
        if len(lanes) < count:
            await self._wait(key, arriving, lane)
            return
        del self._arriving[key]
        arriving.whole.set()
        try:
            await self._serve(StripedStream(lanes))
        finally:
            arriving.over.set()

    async def _serve(self, stream: StripedStream) -> None:
        if self._served[stream.remote] >= self._most:
            raise RemoteError(f"has {self._most} streams in lanes open already")
        self._served[stream.remote] += 1
        try:
            await self._handler(stream)
        finally:
            self._served[stream.remote] -= 1
            if not self._served[stream.remote]:
                del self._served[stream.remote]

    async def _wait(self, key: tuple[str, bytes], arriving: _Arriving, lane: FramedStream) -> None:
        """For the other lanes, and then until all are served. FrameError if one ends first, or does not come."""
        clock = asyncio.get_running_loop().time
        end = clock() + LANE_SECONDS
        try:
            while not arriving.whole.is_set():
                if arriving.broken or not lane.usable or clock() >= end:
                    here = sum(lane is not None for lane in arriving.lanes)
                    raise FrameError(f"{here} of {len(arriving.lanes)} lanes came and stayed within {LANE_SECONDS:g} s")
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await arriving.whole.wait()
        finally:
            if not arriving.whole.is_set():
                arriving.broken = True
                if self._arriving.get(key) is arriving:
                    del self._arriving[key]
        await arriving.over.wait()


def _read_hello(frame: bytes) -> tuple[bytes, int, int]:
    """A stream's id, the lane's place, and the number of lanes; FrameError if they make no sense."""
    if len(frame) != HELLO_BYTES or not (frame[-2] < frame[-1] and 1 < frame[-1] <= MAX_LANES):
        raise FrameError("a lane does not say which it is")
    return frame[:ID_BYTES], frame[-2], frame[-1]
