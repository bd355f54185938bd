"""Judging proofs of fault, offline, from nothing but their own bytes.

What a judgement rests on. Honest peers sign nothing but what follows, so no proof, whoever made it and whatever else
the coordinator signed, can make one of them guilty:

- a receipt for the rule's own result over chunks that belong to the plan's roots and that the codec takes, one a seal;
- a push's header whose content belongs to the root that the plan has for its signer;
- a contribution, or a header, over chunks that an encoder made of moderate values;
- an audit report for a content that it has computed.

A chunk that the codec refuses says nothing about the reducer: inside a wrong span it makes the proof void.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from hivegrpo.peer.floats import NonFiniteError
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.peer.swarm.accuse import bytes_of, is_refused, pieces_of
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.reducer import SpanLayout
from hivegrpo.peer.swarm.rules.registry import get_rule
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.checks import check_digest, check_plan, check_seal
from hivegrpo.protocol.chunks import chunk_count, chunk_values
from hivegrpo.protocol.coefficients import planned_rule
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import Opened, open_run, open_signed, parse, run_id_of
from hivegrpo.protocol.errors import (
    ChainError,
    CommitmentError,
    ConfigError,
    FrameError,
    MismatchError,
    SignatureError,
    StaleError,
)
from hivegrpo.protocol.merkle import check_range, leaf_hash, merkle_root
from hivegrpo.protocol.scalars import fp32_from_bits

Guilty = tuple[str, str]
"""A peer, and what it did."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a proof shows. `version`, `attempt` and `span` are None where the fault is none of a plan's, or a span's."""

    run_id: str
    run: str
    """The run's name."""
    coordinator: str
    guilty: list[Guilty]
    version: int | None = None
    attempt: int | None = None
    span: int | None = None


def judge(proof: bytes, run_id: str | None = None) -> list[Guilty]:
    """Who is guilty, and why. WireError if the proof shows nothing, or is of another run than `run_id`."""
    return examine(proof, run_id).guilty


def parse_proof(proof: bytes) -> pb.FaultProof:
    """FrameError if these are not the bytes of a proof, or hold more than one."""
    if len(proof) > MAX_PROOF_BYTES:
        raise FrameError(f"a proof of {len(proof)} bytes; at most {MAX_PROOF_BYTES} are taken")
    message = parse(pb.FaultProof, proof)
    message.DiscardUnknownFields()
    if message.ByteSize() != len(proof) or message.WhichOneof("fault") is None:
        raise FrameError("not a FaultProof, or one with something else in it")
    return message


def examine(proof: bytes, run_id: str | None = None) -> Finding:
    """As `judge`, with where it was."""
    message = parse_proof(proof)
    case = _Case.of(message)
    if run_id not in (None, case.run_id):
        raise StaleError(f"a proof of run {case.run_id[:16]}")
    examiners: dict[str, Callable[[_Case], Finding]] = {
        "wrong_span": _wrong_span,
        "two_receipts": _two_receipts,
        "wrong_push": _wrong_push,
        "wrong_chunk": _wrong_chunk,
    }
    kind = message.WhichOneof("fault")
    assert kind is not None
    try:
        return examiners[kind](case)
    except NonFiniteError as error:
        raise CommitmentError(f"the rule has no result here: {error.message}") from None


