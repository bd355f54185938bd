"""Faults in the streams that one node opens or serves."""

import asyncio
from collections.abc import Callable

from hivegrpo.protocol.transport.base import Stream, StreamHandler, Transport


def on_stream(name: str, change: Callable[[Stream], None]) -> Callable[[Transport], Transport]:
    """A fault: `change` gets every stream of that name which a transport opens."""

    def wrap(transport: Transport) -> Transport:
        open_stream = transport.open_stream

        async def opening(peer_id: str, opened: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
            stream = await open_stream(peer_id, opened, timeout, lanes)
            if opened == name:
                change(stream)
            return stream

        transport.open_stream = opening  # type: ignore[method-assign]  # the fault
        return transport

    return wrap


def on_serving(name: str, change: Callable[[StreamHandler], StreamHandler]) -> Callable[[Transport], Transport]:
    """A fault: streams of that name are served by what `change` makes of the handler."""

    def wrap(transport: Transport) -> Transport:
        serve_stream = transport.serve_stream

        async def serving(served: str, handler: StreamHandler, max_per_peer: int = 8, lanes: bool = False) -> None:
            await serve_stream(served, change(handler) if served == name else handler, max_per_peer, lanes)

        transport.serve_stream = serving  # type: ignore[method-assign]  # the fault
        return transport

    return wrap


def only_pushes(handler: StreamHandler) -> StreamHandler:
    """A fault: a stream ends with the push's Ack, so that the span has to be asked for on a stream of its own."""

    async def serve(stream: Stream) -> None:
        send = stream.send

        async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
            await send(frame, timeout)
            await stream.close()

        stream.send = sending  # type: ignore[method-assign]  # the fault
        await handler(stream)

    return serve


async def forever(_: object = None) -> None:
    """What never happens; only a cancellation ends it."""
    await asyncio.Event().wait()
