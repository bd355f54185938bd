"""One sealed attempt, as signed messages over real chunks, and proofs of every kind of fault in it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from hivegrpo.peer.swarm.accuse import Sent, prove_bad_push, prove_two_receipts, prove_wrong_span
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.reducer import SpanLayout, reduce_span
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import receipt_of
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.chunks import chunk_count, chunk_values, split_evenly
from hivegrpo.protocol.coefficients import coefficients, norm_bytes
from hivegrpo.protocol.envelope import Opened, open_signed, run_id_of, sign, sign_payload
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.merkle import range_proof
from hivegrpo.protocol.scalars import StepScalars
from support.liars import a_lie
from support.runs import signed_run, small_config, vector_of

PEERS = 4
UNSEALED = 3
"""The peer (by its place) that is in the plan, and not in the seal."""


class Evidence:
    """Four peers, of whom two reduce and three are sealed. `spoilt`: chunks that one's encoder did not make."""

    def __init__(
        self, values: int = 40_000, spoilt: dict[tuple[int, int], bytes] | None = None, **sections: Any
    ) -> None:
        self.coordinator = Identity.generate()
        keys = sorted((Identity.generate() for _ in range(PEERS)), key=lambda key: key.peer_id)
        self.keys: list[Identity] = keys
        self.config = small_config(**sections)
        self.run = signed_run(self.coordinator, self.config, values)
        self.run_id = run_id_of(self.run.payload)
        self.values = sum(_size(tensor) for tensor in pb.RunManifest.FromString(self.run.payload).layout)
        codec = get_codec(self.config.averaging.codec)
        self.vectors = []
        for place in range(PEERS):
            chunks = list(EncodedVector.encode(codec, vector_of(place + 1, self.values)).chunks)
            for (peer, index), chunk in (spoilt or {}).items():
                if peer == place:
                    chunks[index] = chunk
            self.vectors.append(EncodedVector(tuple(chunks)))
        self.plan = self.make_plan([vector.root for vector in self.vectors])
        self.seal = self.make_seal()

    def opened(self, key: Identity, message: Any) -> Opened[Any]:
        return open_signed(sign(key, self.run_id, message), self.run_id, type(message))

    def make_plan(self, roots: Sequence[bytes], attempt: int = 1, rule: str = "") -> Opened[pb.RoundPlan]:
        spans = split_evenly(chunk_count(self.values), 2)
        scalars = StepScalars.for_step(
            1, learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0
        ).to_bits()
        named = self.config.averaging.rule
        plan = pb.RoundPlan(
            version=1,
            parent=bytes(32),
            attempt=attempt,
            codec=self.config.averaging.codec,
            rule=rule or ("clip" if named == "auto" else named),
            values=self.values,
            contributors=[
                pb.Contributor(peer=key.peer_id, lease=place + 1, weight=place + 1, root=root)
                for place, (key, root) in enumerate(zip(self.keys, roots, strict=True))
            ],
            reducers=[
                pb.Reducer(peer=key.peer_id, first=span.start, chunks=len(span))
                for key, span in zip(self.keys, spans, strict=False)
            ],
            scalars=scalars,
            exchange_seconds=1.0,
            step_seconds=1.0,
            audit_seconds=1.0,
        )
        return self.opened(self.coordinator, plan)

    def make_seal(self, plan: Opened[pb.RoundPlan] | None = None, *, unit: int = 1 << 298) -> Opened[pb.Seal]:
        plan = plan or self.plan
        sealed = [one for place, one in enumerate(plan.message.contributors) if place != UNSEALED]
        norms = [unit] * len(sealed)
        bits = coefficients(plan.message.rule, [one.weight for one in sealed], norms)
        seal = pb.Seal(
            plan=plan.digest,
            contributors=[
                pb.Sealed(peer=one.peer, coefficient=coefficient, norm_squared=norm_bytes(norm))
                for one, coefficient, norm in zip(sealed, bits, norms, strict=True)
            ],
        )
        return self.opened(self.coordinator, seal)

    def peer(self, place: int) -> str:
        return self.keys[place].peer_id

    def sent(self, span: int) -> dict[str, Sent]:
        """What an auditor of a span has pulled."""
        return {key.peer_id: self.push(place, span) for place, key in enumerate(self.keys)}

    def push(self, place: int, span: int, vector: EncodedVector | None = None) -> Sent:
        vector = vector or self.vectors[place]
        run = SpanLayout.of(self.plan.message, span).chunks
        header = vector.header(self.plan.digest, span, run)
        return Sent(self.opened(self.keys[place], header), vector.chunks[run.start : run.stop])

    @cached_property
    def spans(self) -> list[bytes]:
        """As honest reducers have them."""
        return [self.compute(span) for span in range(2)]

    def compute(self, span: int) -> bytes:
        chunks = {peer: item.chunks for peer, item in self.sent(span).items()}
        return reduce_span(self.plan.message, span, self.seal.message, chunks)

    def receipt(
        self, span: int, data: bytes, key: Identity | None = None, seal: bytes = b"", size: int | None = None
    ) -> Opened[pb.SpanReceipt]:
        ref = blob_ref(data)
        content = pb.Blob(root=ref.root, size=ref.size if size is None else size)
        payload = receipt_of(self.plan.digest, seal or self.seal.digest, span, content)
        signed = sign_payload(key or self.keys[span], self.run_id, "SpanReceipt", payload)
        return open_signed(signed, self.run_id, pb.SpanReceipt)

    def audit(self, place: int, span: int, content: bytes) -> pb.Signed:
        report = pb.AuditReport(plan=self.plan.digest, seal=self.seal.digest, span=span, content=content)
        return sign(self.keys[place], self.run_id, report)

    def wrong_span(self, span: int = 0, lie: bytes | None = None) -> pb.FaultProof:
        """Against the span's reducer, which served `lie`."""
        true = self.spans[span]
        wrong = lie or a_lie(true)
        receipt = self.receipt(span, wrong)
        return prove_wrong_span(self.run, self.plan, self.seal, receipt, wrong, true, self.sent(span))

    def accuse_honest_span(self, span: int = 0) -> pb.FaultProof:
        """The same against a reducer that did nothing wrong."""
        true = self.spans[span]
        receipt = self.receipt(span, true)
        return prove_wrong_span(self.run, self.plan, self.seal, receipt, true, a_lie(true), self.sent(span))

    def covered_span(self, auditor: int = 3) -> pb.FaultProof:
        """With an auditor that agreed."""
        proof = self.wrong_span()
        proof.wrong_span.audit.CopyFrom(self.audit(auditor, 0, blob_ref(a_lie(self.spans[0])).root))
        return proof

    def two_receipts(self) -> pb.FaultProof:
        """Against reducer 0."""
        first, second = self.receipt(0, b"one"), self.receipt(0, b"two")
        return prove_two_receipts(self.run, self.plan.signed, first.signed, second.signed)

    def wrong_push(self) -> pb.FaultProof:
        """Against peer 3, which sends other chunks than it committed to."""
        lie = EncodedVector(tuple(map(a_lie, self.vectors[3].chunks)))
        proof = prove_bad_push(self.run, self.plan, self.push(3, 1, lie))
        assert proof is not None
        return proof

    def wrong_chunk(self, place: int, index: int) -> pb.FaultProof:
        """By what it committed to with its contribution."""
        vector = self.vectors[place]
        contribution = pb.Contribution(lease=place + 1, used=[0], weight=1, root=vector.root)
        fault = pb.WrongChunk(
            contribution=sign(self.keys[place], self.run_id, contribution),
            index=index,
            chunk=vector.chunks[index],
            proof=range_proof(vector.leaves, range(index, index + 1)),
        )
        return pb.FaultProof(run=self.run, wrong_chunk=fault)


def refused_chunk(values: int, index: int) -> bytes:
    """Bytes of the right size that mxint8 refuses: a scale that stands for NaN."""
    return b"\xff" * get_codec("mxint8").encoded_size(chunk_values(values, index))


def _size(tensor: pb.Tensor) -> int:
    size = 1
    for length in tensor.shape:
        size *= length
    return size
