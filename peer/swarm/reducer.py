"""One reducer's span: take in every sender's chunks, check them, and reduce those that the seal names."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.evidence import SpanDots
from hivegrpo.peer.swarm.rules.registry import get_rule
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import MAX_REFUSED_REASON
from hivegrpo.protocol.chunks import chunk_count, chunk_values
from hivegrpo.protocol.coefficients import norm_bytes
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.errors import CommitmentError, FrameError, RosterError
from hivegrpo.protocol.merkle import check_range, leaf_hash, merkle_root
from hivegrpo.protocol.scalars import fp32_from_bits
from hivegrpo.protocol.transport.base import Stream

MAX_NORM_SQUARED = 1 << (298 + 120)
"""Largest squared norm of a contribution's span, in units of 2^-298: beyond 2^60 its square overflows in the step."""


class RefusedPush(CommitmentError):
    """Chunks that contradict what their sender signed, and the chunks."""

    def __init__(self, message: str, chunks: list[bytes]) -> None:
        super().__init__(message)
        self.chunks = chunks


@dataclass(frozen=True, slots=True)
class SpanLayout:
    """Which chunks a span has and how long each is, all from the signed plan."""

    chunks: range
    values: tuple[int, ...]
    """Values in each chunk."""
    sizes: tuple[int, ...]
    """Encoded bytes of each chunk."""

    @classmethod
    def of(cls, plan: pb.RoundPlan, span: int) -> "SpanLayout":
        """Layout of span `span` of a checked plan."""
        reducer = plan.reducers[span]
        codec = get_codec(plan.codec)
        chunks = range(reducer.first, reducer.first + reducer.chunks)
        values = tuple(chunk_values(plan.values, index) for index in chunks)
        return cls(chunks, values, tuple(codec.encoded_size(count) for count in values))

    @property
    def size(self) -> int:
        """Encoded bytes of the whole span."""
        return sum(self.sizes)


