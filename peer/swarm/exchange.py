"""The exchange of one attempt: push own chunks to the reducers, reduce the own span, collect all spans.

Streams "push" (a sender's chunks to a reducer, and later the span back) and "span" (from any peer that has the span).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice

import structlog

from hivegrpo.peer.swarm.accuse import Sent
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.making import SpanInMaking, frame_sizes, split_frames
from hivegrpo.peer.swarm.pulls import PullServer
from hivegrpo.peer.swarm.reducer import RefusedPush, SpanLayout, SpanReducer
from hivegrpo.peer.swarm.replay import AveragedGradient
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import receipt_of
from hivegrpo.protocol.blobs import blob_ref, blob_root
from hivegrpo.protocol.envelope import Opened, open_signed, parse, sign, sign_payload
from hivegrpo.protocol.errors import CommitmentError, FrameError, RemoteError, StaleError, WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.striped import lanes_for

log = structlog.get_logger(__name__)

PUSH = "push"
SPAN = "span"
LANES_AT_A_REDUCER = 64
"""Of all pushes together: they come at the same moment, and at a node's door there is room for 100 streams (asyncio's
backlog); p2pd drops the others."""

MAX_HEADER_BYTES = 4096
MAX_RECEIPT_BYTES = 1024
RETRY_SECONDS = 0.25
DECODED_AHEAD_BYTES = 512 << 10
"""A span from this length on is decoded before the others are here."""


class Line:
    """A stream, as one attempt uses it: what it carries from here on is this attempt's."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._before = stream.bytes_sent, stream.bytes_received

    def carried(self) -> tuple[int, int]:
        """Bytes sent and received since."""
        sent, received = self._before
        return self.stream.bytes_sent - sent, self.stream.bytes_received - received


@dataclass(frozen=True, slots=True)
class Span:
    """A reduced span and the reducer's signed promise of it."""

    receipt: pb.Signed
    content: pb.Blob
    data: bytes


