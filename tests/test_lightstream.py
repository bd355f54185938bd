"""Frames over a library's byte stream, read as the light client reads them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.lightstream import LightStream


class Bytes:
    """Gives its bytes in small parts."""

    def __init__(self, data: bytes, part: int = 3) -> None:
        self.data = data
        self.part = part
        self.written = b""
        self.asked: list[int] = []
        self.closed = False

    async def read(self, n: int) -> bytes:
        self.asked.append(n)
        size = min(n, self.part)
        part, self.data = self.data[:size], self.data[size:]
        return part

    async def write(self, data: bytes) -> None:
        self.written += data

    async def close(self) -> None:
        self.closed = True


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RemoteError(str(error)) from None


def opened(data: bytes) -> tuple[LightStream, Bytes]:
    stream = Bytes(data)
    return LightStream(stream, "peer", bounded), stream


def test_frames_come_whole_and_one_by_one() -> None:
    async def test() -> None:
        stream, _ = opened(b"\x00\x00\x00\x07a frame\x00\x00\x00\x00\x00\x00\x00\x01b")
        assert [await stream.receive(7), await stream.receive(7), await stream.receive(7)] == [b"a frame", b"", b"b"]
        assert stream.bytes_received == 20

    asyncio.run(test())


def test_frames_are_sent_with_their_length_and_the_stream_is_closed() -> None:
    async def test() -> None:
        stream, library = opened(b"")
        async with stream:
            await stream.send(b"hello")
            await stream.send(memoryview(b"you"))
        assert library.written == b"\x00\x00\x00\x05hello\x00\x00\x00\x03you"
        assert stream.bytes_sent == len(library.written)
        assert library.closed

    asyncio.run(test())


def test_of_a_frame_that_is_too_long_nothing_is_read() -> None:
    async def test() -> None:
        stream, library = opened(b"\x00\x00\x00\x08too long")
        with pytest.raises(FrameError, match="frame of 8 bytes; at most 7"):
            await stream.receive(7)
        assert library.data == b"too long"
        assert max(library.asked) <= 4

    asyncio.run(test())


@pytest.mark.parametrize("data", [b"", b"\x00\x00", b"\x00\x00\x00\x05cut"])
def test_an_end_in_a_frame_is_an_error(data: bytes) -> None:
    async def test() -> None:
        stream, _ = opened(data)
        with pytest.raises(RemoteError, match="ended the stream"):
            await stream.receive(7)

    asyncio.run(test())


def test_what_the_library_raises_is_told_as_ours() -> None:
    async def test() -> None:
        stream, library = opened(b"")

        async def fail(n: int) -> bytes:
            raise OSError("reset")

        library.read = fail  # type: ignore[method-assign]
        with pytest.raises(RemoteError, match="reset"):
            await stream.receive(7)

    asyncio.run(test())


def test_a_close_that_fails_does_not_hide_why_the_stream_is_closed() -> None:
    async def test() -> None:
        stream, library = opened(b"")

        async def fail() -> None:
            raise OSError("reset")

        library.close = fail  # type: ignore[method-assign]
        with pytest.raises(FrameError):
            async with stream:
                raise FrameError("what was wrong")

    asyncio.run(test())
