"""Frames on a byte stream of any library: what `FramedStream` is for asyncio, for a reader of few and small frames."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Protocol

from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream
from hivegrpo.protocol.transport.frames import CLOSE_SECONDS, PREFIX_BYTES


class Bytes(Protocol):
    """A stream of bytes, as py-libp2p has it."""

    async def read(self, n: int) -> bytes:
        """At least one byte and at most `n`; none, or an EOFError, at the end."""

    async def write(self, data: bytes) -> None:
        """All of it."""

    async def close(self) -> None:
        """Both directions."""


Bounded = Callable[[float], AbstractContextManager[object]]
"""(seconds) -> a block that ends after so long, and turns the library's errors, and being late, into RemoteError."""


class LightStream(Stream):
    """One stream. After an error or a timeout it can only be closed."""

    def __init__(self, stream: Bytes, remote: str, bounded: Bounded) -> None:
        self.remote = remote
        self.bytes_sent = 0
        self.bytes_received = 0
        self._stream = stream
        self._bounded = bounded

    async def send(self, frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {len(frame)} bytes; at most {MAX_FRAME_BYTES} may be sent")
        with self._bounded(math.inf if timeout is None else timeout):
            await self._stream.write(len(frame).to_bytes(PREFIX_BYTES, "big") + frame)
        self.bytes_sent += PREFIX_BYTES + len(frame)

    async def receive(self, limit: int, timeout: float | None = 30.0) -> bytes:
        with self._bounded(math.inf if timeout is None else timeout):
            size = int.from_bytes(await self._read(PREFIX_BYTES), "big")
            if size > limit:
                raise FrameError(f"{self.remote} announced a frame of {size} bytes; at most {limit} are read here")
            frame = await self._read(size)
        self.bytes_received += PREFIX_BYTES + size
        return frame

    async def close(self) -> None:
        # A line that breaks now takes nothing away, and must not hide why the stream is closed.
        with suppress(RemoteError), self._bounded(CLOSE_SECONDS):
            await self._stream.close()

    async def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = await self._stream.read(size - len(data))
            if not part:
                raise RemoteError(f"{self.remote} ended the stream")
            data += part
        return bytes(data)
