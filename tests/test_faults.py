"""Proofs of fault convict who is at fault, and no construction of one convicts anybody else."""

import random
from collections.abc import Callable, Iterator, Sequence

import pytest
from support.evidence import Evidence, refused_chunk
from support.liars import a_lie
from torch import Tensor

from hivegrpo.peer.swarm import faults
from hivegrpo.peer.swarm.accuse import prove_bad_push
from hivegrpo.peer.swarm.faults import examine, judge
from hivegrpo.peer.swarm.rules.base import Decode, Rule
from hivegrpo.peer.swarm.rules.registry import RULES
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.envelope import sign
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.merkle import range_proof

CASE = Evidence()
BAD_INDEX = 1
SPOILT = Evidence(spoilt={(2, BAD_INDEX): refused_chunk(40_000, BAD_INDEX)})
"""Its peer 2 has committed to a chunk that no encoder makes."""


def data(proof: pb.FaultProof) -> bytes:
    return proof.SerializeToString(deterministic=True)


def guilty(proof: pb.FaultProof) -> list[str]:
    return [peer for peer, _ in judge(data(proof))]


def bad_push_of_spoilt() -> pb.FaultProof:
    proof = prove_bad_push(SPOILT.run, SPOILT.plan, SPOILT.push(2, 0))
    assert proof is not None
    return proof


VALID: dict[str, tuple[Callable[[], pb.FaultProof], list[str]]] = {
    "wrong span": (CASE.wrong_span, [CASE.peer(0)]),
    "covered span": (CASE.covered_span, [CASE.peer(0), CASE.peer(3)]),
    "size": (lambda: with_size(CASE.wrong_span()), [CASE.peer(0)]),
    "two receipts": (CASE.two_receipts, [CASE.peer(0)]),
    "wrong push": (CASE.wrong_push, [CASE.peer(3)]),
    "wrong chunk by header": (bad_push_of_spoilt, [SPOILT.peer(2)]),
    "wrong chunk by contribution": (lambda: SPOILT.wrong_chunk(2, BAD_INDEX), [SPOILT.peer(2)]),
}


def with_size(proof: pb.FaultProof) -> pb.FaultProof:
    """The true root, and a wrong size beside it."""
    proof.wrong_span.receipt.CopyFrom(CASE.receipt(0, CASE.spans[0], size=7).signed)
    return proof


@pytest.mark.parametrize(("make", "expected"), VALID.values(), ids=VALID)
def test_a_proof_convicts_who_signed_it(make: Callable[[], pb.FaultProof], expected: list[str]) -> None:
    proof = make()
    assert guilty(proof) == expected
    run = CASE.run_id if proof.run == CASE.run else SPOILT.run_id
    assert [peer for peer, _ in judge(data(proof), run)] == expected
    with pytest.raises(WireError, match="of run"):
        judge(data(proof), "0" * 64)


def test_a_finding_says_where_it_was() -> None:
    finding = examine(data(CASE.wrong_span(1)))
    assert (finding.run_id, finding.coordinator) == (CASE.run_id, CASE.coordinator.peer_id)
    assert (finding.run, finding.version, finding.attempt, finding.span) == ("test", 1, 1, 1)


@pytest.fixture(scope="module")
def large() -> Evidence:
    return Evidence(values=140 * 16_384)


@pytest.mark.parametrize("chunk", [0, 61, 62, 69])
def test_a_chunk_anywhere_in_a_span_of_several_pieces(large: Evidence, chunk: int) -> None:
    # Two spans of 70 chunks of 16,896 bytes, each in two pieces of 1 MiB; chunk 62 lies in both.
    case = large
    true = case.spans[1]
    size = 16_896
    wrong = true[: (chunk + 1) * size - 1] + (b"\x01" if true[(chunk + 1) * size - 1] != 1 else b"\x02")
    wrong += true[(chunk + 1) * size :]
    proof = case.wrong_span(1, wrong)
    assert proof.wrong_span.first == 70 + chunk
    assert len(proof.wrong_span.pieces) == (2 if chunk == 62 else 1)
    assert guilty(proof) == [case.peer(1)]


