"""One reducer's span: take in every sender's chunks, check them, and reduce those that the seal names."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.evidence import SpanDots
from hivegrpo.peer.swarm.rules.registry import get_rule
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import MAX_REFUSED_REASON
from hivegrpo.protocol.chunks import chunk_count, chunk_values, equal_parts, runs
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

    def frames(self) -> Iterator[tuple[range, int]]:
        """The frames in which a sender's chunks travel: which chunks, counted in the span, and how many bytes."""
        return ((run, len(run) * self.sizes[run.start]) for run in runs(self.values))

    def pack(self, chunks: Sequence[bytes]) -> list[bytes]:
        """A sender's chunks, in frames."""
        return [b"".join(chunks[run.start : run.stop]) for run, _ in self.frames()]


class SpanReducer:
    """Buffers one span of one plan.

    Memory is bounded by roster x span, and a frame for each sender: nothing else is ever kept.
    """

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
        taken = _Taken(self._codec)
        try:
            for run, size in self.layout.frames():
                taken.add(await receive_frame(stream, size, None), self.layout.values[run.start], len(run))
            self._seconds[sender] = time.perf_counter() - began
            self._keep(sender, taken, header.message)
        except CommitmentError as error:
            raise RefusedPush(error.message, taken.chunks) from None
        finally:
            self._receiving.discard(sender)

    async def take(self, sender: str, chunks: list[bytes], header: pb.PushHeader) -> None:
        """As `receive`, of chunks that are here."""
        taken = _Taken(self._codec)
        for (run, _), frame in zip(self.layout.frames(), self.layout.pack(chunks), strict=True):
            taken.add(frame, self.layout.values[run.start], len(run))
            await asyncio.sleep(0)  # a thread would wait for the event loop with every operation: it has its turn here
        self._keep(sender, taken, header)

    def _keep(self, sender: str, taken: "_Taken", header: pb.PushHeader) -> None:
        """Check a sender's chunks against what it says it sends, and against its committed root, and keep them."""
        if merkle_root(taken.leaves) != header.content:
            raise CommitmentError("the chunks are not those that the push's header announces")
        total = chunk_count(self.plan.message.values)
        check_range(self._roots[sender], total, self.layout.chunks, taken.leaves, header.proof)
        norm_squared = taken.norm_squared()
        if norm_squared > MAX_NORM_SQUARED:
            raise CommitmentError(f"{sender} contributes values so large that the step would overflow")
        self._norms[sender], self._chunks[sender] = norm_squared, taken.chunks
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

        def on_run(decoded: list[Tensor], reduced: Tensor, encoded: bytes) -> None:
            on_part(encoded)
            evidence.add(decoded, reduced)

        data = reduce_span(self.plan.message, self.span, seal, self._chunks, on_run, taken=True)
        self.dots = evidence.dots
        return data


async def receive_frame(stream: Stream, size: int, timeout: float | None = 30.0) -> bytes:
    """A frame of chunks, which has this size; FrameError if it has not. The timeout as in `Stream.receive`."""
    frame = await stream.receive(size, timeout)
    if len(frame) != size:
        raise FrameError(f"a frame of chunks with {len(frame)} bytes, where the plan says {size}")
    return frame


class _Taken:
    """A sender's chunks as they come, their leaf hashes, and their squared norm.

    What the codec refuses is told at the end: the chunks are proof of it.
    """

    def __init__(self, codec: Codec) -> None:
        self.chunks: list[bytes] = []
        self.leaves: list[bytes] = []
        self._codec = codec
        self._squared = 0
        self._fault: CommitmentError | None = None

    def add(self, frame: bytes, values: int, count: int) -> None:
        """The next `count` chunks, of `values` values each."""
        chunks = equal_parts(frame, count)
        self.chunks += chunks
        self.leaves += map(leaf_hash, chunks)
        if self._fault is None:
            try:
                self._squared += self._codec.norm_squared(frame, values, count)
            except CommitmentError as error:
                self._fault = error

    def norm_squared(self) -> int:
        """In units of 2^-298. CommitmentError if no encoder makes one of the chunks."""
        if self._fault is not None:
            raise self._fault
        return self._squared


def reduce_span(
    plan: pb.RoundPlan,
    span: int,
    seal: pb.Seal,
    chunks: Mapping[str, Sequence[bytes]],
    on_part: Callable[[list[Tensor], Tensor, bytes], None] | None = None,
    *,
    taken: bool = False,
) -> bytes:
    """A span's bytes: the plan's rule over the sealed senders' chunks (by peer id), encoded once.

    A canonical function of committed bytes: whoever has the chunks gets the same bytes. `on_part` is shown what the
    contributors have in each run of chunks, in the seal's order, the result, and its encoding. `taken`: the codec has
    taken all of the chunks before.
    """
    codec, rule = get_codec(plan.codec), get_rule(plan.rule)
    coefficients = [fp32_from_bits(sealed.coefficient) for sealed in seal.contributors]
    values = SpanLayout.of(plan, span).values
    parts = list(runs(values, rule.most_chunks))
    decode_run = codec.decode_again if taken else codec.decode
    decoded: list[Tensor] = []

    def decode(part: int) -> list[Tensor]:
        nonlocal decoded
        run = parts[part]
        decoded = [
            decode_run(b"".join(chunks[sealed.peer][run.start : run.stop]), values[run.start], len(run))
            for sealed in seal.contributors
        ]
        return decoded

    encoded = []
    for run, reduced in zip(parts, rule.reduce(range(len(parts)), decode, coefficients), strict=True):
        encoded.append(codec.encode(reduced, len(run)))
        if on_part is not None:
            on_part(decoded, reduced, encoded[-1])
    return b"".join(encoded)
