"""Peers that are honest on the wire, and lie in what they compute, commit to and sign."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Self

import pytest
import torch

from hivegrpo.peer.swarm.auditor import Auditor
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.exchange import Exchange, Line, Span
from hivegrpo.peer.swarm.making import split_frames
from hivegrpo.peer.swarm.pulls import PullServer
from hivegrpo.peer.swarm.reducer import SpanReducer
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import receipt_of
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.envelope import Opened, open_signed, sign_payload
from hivegrpo.protocol.errors import StaleError
from hivegrpo.protocol.transport.base import Stream
from support.runs import IntegerLearner


class Fault(Enum):
    """What a liar does."""

    LYING_REDUCER = "signs and serves the same wrong span to all"
    EQUIVOCATING_REDUCER = "signs and serves another span to one peer than to the others"
    LYING_AUDITOR = "agrees with whatever it was served, without computing"
    FRAMING_AUDITOR = "disagrees with whatever it was served, and accuses its reducer with a proof that proves nothing"
    BAD_CHUNK = "commits to a chunk that the codec refuses, and sends it to all"
    COVERED_CHUNK = "the same, in the span that it reduces itself, and says that it is complete"
    BAD_HEADER = "signs for, and sends, other chunks than it committed to"
    WITHHOLDING = "answers no pull"


Faults = dict[str, Fault]
"""By peer id. Who is not in it is honest."""


@contextmanager
def liars(faults: Faults) -> Iterator[None]:
    """Have these peers, among all that run in this process, lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hivegrpo.peer.volunteer.Exchange", type("_", (LyingExchange,), {"faults": faults}))
        patch.setattr("hivegrpo.peer.daemon.Auditor", type("_", (LyingAuditor,), {"faults": faults}))
        patch.setattr("hivegrpo.peer.desk.EncodedVector", LyingVector)
        patch.setattr("hivegrpo.peer.swarm.exchange.PullServer", type("_", (SilentPulls,), {"faults": faults}))
        yield


def a_lie(data: bytes) -> bytes:
    """Other bytes that the codec decodes as well."""
    return data[:-1] + (b"\x01" if data[-1] != 1 else b"\x02")


def _unseen(_: bytes) -> None:
    """Nothing is sent before all of it is made."""


MARK = 4095.0
"""First value of a vector of which a chunk is to be spoilt."""


class SpoiltLearner(IntegerLearner):
    """Its contributions have a chunk that the codec refuses: the one with this index."""

    def __init__(self, values: int, chunk: int) -> None:
        super().__init__(values)
        self.chunk = chunk

    def _contribution(self, *arguments):  # type: ignore[no-untyped-def]
        learned = super()._contribution(*arguments)
        learned.vector[:2] = torch.tensor([MARK, float(self.chunk)])
        return learned


class LyingVector(EncodedVector):
    """Spoils what `SpoiltLearner` marked."""

    @classmethod
    def encode(cls, codec: Codec, vector: torch.Tensor) -> Self:
        encoded = super().encode(codec, vector)
        if float(vector[0]) != MARK:
            return encoded
        chunks = list(encoded.chunks)
        chunks[int(vector[1])] = b"\xff" + chunks[int(vector[1])][1:]  # a scale that stands for NaN
        return cls(tuple(chunks))