class Whole(Rule):
    """Each chunk of the result depends on all chunks of the span."""

    name = "centered_clip"
    version = 0
    elementwise = False

    def reduce(self, chunks: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        first = [float(item[0]) for item in decode(chunks[-1])]
        for index in chunks:
            yield decode(index)[0] * (1.0 + first[0])


def test_a_rule_that_looks_at_the_whole_span_needs_all_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "centered_clip", Whole())
    case = Evidence(averaging={"rule": "centered_clip"})
    proof = case.wrong_span()
    assert [len(shown.chunks) for shown in proof.wrong_span.senders] == [2, 2, 2]
    assert guilty(proof) == [case.peer(0)]
    with pytest.raises(WireError, match="is what its rule gives"):
        guilty(case.accuse_honest_span())
    for shown in proof.wrong_span.senders:
        del shown.chunks[1:]
    with pytest.raises(WireError):
        guilty(proof)


def changed(make: Callable[[], pb.FaultProof], change: Callable[[pb.FaultProof], None]) -> pb.FaultProof:
    proof = make()
    change(proof)
    return proof


def framings() -> Iterator[tuple[str, Callable[[], pb.FaultProof]]]:
    """Attempts to make somebody guilty who is not, or who this proof does not show to be."""
    case, stranger = CASE, Identity.generate()

    def span(change: Callable[[pb.WrongSpan], None]) -> Callable[[], pb.FaultProof]:
        return lambda: changed(case.wrong_span, lambda proof: change(proof.wrong_span))

    yield "an honest span", case.accuse_honest_span

    def other_roots() -> pb.FaultProof:
        # The coordinator itself signs a plan with another root for peer 0, and a seal and a receipt to go with it.
        other = Evidence.__new__(Evidence)
        other.__dict__.update(case.__dict__)
        other.__dict__.pop("spans", None)
        other.plan = case.make_plan([bytes(32), *(vector.root for vector in case.vectors[1:])])
        other.seal = other.make_seal()
        true = case.spans[0]
        proof = case.wrong_span()
        proof.plan.CopyFrom(other.plan.signed)
        proof.seal.CopyFrom(other.seal.signed)
        proof.wrong_span.receipt.CopyFrom(other.receipt(0, true).signed)
        return proof

    yield "a plan with wrong roots", other_roots

    def swap(fault: pb.WrongSpan) -> None:
        first, second = pb.Shown(), pb.Shown()
        first.CopyFrom(fault.senders[0])
        second.CopyFrom(fault.senders[1])
        fault.senders[0].CopyFrom(second)
        fault.senders[1].CopyFrom(first)

    yield "chunks of another contributor", span(swap)
    yield "a sender is missing", span(lambda fault: fault.senders.__delitem__(2))
    yield "a sender too many", span(lambda fault: fault.senders.append(fault.senders[0]))
    yield "a sender without chunks", span(lambda fault: fault.senders[0].ClearField("chunks"))
    yield (
        "a sender's chunk was changed",
        span(lambda fault: fault.senders[0].chunks.__setitem__(0, a_lie(fault.senders[0].chunks[0]))),
    )
    yield "another chunk of the span", span(lambda fault: setattr(fault, "first", fault.first ^ 1))
    yield "a chunk outside the span", span(lambda fault: setattr(fault, "first", 2))
    yield "a chunk outside the vector", span(lambda fault: setattr(fault, "first", 99))
    yield "another piece", span(lambda fault: setattr(fault, "first_piece", 1))
    yield "a piece that was changed", span(lambda fault: fault.pieces.__setitem__(0, a_lie(fault.pieces[0])))
    yield "a piece that is cut", span(lambda fault: fault.pieces.__setitem__(0, fault.pieces[0][:-1]))
    yield (
        "a receipt of another seal",
        span(lambda fault: fault.receipt.CopyFrom(case.receipt(0, a_lie(case.spans[0]), seal=b"s" * 32).signed)),
    )
    yield (
        "a receipt by somebody else",
        span(lambda fault: fault.receipt.CopyFrom(case.receipt(0, a_lie(case.spans[0]), key=case.keys[3]).signed)),
    )
    yield (
        "the receipt of another span",
        span(lambda fault: fault.receipt.CopyFrom(case.receipt(1, a_lie(case.spans[1])).signed)),
    )
    yield "an audit that disagreed", span(lambda fault: fault.audit.CopyFrom(case.audit(3, 0, b"x" * 32)))
    yield "an audit that had no chunks", span(lambda fault: fault.audit.CopyFrom(case.audit(3, 0, b"")))
    wrong = blob_ref(a_lie(case.spans[0])).root
    yield "an audit of another span", span(lambda fault: fault.audit.CopyFrom(case.audit(3, 1, wrong)))
    report = pb.AuditReport(plan=case.plan.digest, seal=case.seal.digest, span=0, content=wrong)
    yield "an audit by a stranger", span(lambda fault: fault.audit.CopyFrom(sign(stranger, case.run_id, report)))
    honest = blob_ref(case.spans[0]).root
    yield (
        "an honest audit beside a wrong size",
        lambda: changed(
            lambda: with_size(case.wrong_span()),
            lambda proof: proof.wrong_span.audit.CopyFrom(case.audit(3, 0, honest)),
        ),
    )

    def undecodable() -> pb.FaultProof:
        # Peer 2 committed to a chunk that the codec refuses; whoever reduced it signed something.
        bad = SPOILT
        sound = Evidence.__new__(Evidence)
        sound.__dict__.update(bad.__dict__)
        sound.vectors = [*bad.vectors[:2], bad.vectors[3], bad.vectors[3]]
        some = sound.compute(0)
        receipt = bad.receipt(0, some)
        proof = case.wrong_span()
        for sender, place in zip(proof.wrong_span.senders, range(3), strict=True):
            vector = bad.vectors[place]
            sender.chunks[:] = [vector.chunks[BAD_INDEX]]
            sender.proof[:] = range_proof(vector.leaves, range(BAD_INDEX, BAD_INDEX + 1))
        proof.run.CopyFrom(bad.run)
        proof.plan.CopyFrom(bad.plan.signed)
        proof.seal.CopyFrom(bad.seal.signed)
        proof.wrong_span.receipt.CopyFrom(receipt.signed)
        proof.wrong_span.first = BAD_INDEX
        proof.wrong_span.pieces[:] = [some]
        return proof

    yield "a chunk that the codec refuses, against the reducer", undecodable
    yield (
        "another's plan",
        lambda: changed(
            case.wrong_span, lambda proof: proof.plan.CopyFrom(sign(stranger, case.run_id, case.plan.message))
        ),
    )
    yield (
        "another's seal",
        lambda: changed(
            case.wrong_span, lambda proof: proof.seal.CopyFrom(sign(stranger, case.run_id, case.seal.message))
        ),
    )
    yield (
        "another seal",
        lambda: changed(case.wrong_span, lambda proof: proof.seal.CopyFrom(case.make_seal(unit=1 << 299).signed)),
    )
    yield (
        "a seal of another plan",
        lambda: changed(case.wrong_span, lambda proof: proof.seal.CopyFrom(case.make_seal(other_attempt()).signed)),
    )

    def other_attempt():  # type: ignore[no-untyped-def]
        return case.make_plan([vector.root for vector in case.vectors], attempt=2)

    yield "another plan", lambda: changed(case.wrong_span, lambda proof: proof.plan.CopyFrom(other_attempt().signed))
    yield (
        "a plan with another rule than the run's",
        lambda: changed(
            case.two_receipts,
            lambda proof: proof.plan.CopyFrom(
                case.make_plan([vector.root for vector in case.vectors], rule="mean").signed
            ),
        ),
    )

    def wrong_coefficients() -> pb.FaultProof:
        seal = pb.Seal.FromString(case.seal.signed.payload)
        seal.contributors[0].coefficient ^= 1
        return changed(case.wrong_span, lambda proof: proof.seal.CopyFrom(sign(case.coordinator, case.run_id, seal)))

    yield "a seal with other coefficients", wrong_coefficients
    yield "another run", lambda: changed(case.wrong_span, lambda proof: proof.run.CopyFrom(SPOILT.run))
    yield (
        "one receipt twice",
        lambda: changed(case.two_receipts, lambda proof: proof.two_receipts.second.CopyFrom(proof.two_receipts.first)),
    )
    yield (
        "receipts of two seals",
        lambda: changed(
            case.two_receipts,
            lambda proof: proof.two_receipts.second.CopyFrom(case.receipt(0, b"two", seal=b"s" * 32).signed),
        ),
    )
    yield (
        "receipts of two spans",
        lambda: changed(
            case.two_receipts, lambda proof: proof.two_receipts.second.CopyFrom(case.receipt(1, b"two").signed)
        ),
    )
    yield (
        "receipts by two peers",
        lambda: changed(
            case.two_receipts,
            lambda proof: proof.two_receipts.second.CopyFrom(case.receipt(0, b"two", key=case.keys[1]).signed),
        ),
    )
    header = case.push(3, 1)
    leaves = case.vectors[3].leaves

    def push(leaves: Sequence[bytes], signed: pb.Signed = header.header.signed) -> Callable[[], pb.FaultProof]:
        fault = pb.WrongPush(header=signed, leaves=leaves)
        return lambda: pb.FaultProof(run=case.run, plan=case.plan.signed, wrong_push=fault)

    span_leaves = leaves[case.plan.message.reducers[1].first :]
    yield "an honest push", push(span_leaves)
    yield "leaves of something else", push([bytes(32)] * len(span_leaves))
    yield "leaves of another number", push([*span_leaves, bytes(32)])
    yield "no leaves", push([])
    yield "a stranger's push", push(span_leaves, sign(stranger, case.run_id, header.header.message))
    moved = pb.PushHeader.FromString(header.header.signed.payload)
    moved.span = 9
    yield "a push for no span", push(span_leaves, sign(case.keys[3], case.run_id, moved))
    elsewhere = pb.PushHeader.FromString(header.header.signed.payload)
    elsewhere.plan = b"p" * 32
    yield "a push for another plan", push(span_leaves, sign(case.keys[3], case.run_id, elsewhere))
    yield "a chunk that the codec takes", lambda: case.wrong_chunk(3, 1)
    yield (
        "a chunk that was not committed to",
        lambda: changed(
            lambda: case.wrong_chunk(3, 1),
            lambda proof: setattr(proof.wrong_chunk, "chunk", refused_chunk(40_000, 1)),
        ),
    )
    yield (
        "a chunk under another's contribution",
        lambda: changed(
            lambda: SPOILT.wrong_chunk(2, BAD_INDEX),
            lambda proof: proof.wrong_chunk.contribution.CopyFrom(SPOILT.wrong_chunk(1, 1).wrong_chunk.contribution),
        ),
    )
    yield (
        "a chunk at another place",
        lambda: changed(lambda: SPOILT.wrong_chunk(2, BAD_INDEX), lambda proof: setattr(proof.wrong_chunk, "index", 2)),
    )
    yield (
        "a chunk outside the contribution",
        lambda: changed(lambda: SPOILT.wrong_chunk(2, BAD_INDEX), lambda proof: setattr(proof.wrong_chunk, "index", 3)),
    )
    yield "no fault", lambda: pb.FaultProof(run=case.run, plan=case.plan.signed)
    yield "nothing", lambda: pb.FaultProof()