class SpanReducer:
    """Buffers one span of one plan. Memory is bounded by roster x span: nothing else is ever kept."""

    def __init__(self, plan: Opened[pb.RoundPlan], span: int) -> None:
        self.plan = plan
        self.span = span
        self.layout = SpanLayout.of(plan.message, span)
        self._codec: Codec = get_codec(plan.message.codec)
        self._roots = {contributor.peer: contributor.root for contributor in plan.message.contributors}
        self._chunks: dict[str, list[bytes]] = {}
        self._norms: dict[str, int] = {}
        self._receiving: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self.dots: list[float] = []
        self.all_complete = asyncio.Event()

    async def receive(self, stream: Stream, header: Opened[pb.PushHeader]) -> None:
        """Take a sender's chunks off `stream`; a WireError if anything differs from the plan or the commitment.

        The caller bounds the time.
        """
        sender = header.signer
        if sender not in self._roots:
            raise RosterError(f"{sender} is not in the plan's roster")
        if sender in self._receiving:
            raise RosterError(f"{sender} pushes its span twice")
        if sender in self._chunks:
            return
        self._receiving.add(sender)
        began = time.perf_counter()
        chunks: list[bytes] = []
        leaves: list[bytes] = []
        norm = _Norm(self._codec)
        try:
            for size, values in zip(self.layout.sizes, self.layout.values, strict=True):
                chunks.append(await self._frame(stream, size))
                leaves.append(leaf_hash(chunks[-1]))
                norm.add(chunks[-1], values)
            self._seconds[sender] = time.perf_counter() - began
            self._keep(sender, chunks, leaves, norm, header.message)
        except CommitmentError as error:
            raise RefusedPush(error.message, chunks) from None
        finally:
            self._receiving.discard(sender)

    async def take(self, sender: str, chunks: list[bytes], header: pb.PushHeader) -> None:
        """As `receive`, of chunks that are here."""
        norm = _Norm(self._codec)
        for chunk, values in zip(chunks, self.layout.values, strict=True):
            norm.add(chunk, values)
            await asyncio.sleep(0)  # a thread would wait for the event loop with every operation: it has its turn here
        self._keep(sender, chunks, [leaf_hash(chunk) for chunk in chunks], norm, header)

    def _keep(
        self, sender: str, chunks: list[bytes], leaves: list[bytes], norm: "_Norm", header: pb.PushHeader
    ) -> None:
        """Check a sender's chunks against what it says it sends, and against its committed root, and keep them."""
        if merkle_root(leaves) != header.content:
            raise CommitmentError("the chunks are not those that the push's header announces")
        total = chunk_count(self.plan.message.values)
        check_range(self._roots[sender], total, self.layout.chunks, leaves, header.proof)
        norm_squared = norm.squared()
        if norm_squared > MAX_NORM_SQUARED:
            raise CommitmentError(f"{sender} contributes values so large that the step would overflow")
        self._norms[sender], self._chunks[sender] = norm_squared, chunks
        if len(self._chunks) == len(self._roots):
            self.all_complete.set()

    def report(self) -> pb.SenderReport:
        """Who is complete, with the exact squared norm of each one's span and the time it took, and who was refused."""
        complete = [
            pb.Complete(peer=peer, norm_squared=norm_bytes(self._norms[peer]), seconds=self._seconds.get(peer, 0.0))
            for peer in sorted(self._chunks)
        ]
        refused = [
            pb.Refused(peer=peer, reason=reason)
            for peer, reason in sorted(self._refused.items())
            if peer not in self._chunks
        ]
        return pb.SenderReport(plan=self.plan.digest, complete=complete, refused=refused)

    def refuse(self, sender: str, reason: str) -> None:
        """Note why a push was cut off: the last reason counts. Senders outside the roster have no place in a report."""
        if sender in self._roots:
            self._refused[sender] = reason[:MAX_REFUSED_REASON]

    def chunks_of(self, sender: str) -> list[bytes] | None:
        """A sender's chunks, if they are all here."""
        return self._chunks.get(sender)

    def has_all(self, seal: pb.Seal) -> bool:
        """Whether every sender that the seal names is complete here."""
        return all(sealed.peer in self._chunks for sealed in seal.contributors)

    def reduce(self, seal: pb.Seal, on_part: Callable[[bytes], None]) -> bytes:
        """The span's bytes, from the sealed senders' chunks, which `on_part` is given as they are made.

        `dots` is filled on the way (`SpanDots`).
        """
        evidence = SpanDots(len(seal.contributors))

        def on_chunk(decoded: list[Tensor], reduced: Tensor, encoded: bytes) -> None:
            on_part(encoded)
            evidence.add(decoded, reduced)

        data = reduce_span(self.plan.message, self.span, seal, self._chunks, on_chunk)
        self.dots = evidence.dots
        return data

    async def _frame(self, stream: Stream, size: int) -> bytes:
        chunk = await stream.receive(size, timeout=None)
        if len(chunk) != size:
            raise FrameError(f"a chunk of {len(chunk)} bytes where the plan says {size}")
        return chunk


class _Norm:
    """Squared norm of chunks, as they come. What the codec refuses is told at the end: the chunks are proof of it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._squared = 0
        self._fault: CommitmentError | None = None

    def add(self, chunk: bytes, values: int) -> None:
        if self._fault is None:
            try:
                self._squared += self._codec.norm_squared(chunk, values)
            except CommitmentError as error:
                self._fault = error

    def squared(self) -> int:
        """In units of 2^-298. CommitmentError if no encoder makes one of the chunks."""
        if self._fault is not None:
            raise self._fault
        return self._squared


def reduce_span(
    plan: pb.RoundPlan,
    span: int,
    seal: pb.Seal,
    chunks: Mapping[str, Sequence[bytes]],
    on_chunk: Callable[[list[Tensor], Tensor, bytes], None] | None = None,
) -> bytes:
    """A span's bytes: the plan's rule over the sealed senders' chunks (by peer id), encoded once.

    A canonical function of committed bytes: whoever has the chunks gets the same bytes. `on_chunk` is shown what the
    contributors have in each chunk, in the seal's order, the result, and its encoding.
    """
    codec, rule = get_codec(plan.codec), get_rule(plan.rule)
    coefficients = [fp32_from_bits(sealed.coefficient) for sealed in seal.contributors]
    values = SpanLayout.of(plan, span).values
    decoded: list[Tensor] = []

    def decode(index: int) -> list[Tensor]:
        nonlocal decoded
        decoded = [codec.decode(chunks[sealed.peer][index], values[index]) for sealed in seal.contributors]
        return decoded

    parts = []
    for reduced in rule.reduce(range(len(values)), decode, coefficients):
        parts.append(codec.encode(reduced))
        if on_chunk is not None:
            on_chunk(decoded, reduced, parts[-1])
    return b"".join(parts)
