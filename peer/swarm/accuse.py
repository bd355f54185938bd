"""Proofs of fault, built from what a peer has seen: signed bytes that contradict what their signer was committed to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.reducer import MAX_NORM_SQUARED, SpanLayout
from hivegrpo.peer.swarm.rules.registry import get_rule
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import PIECE_BYTES, blob_leaves, split_pieces
from hivegrpo.protocol.chunks import chunk_count
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.errors import CommitmentError
from hivegrpo.protocol.merkle import check_range, leaf_hash, merkle_root, narrow_proof, range_proof


@dataclass(frozen=True, slots=True)
class Sent:
    """A sender's chunks of a span, and what it signed of them."""

    header: Opened[pb.PushHeader]
    chunks: Sequence[bytes]


def prove_wrong_span(
    run: pb.Signed,
    plan: Opened[pb.RoundPlan],
    seal: Opened[pb.Seal],
    receipt: Opened[pb.SpanReceipt],
    span: bytes,
    computed: bytes,
    sent: Mapping[str, Sent],
) -> pb.FaultProof:
    """Against the reducer: `span`, which has the receipt's root, is not `computed` from the sealed senders' chunks."""
    layout = SpanLayout.of(plan.message, receipt.message.span)
    part = layout.chunks
    if get_rule(plan.message.rule).elementwise:
        part = next(one for one in map(_alone, part) if _cut(layout, one, span) != _cut(layout, one, computed))
    total = chunk_count(plan.message.values)
    pieces = pieces_of(layout, part)
    fault = pb.WrongSpan(
        receipt=receipt.signed,
        first=part.start,
        senders=[_shown(sent[sealed.peer], layout, part, total) for sealed in seal.message.contributors],
        first_piece=pieces.start,
        pieces=[bytes(piece) for piece in list(split_pieces(span))[pieces.start : pieces.stop]],
        proof=range_proof(blob_leaves(span), pieces),
    )
    return pb.FaultProof(run=run, plan=plan.signed, seal=seal.signed, wrong_span=fault)


def prove_two_receipts(run: pb.Signed, plan: pb.Signed, first: pb.Signed, second: pb.Signed) -> pb.FaultProof:
    """Against the reducer: it signed two contents of one span under one seal."""
    return pb.FaultProof(run=run, plan=plan, two_receipts=pb.TwoReceipts(first=first, second=second))


def prove_bad_push(run: pb.Signed, plan: Opened[pb.RoundPlan], sent: Sent) -> pb.FaultProof | None:
    """Against a sender whose chunks were refused; None if it has signed nothing that proves it.

    The header has to name the plan and a span of it.
    """
    header = sent.header.message
    layout = SpanLayout.of(plan.message, header.span)
    leaves = [leaf_hash(chunk) for chunk in sent.chunks]
    if merkle_root(leaves) != header.content or len(leaves) != len(layout.chunks):
        return None
    roots = {contributor.peer: contributor.root for contributor in plan.message.contributors}
    try:
        check_range(roots[sent.header.signer], chunk_count(plan.message.values), layout.chunks, leaves, header.proof)
    except CommitmentError:
        fault = pb.WrongPush(header=sent.header.signed, leaves=leaves)
        return pb.FaultProof(run=run, plan=plan.signed, wrong_push=fault)
    codec = get_codec(plan.message.codec)
    for index, (chunk, values) in enumerate(zip(sent.chunks, layout.values, strict=True)):
        if is_refused(codec, chunk, values):
            proof = range_proof(leaves, range(index, index + 1))
            wrong = pb.WrongChunk(
                contribution=sent.header.signed, index=layout.chunks.start + index, chunk=chunk, proof=proof
            )
            return pb.FaultProof(run=run, plan=plan.signed, wrong_chunk=wrong)
    return None


def is_refused(codec: Codec, chunk: bytes, values: int) -> bool:
    """Whether every peer refuses this chunk, and no honest one would make it."""
    try:
        return codec.norm_squared(chunk, values) > MAX_NORM_SQUARED
    except CommitmentError:
        return True


def pieces_of(layout: SpanLayout, part: range) -> range:
    """Pieces of the span, as of a blob, that hold the chunks `part` (counted in the vector)."""
    bounds = bytes_of(layout, part)
    return range(bounds.start // PIECE_BYTES, -(-bounds.stop // PIECE_BYTES))


def bytes_of(layout: SpanLayout, part: range) -> range:
    """Where the chunks `part` (counted in the vector) lie in the span's bytes."""
    start = part.start - layout.chunks.start
    low = sum(layout.sizes[:start])
    return range(low, low + sum(layout.sizes[start : start + len(part)]))


def _alone(chunk: int) -> range:
    return range(chunk, chunk + 1)


def _cut(layout: SpanLayout, part: range, span: bytes) -> bytes:
    bounds = bytes_of(layout, part)
    return span[bounds.start : bounds.stop]


def _shown(sent: Sent, layout: SpanLayout, part: range, total: int) -> pb.Shown:
    start = part.start - layout.chunks.start
    leaves = [leaf_hash(chunk) for chunk in sent.chunks]
    proof = narrow_proof(total, layout.chunks, leaves, sent.header.message.proof, part)
    return pb.Shown(chunks=sent.chunks[start : start + len(part)], proof=proof)