REASONS = {
    "an honest span": "the span is what its rule gives",
    "a plan with wrong roots": "the pieces do not belong to the committed root",
    "chunks of another contributor": "the pieces do not belong to the committed root",
    "a sender is missing": "a wrong span shows the chunks of each sealed contributor",
    "a sender too many": "a wrong span shows the chunks of each sealed contributor",
    "a sender without chunks": "expected 1 leaf hashes, got 0",
    "a sender's chunk was changed": "the pieces do not belong to the committed root",
    "another chunk of the span": "the span is what its rule gives",
    "a chunk outside the span": "the chunks shown are not those of the span",
    "a chunk outside the vector": "the chunks shown are not those of the span",
    "another piece": "the pieces shown are not those that hold the chunks' result",
    "a piece that was changed": "the pieces do not belong to the committed root",
    "a piece that is cut": "the pieces shown are not those that hold the chunks' result",
    "a receipt of another seal": "the receipt is of another seal",
    "a receipt by somebody else": "a receipt by somebody who does not reduce the span",
    "the receipt of another span": "the chunks shown are not those of the span",
    "an audit that disagreed": "the audit report is of something else, or by somebody else",
    "an audit that had no chunks": "the audit report is of something else, or by somebody else",
    "an audit of another span": "the audit report is of something else, or by somebody else",
    "an audit by a stranger": "the audit report is of something else, or by somebody else",
    "an honest audit beside a wrong size": "an auditor agrees with a root, and not with a size",
    "a chunk that the codec refuses, against the reducer": "a block's scale stands for NaN",
    "another's plan": "RoundPlan is signed by",
    "another's seal": "Seal is signed by",
    "another seal": "the receipt is of another seal",
    "a seal of another plan": "the seal is of another plan",
    "another plan": "the seal is of another plan",
    "a plan with another rule than the run's": "the plan has other terms than the run",
    "a seal with other coefficients": "the seal's coefficients are not those of its norms and the plan's weights",
    "another run": "RoundPlan is signed by",
    "one receipt twice": "both receipts name the same content",
    "receipts of two seals": "the receipts are of different seals or spans",
    "receipts of two spans": "the receipts are of different seals or spans",
    "receipts by two peers": "a receipt by somebody who does not reduce the span",
    "an honest push": "the chunks are those that the sender committed to",
    "leaves of something else": "the leaf hashes are not those of the content that the header names",
    "leaves of another number": "the leaf hashes are not those of the content that the header names",
    "no leaves": "the leaf hashes are not those of the content that the header names",
    "a stranger's push": "a push by somebody who is not in the plan",
    "a push for no span": "the PushHeader is of another plan, or of no span of it",
    "a push for another plan": "the PushHeader is of another plan, or of no span of it",
    "a chunk that the codec takes": "the chunk is one that peers take",
    "a chunk that was not committed to": "the pieces do not belong to the committed root",
    "a chunk under another's contribution": "the pieces do not belong to the committed root",
    "a chunk at another place": "the Merkle proof is too long",
    "a chunk outside the contribution": "the signer has committed to no such chunk",
    "no fault": "not a FaultProof, or one with something else in it",
    "nothing": "not a FaultProof, or one with something else in it",
}
"""Why each attempt fails."""


