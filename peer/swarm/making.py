"""A span while it is reduced: its first bytes are on their way before the last ones are made."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from hivegrpo.protocol.chunks import SPAN_FRAME_BYTES


def frame_sizes(size: int) -> list[int]:
    """Bytes of each frame of a span of `size` bytes."""
    return [min(SPAN_FRAME_BYTES, size - start) for start in range(0, size, SPAN_FRAME_BYTES)]


def split_frames(data: bytes) -> Iterator[memoryview]:
    """The frames of a whole span."""
    view = memoryview(data)
    return (view[start : start + SPAN_FRAME_BYTES] for start in range(0, len(view), SPAN_FRAME_BYTES))


class SpanInMaking:
    """The whole frames that are made so far, for as many readers as there are. In one event loop, but for `add`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames: list[bytes] = []
        self._rest = bytearray()
        self._changed = asyncio.Event()
        self._over = False

    def add(self, part: bytes) -> None:
        """The next bytes; from one thread, which may be another."""
        self._rest += part
        while len(self._rest) >= SPAN_FRAME_BYTES:
            frame = bytes(self._rest[:SPAN_FRAME_BYTES])
            del self._rest[:SPAN_FRAME_BYTES]
            self._loop.call_soon_threadsafe(self._show, frame)

    def end(self) -> None:
        """Nothing more comes."""
        self._over = True
        self._changed.set()

    async def frames(self) -> AsyncIterator[bytes]:
        """All of them, from the first, until the end; whoever reads bounds the time."""
        sent = 0
        while True:
            changed = self._changed
            while sent < len(self._frames):
                yield self._frames[sent]
                sent += 1
            if self._over:
                return
            if changed is self._changed:
                await changed.wait()

    def _show(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._changed.set()
        self._changed = asyncio.Event()