class LyingExchange(Exchange):
    """Lies as a reducer and as a sender."""

    faults: Faults = {}  # noqa: RUF012 - replaced in subclasses

    @property
    def fault(self) -> Fault | None:
        return self.faults.get(self._identity.peer_id)

    async def _reduce(self, reducer: SpanReducer, seal: Opened[pb.Seal], on_part: Callable[[bytes], None]) -> Span:
        if self.fault is Fault.COVERED_CHUNK:
            chunks = reducer._chunks[self._identity.peer_id]
            honest = [b"\x00" + chunk[1:] for chunk in chunks]
            reducer._chunks[self._identity.peer_id] = honest
            span = await super()._reduce(reducer, seal, on_part)
            reducer._chunks[self._identity.peer_id] = chunks
            return span
        if self.fault is Fault.LYING_REDUCER:
            span = await super()._reduce(reducer, seal, _unseen)
            return self._signed(reducer.span, seal, a_lie(span.data))
        return await super()._reduce(reducer, seal, on_part)

    async def serve_span(self, line: Line, index: int) -> bool:
        stream = line.stream
        others = sorted({c.peer for c in self.plan.message.contributors} - {self._identity.peer_id})
        mine = self.reducer is not None and index == self.reducer.span
        if self.fault is not Fault.EQUIVOCATING_REDUCER or not mine or stream.remote != others[0]:
            return await super().serve_span(line, index)
        async with self._changed:
            await self._changed.wait_for(lambda: index in self.spans)
        true = self.spans[index]
        seal = open_signed(true.receipt, self._run_id, pb.SpanReceipt).message.seal
        receipt = self._receipt(index, seal, a_lie(true.data))
        for frame in split_frames(a_lie(true.data)):
            await stream.send(frame)
        await stream.send(receipt.SerializeToString())
        return True

    async def _push_span(self, index: int) -> None:
        own = self.own
        if self.fault is Fault.BAD_HEADER:
            self.own = EncodedVector(tuple(map(a_lie, own.chunks)))
        elif self.fault is Fault.COVERED_CHUNK and self.reducer is not None and index == self.reducer.span:
            self.reducer._norms[self._identity.peer_id] = 1 << 298
            layout = self.reducer.layout.chunks
            self.reducer._chunks[self._identity.peer_id] = list(own.chunks[layout.start : layout.stop])
            return
        try:
            await super()._push_span(index)
        finally:
            self.own = own

    def _signed(self, index: int, seal: Opened[pb.Seal], data: bytes) -> Span:
        ref = blob_ref(data)
        return Span(self._receipt(index, seal.digest, data), pb.Blob(root=ref.root, size=ref.size), data)

    def _receipt(self, index: int, seal: bytes, data: bytes) -> pb.Signed:
        ref = blob_ref(data)
        payload = receipt_of(self.plan.digest, seal, index, pb.Blob(root=ref.root, size=ref.size))
        return sign_payload(self._identity, self._run_id, "SpanReceipt", payload)


class SilentPulls(PullServer):
    """Withholds."""

    faults: Faults = {}  # noqa: RUF012 - replaced in subclasses

    async def serve(self, stream: Stream, request: pb.PullRequest) -> None:
        if self.faults.get(self._identity.peer_id) is Fault.WITHHOLDING:
            raise StaleError("no")
        await super().serve(stream, request)


class LyingAuditor(Auditor):
    """Lies as an auditor."""

    faults: Faults = {}  # noqa: RUF012 - replaced in subclasses

    async def audit(self, exchange, seal, voted):  # type: ignore[no-untyped-def]
        fault = self.faults.get(self._identity.peer_id)
        if fault not in (Fault.LYING_AUDITOR, Fault.FRAMING_AUDITOR):
            await super().audit(exchange, seal, voted)
            return
        plan = exchange.plan
        for drawn in await self.drawn(plan.message, seal):
            if self._identity.peer_id in drawn.order:
                content = exchange.spans[drawn.span].content.root
                if fault is Fault.FRAMING_AUDITOR:
                    content = bytes(32)
                    await self._frame(exchange, seal, drawn.span)
                report = pb.AuditReport(plan=plan.digest, seal=seal.digest, span=drawn.span, content=content)
                await self._session.report(report, lambda: True)

    async def _frame(self, exchange: Exchange, seal: Opened[pb.Seal], span: int) -> None:
        fault = pb.WrongSpan(receipt=exchange.spans[span].receipt, first=exchange.plan.message.reducers[span].first)
        proof = pb.FaultProof(
            run=self._run, plan=exchange.plan.signed, seal=seal.signed, wrong_span=fault
        ).SerializeToString(deterministic=True)
        ref = self._accuser._store.add_bytes(proof)
        report = pb.FaultReport(plan=exchange.plan.digest, proof=pb.Blob(root=ref.root, size=ref.size))
        await self._session.report(report, lambda: True)