@pytest.mark.parametrize(("name", "make"), [pytest.param(name, make, id=name) for name, make in framings()])
def test_nobody_can_be_framed(name: str, make: Callable[[], pb.FaultProof]) -> None:
    with pytest.raises(WireError, match=REASONS[name]):
        judge(data(make()))


def test_a_sender_whose_chunks_were_damaged_on_the_way_is_not_accused() -> None:
    sent = CASE.push(3, 1)
    assert prove_bad_push(CASE.run, CASE.plan, sent) is None
    damaged = type(sent)(sent.header, list(map(a_lie, sent.chunks)))
    assert prove_bad_push(CASE.run, CASE.plan, damaged) is None


def test_what_is_no_proof_is_refused_before_it_is_looked_at() -> None:
    valid = data(CASE.wrong_span())
    for other in (b"", b"\xff" * 100, valid[:-1], valid + b"\xa2\x06\x01x", bytes(MAX_PROOF_BYTES + 1)):
        with pytest.raises(WireError):
            judge(other)


def test_an_installation_with_other_arithmetic_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_known_answer", lambda: bytes(32))
    with pytest.raises(WireError, match="computes other numbers"):
        judge(data(CASE.wrong_span()))


@pytest.mark.parametrize("name", VALID)
def test_a_damaged_proof_convicts_nobody_else(name: str) -> None:
    make, expected = VALID[name]
    valid, dice = data(make()), random.Random(name)
    for _ in range(100):
        damaged = bytearray(valid)
        for _ in range(dice.randint(1, 3)):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        try:
            assert {peer for peer, _ in judge(bytes(damaged))} <= set(expected)
        except WireError:
            continue