class Exchange:
    """One attempt, as one roster peer sees it. `bytes_sent` and `bytes_received` include framing."""

    def __init__(
        self,
        plan: Opened[pb.RoundPlan],
        own: EncodedVector,
        *,
        identity: Identity,
        run_id: str,
        directory: Directory,
        worker: Executor,
        on_bad_push: Callable[[Sent], None] | None = None,
    ) -> None:
        """`on_bad_push` is told of chunks that contradict what their sender signed."""
        self.plan = plan
        self.own = own
        self.spans: dict[int, Span] = {}
        self.gradient = AveragedGradient(plan.message)
        """Of the spans that are here."""
        self.pulls = PullServer(plan, own, identity, run_id)
        """Serves the chunks that are here to whoever audits a span."""
        self.began = time.perf_counter()
        self.seconds = 0.0
        """From the plan until all spans are here, and decoded."""
        self.span_seconds = [0.0] * len(plan.message.reducers)
        """That each span took to come from its reducer; 0 for the own, and from others."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._on_bad_push = on_bad_push
        self._identity = identity
        self._run_id = run_id
        self._directory = directory
        self._worker = worker
        self._changed = asyncio.Condition()
        self._over = False
        self._making: SpanInMaking | None = None
        """The own span, from the seal on."""
        self._pushing = False
        self._pushed: set[int] = set()
        """Spans whose reducers have this peer's chunks."""
        self._lines: dict[int, Line] = {}
        """To the reducers that have this peer's chunks, and were asked for their spans."""
        directory.learn(plan.message.reducers)
        mine = [index for index, reducer in enumerate(plan.message.reducers) if reducer.peer == identity.peer_id]
        self.reducer = SpanReducer(plan, mine[0]) if mine else None

    async def push(self) -> None:
        """Send its chunks to every reducer that has not taken them; one that fails is tried again.

        RemoteError for one of them if the exchange's time is up. While it goes on, `collect` waits for acknowledgements
        that are still on their way: the caller ends it.
        """
        self._pushing = True
        rest = [index for index in range(len(self.plan.message.reducers)) if index not in self._pushed]
        try:
            outcomes = await asyncio.gather(*map(self._push_span, rest), return_exceptions=True)
        finally:
            async with self._changed:
                self._pushing = False
                self._changed.notify_all()
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def gather(self) -> pb.SenderReport | None:
        """As a reducer, wait until all senders are complete or time is up, and say who is; None if not a reducer."""
        if self.reducer is None:
            return None
        try:
            async with asyncio.timeout(self.plan.message.exchange_seconds):
                await self.reducer.all_complete.wait()
        except TimeoutError:
            pass  # those that are complete by now are reported; the coordinator decides what follows
        return self.reducer.report()

    async def collect(self, seal: Opened[pb.Seal]) -> list[Span]:
        """Reduce the own span and fetch the others: all spans in order. RemoteError when time is up."""
        self.pulls.open(self.reducer)
        try:
            async with asyncio.timeout(self.plan.message.step_seconds):
                await asyncio.gather(*(self._obtain(index, seal) for index in range(len(self.plan.message.reducers))))
                await self._decode(list(self.spans))
        except BaseException as error:
            self.gradient = AveragedGradient(self.plan.message)  # as long as a gradient, and kept with its attempt
            if not isinstance(error, TimeoutError):
                raise
            missing = sorted(set(range(len(self.plan.message.reducers))) - set(self.spans))
            raise RemoteError(f"spans {missing} did not come within {self.plan.message.step_seconds:.0f} s") from None
        self.seconds = time.perf_counter() - self.began
        return [self.spans[index] for index in range(len(self.spans))]

    async def serve_push(self, stream: Stream, signed: pb.Signed) -> None:
        """Take a sender's chunks."""
        self._directory.met(stream.remote)
        header = open_signed(signed, self._run_id, pb.PushHeader, signer=stream.remote)
        if self.reducer is None or header.message.span != self.reducer.span:
            raise StaleError("this peer does not reduce that span")
        try:
            async with asyncio.timeout(self.plan.message.exchange_seconds):
                await self.reducer.receive(stream, header)
        except TimeoutError:
            reason = f"the push did not end within {self.plan.message.exchange_seconds:g} s"
            self.reducer.refuse(stream.remote, reason)
            raise StaleError(reason) from None
        except WireError as error:
            self.reducer.refuse(stream.remote, error.message)
            if not isinstance(error, RefusedPush):
                raise
            if self._on_bad_push is not None:
                self._on_bad_push(Sent(header, error.chunks))
            raise CommitmentError(error.message) from None
        self.pulls.keep_header(signed)
        await stream.send(pb.Ack(accepted=True).SerializeToString())

    async def serve_span(self, line: Line, index: int) -> bool:
        """Send a span and its receipt: the own one as it is reduced, another's only if it is here already.

        False if the attempt ends without it: then not all of it was sent.
        """
        stream = line.stream
        plan = self.plan.message
        mine = self.reducer is not None and index == self.reducer.span
        if index not in self.spans and not mine:
            raise StaleError(f"span {index} is not here")  # two who wait for each other would not ask who has it
        sent = 0
        try:
            async with asyncio.timeout(plan.exchange_seconds + plan.step_seconds):
                async with self._changed:
                    await self._changed.wait_for(lambda: index in self.spans or self._making or self._over)
                if index not in self.spans and self._making is not None:
                    async for frame in self._making.frames():
                        await stream.send(frame)
                        sent += 1
                if index not in self.spans:
                    return False
                span = self.spans[index]
                for rest in islice(split_frames(span.data), sent, None):
                    await stream.send(rest)
                await stream.send(span.receipt.SerializeToString())
        except TimeoutError:
            raise StaleError(f"span {index} did not become available here, or was not taken, in time") from None
        self._count(line)
        return True

    async def end(self) -> None:
        """Nothing more is done for this attempt: whoever waits for a span that is not here waits in vain."""
        async with self._changed:
            self._over = True
            self._changed.notify_all()
        lines, self._lines = self._lines, {}
        await asyncio.gather(*(line.stream.close() for line in lines.values()))

    async def _push_span(self, index: int) -> None:
        layout = SpanLayout.of(self.plan.message, index)
        chunks = list(self.own.chunks[layout.chunks.start : layout.chunks.stop])
        header = self.own.header(self.plan.digest, index, layout.chunks)
        if self.reducer is not None and index == self.reducer.span:
            await self.reducer.take(self._identity.peer_id, chunks, header)
        else:
            signed = sign(self._identity, self._run_id, header)
            frames = layout.pack(chunks)
            lanes = lanes_for(layout.size, LANES_AT_A_REDUCER // len(self.plan.message.contributors))
            await self._retry(lambda: self._push_once(index, signed, frames, lanes), self.plan.message.exchange_seconds)
        self._pushed.add(index)

    async def _push_once(self, index: int, header: pb.Signed, frames: list[bytes], lanes: int) -> None:
        """Send a reducer its chunks, and ask for the span, which comes once it is made. The caller bounds the time."""
        stream = await self._directory.open_stream(self.plan.message.reducers[index].peer, PUSH, lanes=lanes)
        line = Line(stream)
        try:
            await stream.send(header.SerializeToString())
            for frame in frames:
                await stream.send(frame, timeout=None)
            await stream.send(pb.SpanRequest(plan=self.plan.digest, span=index).SerializeToString(), timeout=None)
            ack = parse(pb.Ack, await stream.receive(MAX_HEADER_BYTES, timeout=self.plan.message.exchange_seconds))
            if not ack.accepted:
                raise RemoteError(f"the reducer refused the push: {ack.reason[:200]}")
        except BaseException:
            await stream.close()
            raise
        async with self._changed:
            self._lines[index] = line
            self._changed.notify_all()

    async def _obtain(self, index: int, seal: Opened[pb.Seal]) -> None:
        if self.reducer is not None and index == self.reducer.span:
            making = SpanInMaking()
            async with self._changed:
                self._making = making
                self._changed.notify_all()
            try:
                await self._keep(index, await self._reduce(self.reducer, seal, making.add))
            finally:
                making.end()
                self._making = None
            await self._decode_ahead(index)
            return
        layout = SpanLayout.of(self.plan.message, index)
        first = self.plan.message.reducers[index].peer
        sources = cycle([first, *self._others(first)])
        half, began = self.plan.message.step_seconds / 2, time.perf_counter()  # the rest is time to ask others

        async with self._changed:
            await self._changed.wait_for(lambda: index in self._lines or not self._pushing)

        async def fetch() -> None:
            pushed = self._lines.pop(index, None)
            line = pushed or await self._request_span(next(sources), index)
            spent = time.perf_counter() - began if line.stream.remote == first else 0.0
            try:
                span = await self._receive_span(line, index, layout, seal, max(half - spent, RETRY_SECONDS))
            except BaseException:
                await line.stream.close()
                raise
            if pushed is None:
                await line.stream.close()
            else:
                await self._directory.give_back(line.stream, PUSH)
            await self._keep(index, span)

        await self._retry(fetch, self.plan.message.step_seconds)
        await self._decode_ahead(index)

    async def _decode_ahead(self, index: int) -> None:
        """Decode a long span while others are on their way; short ones are quicker decoded together, at the end."""
        if len(self.spans[index].data) >= DECODED_AHEAD_BYTES:
            await self._decode([index])

    async def _decode(self, indices: Sequence[int]) -> None:
        """Decode spans that are here. What is wrong with one is said by the step."""

        def decode() -> None:
            for index in indices:
                self.gradient.add(index, self.spans[index].data)

        with suppress(CommitmentError):
            await asyncio.get_running_loop().run_in_executor(self._worker, decode)

    def _others(self, first: str) -> list[str]:
        """Who else may have a span, reducers first: all others are connected to these, since they pushed to them.

        Each peer begins at another place, so that not all ask the same one.
        """
        plan, me = self.plan.message, self._identity.peer_id
        reducers = [reducer.peer for reducer in plan.reducers]
        roster = [contributor.peer for contributor in plan.contributors]
        turn = roster.index(me) if me in roster else 0
        others = []
        for group in (reducers, [peer for peer in roster if peer not in set(reducers)]):
            start = turn % max(len(group), 1)
            others += group[start:] + group[:start]
        return [peer for peer in others if peer not in (first, me)]

    async def _reduce(self, reducer: SpanReducer, seal: Opened[pb.Seal], on_part: Callable[[bytes], None]) -> Span:
        if not reducer.has_all(seal.message):
            raise RemoteError("the seal names a sender whose chunks are no longer here")
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(self._worker, reducer.reduce, seal.message, on_part)
        ref = blob_ref(data)
        content = pb.Blob(root=ref.root, size=ref.size)
        receipt = receipt_of(self.plan.digest, seal.digest, reducer.span, content)
        return Span(sign_payload(self._identity, self._run_id, "SpanReceipt", receipt), content, data)

    async def _request_span(self, source: str, index: int) -> Line:
        stream = await self._directory.open_stream(source, SPAN)
        line = Line(stream)
        try:
            await stream.send(pb.SpanRequest(plan=self.plan.digest, span=index).SerializeToString())
        except BaseException:
            await stream.close()
            raise
        return line

    async def _receive_span(
        self, line: Line, index: int, layout: SpanLayout, seal: Opened[pb.Seal], patience: float
    ) -> Span:
        stream, reducer = line.stream, self.plan.message.reducers[index].peer
        frames: list[bytes] = []
        began = 0.0
        for size in frame_sizes(layout.size):
            frames.append(await stream.receive(size, patience))
            began = began or time.perf_counter()
            if len(frames[-1]) != size:
                raise FrameError(f"{len(frames[-1])} bytes of a span where the plan says {size}")
        seconds = time.perf_counter() - began
        signed = parse(pb.Signed, await stream.receive(MAX_RECEIPT_BYTES, patience))
        receipt = open_signed(signed, self._run_id, pb.SpanReceipt, reducer).message
        if (receipt.plan, receipt.seal, receipt.span) != (self.plan.digest, seal.digest, index):
            raise StaleError("the receipt is for another plan, seal or span")
        if signed.payload != receipt_of(self.plan.digest, seal.digest, index, receipt.content):
            raise FrameError("a receipt with something else in it: whoever has only its signature could not check it")
        data = b"".join(frames)
        if receipt.content.size != len(data) or blob_root(data) != receipt.content.root:
            raise CommitmentError("the span's bytes are not those of its receipt")
        if stream.remote == reducer:
            self.span_seconds[index] = seconds
        self._count(line)
        return Span(signed, receipt.content, data)

    async def _keep(self, index: int, span: Span) -> None:
        async with self._changed:
            self.spans[index] = span
            self._changed.notify_all()

    async def _retry(self, action: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Repeat until it works; RemoteError with the last reason when `seconds` are up."""
        reason = "no answer"
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return await action()
                    except WireError as error:
                        reason = str(error)
                        log.debug("exchange retries", plan=self.plan.digest.hex()[:16], reason=reason)
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            raise RemoteError(f"gave up after {seconds:.0f} s: {reason}") from None

    def _count(self, line: Line) -> None:
        sent, received = line.carried()
        self.bytes_sent += sent
        self.bytes_received += received