@dataclass(frozen=True, slots=True)
class _Case:
    """The run of a proof, and what its other parts are checked with."""

    message: pb.FaultProof
    chain: Chain
    """Of the run, with no version in it."""
    config: RunConfig
    codec: Codec

    @property
    def run(self) -> Opened[pb.RunManifest]:
        return self.chain.manifest

    @classmethod
    def of(cls, message: pb.FaultProof) -> "_Case":
        run = open_run(message.run, message.run.signer)
        try:
            chain = Chain(message.run, successions=message.successions)
        except ChainError as error:
            raise CommitmentError(error.message) from None
        if run.message.digests["known_answer"] != _known_answer():
            raise CommitmentError("this installation computes other numbers than the run: use the run's version")
        try:
            config = RunConfig.from_json(run.message.config)
            return cls(message, chain, config, get_codec(config.averaging.codec))
        except (MismatchError, ConfigError) as error:
            raise CommitmentError(f"this installation does not know the run's terms: {error}") from None

    @property
    def run_id(self) -> str:
        return run_id_of(self.run.signed.payload)

    @property
    def values(self) -> int:
        """Length of the vector, from the run's layout."""
        total = 0
        for tensor in self.run.message.layout:
            size = 1
            for length in tensor.shape:
                size *= length
            total += size
        return total

    def plan(self) -> Opened[pb.RoundPlan]:
        """The plan, if the coordinator signed it, and an honest peer would take part in it."""
        version = parse(pb.RoundPlan, self.message.plan.payload).version
        plan = open_signed(self.message.plan, self.run_id, pb.RoundPlan, signer=self.chain.signer_of(version))
        check_plan(plan.message)
        averaging = self.config.averaging
        terms = (averaging.codec, planned_rule(averaging.rule, len(plan.message.contributors)), self.values)
        if (plan.message.codec, plan.message.rule, plan.message.values) != terms:
            raise CommitmentError("the plan has other terms than the run")
        return plan

    def seal(self, plan: Opened[pb.RoundPlan]) -> Opened[pb.Seal]:
        """The seal of that plan."""
        signer = self.chain.signer_of(plan.message.version)
        seal = open_signed(self.message.seal, self.run_id, pb.Seal, signer=signer)
        if seal.message.plan != plan.digest:
            raise CommitmentError("the seal is of another plan")
        check_seal(seal.message, plan.message)
        return seal

    def receipt(self, signed: pb.Signed, plan: Opened[pb.RoundPlan]) -> Opened[pb.SpanReceipt]:
        """A receipt for a span of that plan, by its reducer."""
        receipt = open_signed(signed, self.run_id, pb.SpanReceipt)
        span = _span_of(receipt.message, plan)
        if receipt.signer != plan.message.reducers[span].peer:
            raise SignatureError("a receipt by somebody who does not reduce the span")
        check_digest(receipt.message.content.root, "the receipt's root")
        return receipt

    def header(self, signed: pb.Signed, plan: Opened[pb.RoundPlan]) -> Opened[pb.PushHeader]:
        """What a contributor of that plan signed of the chunks that it sends."""
        header = open_signed(signed, self.run_id, pb.PushHeader)
        _span_of(header.message, plan)
        if header.signer not in _roots(plan.message):
            raise SignatureError("a push by somebody who is not in the plan")
        return header

    def found(self, guilty: list[Guilty], plan: pb.RoundPlan | None = None, span: int | None = None) -> Finding:
        version, attempt = (plan.version, plan.attempt) if plan is not None else (None, None)
        name, coordinator = self.config.run.name, self.run.message.coordinator
        return Finding(self.run_id, name, coordinator, guilty, version, attempt, span)


def _wrong_span(case: _Case) -> Finding:
    fault = case.message.wrong_span
    plan = case.plan()
    seal = case.seal(plan)
    receipt = case.receipt(fault.receipt, plan)
    if receipt.message.seal != seal.digest:
        raise CommitmentError("the receipt is of another seal")
    index, content = receipt.message.span, receipt.message.content
    layout = SpanLayout.of(plan.message, index)
    place = _place(plan.message, index)
    if content.size != layout.size:
        if fault.HasField("audit"):
            raise CommitmentError("an auditor agrees with a root, and not with a size")
        reason = f"signed a receipt for {content.size} bytes of {place}, which has {layout.size}"
        return case.found([(receipt.signer, reason)], plan.message, index)
    elementwise = get_rule(plan.message.rule).elementwise
    part = range(fault.first, fault.first + 1) if elementwise else layout.chunks
    if part.start != fault.first or part.start < layout.chunks.start or part.stop > layout.chunks.stop:
        raise FrameError("the chunks shown are not those of the span")
    if _shown_result(case.codec, fault, plan.message, seal.message, part) == _signed_bytes(
        fault, layout, part, content
    ):
        raise CommitmentError("the span is what its rule gives")
    guilty = [(receipt.signer, f"signed {place} with bytes that the rule does not give for the sealed chunks")]
    if fault.HasField("audit"):
        audit = open_signed(fault.audit, case.run_id, pb.AuditReport)
        signed = (audit.message.plan, audit.message.seal, audit.message.span, audit.message.content)
        if signed != (plan.digest, seal.digest, index, content.root) or audit.signer not in _roots(plan.message):
            raise CommitmentError("the audit report is of something else, or by somebody else")
        guilty.append((audit.signer, f"signed, as its auditor, that {place} is what the rule gives"))
    return case.found(guilty, plan.message, index)


