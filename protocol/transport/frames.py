"""Frames on an asyncio connection: a 4-byte big-endian length, then that many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TypeVar

from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream
from hivegrpo.protocol.transport.rate import SLICE_BYTES, UploadCap

T = TypeVar("T")

PREFIX_BYTES = 4
CLOSE_SECONDS = 5.0
"""How long `close` waits for the last bytes to leave."""


class FramedStream(Stream):
    """Both transports' stream. What it buffers is bounded by the reader's limit and one frame each way."""

    lanes = 1
    """Of which it consists; see `striped`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        remote: str,
        on_end: Callable[[FramedStream], None],
    ) -> None:
        """`on_end` is called once, when the stream is closed or aborted on this side."""
        self.remote = remote
        self.bytes_sent = 0
        self.bytes_received = 0
        self._reader = reader
        self._writer = writer
        self._on_end: Callable[[FramedStream], None] = on_end
        self._announced: int | None = None
        self._open = True
        self._cap: UploadCap | None = None
        self._urgent = self._last = False

    def pace(self, cap: UploadCap, *, urgent: bool, last: bool) -> None:
        """From now on send no faster than `cap` admits; what is urgent goes before the rest, and blobs go `last`."""
        self._cap, self._urgent, self._last = cap, urgent, last

    @property
    def usable(self) -> bool:
        """Open, as far as this side has heard."""
        return self._open and not self._reader.at_eof() and not self._writer.is_closing()

    async def send(self, frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        body = memoryview(frame).cast("B")
        size = body.nbytes
        if size > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} may be sent")
        if not self._open:
            raise RemoteError(f"the stream to {self.remote} is closed")
        try:
            # In one piece: written apart, the prefix would be a packet of its own all the way.
            whole = b"".join((size.to_bytes(PREFIX_BYTES, "big"), body))
            if self._cap is None:
                await self._write(whole, timeout)
            elif self._last:
                await self._send_in_slices(self._cap, whole, timeout)
            else:
                with self._cap.sending(len(whole)):
                    if self._cap.capped:
                        await self._send_in_slices(self._cap, whole, timeout)
                    else:
                        await self._write(whole, timeout)
        except TimeoutError:
            self.abort()
            raise RemoteError(f"{self.remote} did not take a frame within {timeout:g} s") from None
        except OSError as error:
            self.abort()
            raise RemoteError(f"the stream to {self.remote} broke: {error}") from None
        self.bytes_sent += PREFIX_BYTES + size

    async def _write(self, data: bytes, timeout: float | None) -> None:
        self._writer.write(data)
        with nullcontext() if self._cap is None or self._last else self._cap.taking():
            await _within(timeout, self._writer.drain())

    async def _send_in_slices(self, cap: UploadCap, data: bytes, timeout: float | None) -> None:
        """`timeout` counts what the receiver takes, not the waits for the cap. Cancelled within a frame, it aborts."""
        clock, sent = asyncio.get_running_loop().time, 0
        try:
            while sent < len(data):
                part = data[sent : sent + SLICE_BYTES]
                if self._last:
                    await cap.admit_last(len(part), self.remote)
                else:
                    await cap.admit(len(part), self._urgent)
                if not self._open:
                    raise ConnectionAbortedError("closed on this side")
                sent += len(part)
                began = clock()
                await self._write(part, timeout)
                timeout = None if timeout is None else timeout - (clock() - began)
        except asyncio.CancelledError:
            if 0 < sent < len(data):
                self.abort()
            raise

    async def receive(self, limit: int, timeout: float | None = 30.0) -> bytes:
        """See `Stream.receive`. After a timeout, or when cancelled, the stream can be read on."""
        try:
            frame = await _within(timeout, self._read(limit))
        except TimeoutError:
            raise RemoteError(f"nothing from {self.remote} within {timeout:g} s") from None
        except asyncio.IncompleteReadError:
            raise RemoteError(f"{self.remote} ended the stream") from None
        except OSError as error:
            raise RemoteError(f"the stream from {self.remote} broke: {error}") from None
        self._announced = None
        self.bytes_received += PREFIX_BYTES + len(frame)
        return frame

    async def _read(self, limit: int) -> bytes:
        if self._announced is None:
            self._announced = int.from_bytes(await self._reader.readexactly(PREFIX_BYTES), "big")
        if self._announced > limit:
            raise FrameError(
                f"{self.remote} announced a frame of {self._announced} bytes; at most {limit} are read here"
            )
        return await self._reader.readexactly(self._announced)

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.wait_closed()
        except OSError:
            self.abort()  # also TimeoutError: the other side does not read; what is left is dropped
        except BaseException:
            self.abort()
            raise
        else:
            self._end()  # asyncio's transport is gone: aborting it now would fail

    def abort(self) -> None:
        """Drop the stream at once, with whatever was not sent yet."""
        self._open = False
        self._writer.transport.abort()
        self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, _ended
        on_end(self)


async def _within(seconds: float | None, work: Awaitable[T]) -> T:
    """TimeoutError if it takes longer."""
    if seconds is None:
        return await work
    async with asyncio.timeout(seconds):
        return await work


def _ended(stream: Stream) -> None:
    """The second end of a stream is nothing to tell."""
