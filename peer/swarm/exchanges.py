"""Streams of other peers, on their way to the attempt that they name."""

import asyncio

from hivegrpo.peer.swarm.exchange import MAX_HEADER_BYTES, PUSH, SPAN, Exchange, Line
from hivegrpo.peer.swarm.pulls import PULL
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import RemoteError, StaleError
from hivegrpo.protocol.transport.base import IDLE_SECONDS, Stream, Transport

KEPT_EXCHANGES = 3
"""Attempts whose spans are still served to peers that are behind."""


class ExchangeServer:
    """Routes streams "push" and "span" to the attempt they name; keeps the last few attempts."""

    def __init__(self) -> None:
        self._exchanges: dict[bytes, Exchange] = {}
        self._changed = asyncio.Condition()

    async def start(self, transport: Transport) -> None:
        """Begin to serve."""
        await transport.serve_stream(PUSH, self._on_push, lanes=True)
        await transport.serve_stream(SPAN, self._on_span)
        await transport.serve_stream(PULL, self._on_pull)

    async def add(self, exchange: Exchange) -> None:
        """Serve an attempt, and no longer the oldest ones."""
        async with self._changed:
            self._exchanges[exchange.plan.digest] = exchange
            while len(self._exchanges) > KEPT_EXCHANGES:
                del self._exchanges[next(iter(self._exchanges))]
            self._changed.notify_all()

    async def _on_push(self, stream: Stream) -> None:
        """One push after another, for as long as the sender gives the stream back; each ends with the span."""
        line = Line(stream)
        frame: bytes | None = await stream.receive(MAX_HEADER_BYTES)
        while frame is not None:
            signed = parse(pb.Signed, frame)
            exchange = await self._find(parse(pb.PushHeader, signed.payload).plan)
            await exchange.serve_push(stream, signed)
            request = await _next_frame(stream)
            if request is None or not await self._answer(line, request):
                return
            line = Line(stream)
            frame = await _next_frame(stream, 2 * IDLE_SECONDS)

    async def _on_span(self, stream: Stream) -> None:
        if await self._answer(Line(stream), await stream.receive(MAX_HEADER_BYTES)):
            await stream.linger()

    async def _answer(self, line: Line, frame: bytes) -> bool:
        request = parse(pb.SpanRequest, frame)
        exchange = await self._find(request.plan)
        if request.span >= len(exchange.plan.message.reducers):
            raise StaleError("no such span in that plan")
        return await exchange.serve_span(line, request.span)

    async def _on_pull(self, stream: Stream) -> None:
        request = parse(pb.PullRequest, await stream.receive(MAX_HEADER_BYTES))
        await (await self._find(request.plan)).pulls.serve(stream, request)

    async def _find(self, plan: bytes, patience: float = 5.0) -> Exchange:
        """The attempt of a plan; the plan itself may still be on its way to this peer."""
        try:
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: plan in self._exchanges)
        except TimeoutError:
            raise StaleError(f"no exchange for plan {plan.hex()[:16]} here") from None
        return self._exchanges[plan]


async def _next_frame(stream: Stream, timeout: float = 30.0) -> bytes | None:
    """What the other side asks for next; None if that is nothing."""
    try:
        return await stream.receive(MAX_HEADER_BYTES, timeout)
    except RemoteError:
        return None