def _shown_result(codec: Codec, fault: pb.WrongSpan, plan: pb.RoundPlan, seal: pb.Seal, part: range) -> bytes:
    """The bytes that the rule gives for the chunks `part`, from the senders' committed chunks."""
    if len(fault.senders) != len(seal.contributors):
        raise FrameError("a wrong span shows the chunks of each sealed contributor")
    roots, total = _roots(plan), chunk_count(plan.values)
    values = [chunk_values(plan.values, chunk) for chunk in part]
    for sealed, shown in zip(seal.contributors, fault.senders, strict=True):
        check_range(roots[sealed.peer], total, part, [leaf_hash(chunk) for chunk in shown.chunks], shown.proof)

    def decode(index: int) -> list[Tensor]:
        return [codec.decode(shown.chunks[index], values[index]) for shown in fault.senders]

    coefficients = [fp32_from_bits(sealed.coefficient) for sealed in seal.contributors]
    return b"".join(map(codec.encode, get_rule(plan.rule).reduce(range(len(part)), decode, coefficients)))


def _signed_bytes(fault: pb.WrongSpan, layout: SpanLayout, part: range, content: pb.Blob) -> bytes:
    """The bytes of the chunks `part` in the span that the receipt names."""
    ref, pieces, bounds = BlobRef(content.root, content.size), pieces_of(layout, part), bytes_of(layout, part)
    sizes = [ref.piece_size(piece) for piece in pieces]
    if fault.first_piece != pieces.start or [len(piece) for piece in fault.pieces] != sizes:
        raise FrameError("the pieces shown are not those that hold the chunks' result")
    check_range(ref.root, ref.pieces, pieces, [leaf_hash(piece) for piece in fault.pieces], fault.proof)
    start = pieces.start * PIECE_BYTES
    return b"".join(fault.pieces)[bounds.start - start : bounds.stop - start]


def _two_receipts(case: _Case) -> Finding:
    fault = case.message.two_receipts
    plan = case.plan()
    first, second = case.receipt(fault.first, plan), case.receipt(fault.second, plan)
    span = first.message.span
    if (first.message.seal, span) != (second.message.seal, second.message.span):
        raise CommitmentError("the receipts are of different seals or spans")
    if first.message.content == second.message.content:
        raise CommitmentError("both receipts name the same content")
    return case.found([(first.signer, f"signed two contents of {_place(plan.message, span)}")], plan.message, span)


def _wrong_push(case: _Case) -> Finding:
    fault = case.message.wrong_push
    plan = case.plan()
    header = case.header(fault.header, plan)
    chunks = SpanLayout.of(plan.message, header.message.span).chunks
    if len(fault.leaves) != len(chunks) or merkle_root(list(fault.leaves)) != header.message.content:
        raise CommitmentError("the leaf hashes are not those of the content that the header names")
    root, total = _roots(plan.message)[header.signer], chunk_count(plan.message.values)
    try:
        check_range(root, total, chunks, fault.leaves, header.message.proof)
    except CommitmentError:
        reason = f"signed chunks for {_place(plan.message, header.message.span)} that are not those it committed to"
        return case.found([(header.signer, reason)], plan.message, header.message.span)
    raise CommitmentError("the chunks are those that the sender committed to")


def _wrong_chunk(case: _Case) -> Finding:
    """The commitment is a Contribution, or the header of a push; the proof leads up to its root, or its content."""
    fault = case.message.wrong_chunk
    plan, span = None, None
    if fault.contribution.type == "PushHeader":
        opened_plan = case.plan()
        header = case.header(fault.contribution, opened_plan)
        signer, root, span, plan = header.signer, header.message.content, header.message.span, opened_plan.message
        chunks = SpanLayout.of(plan, span).chunks
    else:
        opened = open_signed(fault.contribution, case.run_id, pb.Contribution)
        signer, root, chunks = opened.signer, opened.message.root, range(chunk_count(case.values))
    if fault.index not in chunks:
        raise FrameError("the signer has committed to no such chunk")
    at = fault.index - chunks.start
    check_range(root, len(chunks), range(at, at + 1), [leaf_hash(fault.chunk)], fault.proof)
    if not is_refused(case.codec, fault.chunk, chunk_values(case.values, fault.index)):
        raise CommitmentError("the chunk is one that peers take")
    reason = f"committed to bytes for chunk {fault.index} that no encoder makes"
    return case.found([(signer, reason)], plan, span)


def _span_of(message: pb.SpanReceipt | pb.PushHeader, plan: Opened[pb.RoundPlan]) -> int:
    if message.plan != plan.digest or message.span >= len(plan.message.reducers):
        raise CommitmentError(f"the {type(message).__name__} is of another plan, or of no span of it")
    return message.span


def _place(plan: pb.RoundPlan, span: int) -> str:
    return f"span {span} of version {plan.version}, attempt {plan.attempt}"


def _roots(plan: pb.RoundPlan) -> dict[str, bytes]:
    return {contributor.peer: contributor.root for contributor in plan.contributors}


@lru_cache(maxsize=1)
def _known_answer() -> bytes:
    return bytes.fromhex(check_numerics())
