"""Audits and bans in the coordinator's state machine, and what is drawn."""

from hashlib import sha256

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.equivocation import two_receipts
from hivegrpo.coordinator.state import Phase
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_AUDITS, TURNS, draw, receipt_of
from hivegrpo.protocol.envelope import digest_of, sign_payload

PEERS = 5
AUDIT = 4.0


def machine(rate: float = 1.0) -> Machine:
    """At the leases of version 0."""
    made = Machine(
        PEERS, averaging={"audit_rate": rate}, timing={"audit": AUDIT}, run={"start_peers": PEERS, "versions": 3}
    )
    made.start()
    return made


def sealed(rate: float = 1.0) -> Machine:
    made = machine(rate)
    made.contribute(*made.peers)
    made.exchange()
    assert made.state.phase is Phase.STEP
    return made


def report(made: Machine, peer: str, span: int, content: bytes | None = None) -> bool:
    attempt = made.state.round.attempt or made.state.last
    assert attempt is not None
    content = bytes([span]) * 32 if content is None else content
    message = pb.AuditReport(plan=attempt.digest, seal=attempt.seal_digest, span=span, content=content)
    return made.report(peer, message).accepted


def test_a_version_waits_for_its_auditors() -> None:
    made = sealed()
    attempt = made.state.round.attempt
    assert attempt is not None
    made.vote(*made.peers[:3])
    assert not attempt.drawn, "nobody knows before there is a quorum"
    made.vote(*made.peers[3:])
    assert [(drawn.span, drawn.needed, len(drawn.order)) for drawn in attempt.drawn] == [
        (span, MAX_AUDITS, PEERS - 1) for span in range(3)
    ]
    for drawn in attempt.drawn:
        for peer in drawn.order[: drawn.needed]:
            assert made.state.version == 0
            assert report(made, peer, drawn.span)
    assert made.state.version == 1
    made.check_replay()


def test_an_audit_counts_once_its_turn_has_come() -> None:
    made = sealed()
    attempt = made.state.round.attempt
    assert attempt is not None
    made.vote(*made.peers)
    for drawn in attempt.drawn:
        assert report(made, drawn.order[0], drawn.span)
        assert report(made, drawn.order[3], drawn.span), "its turn is the second after the first two"
    made.wait(2 * AUDIT - 0.1)
    assert made.state.version == 0
    made.wait(0.1)
    assert made.state.version == 1
    assert not made.of(ev.AttemptFailed)


@pytest.mark.parametrize("content", [b"x" * 32, b""])
def test_who_disagrees_without_proof_counts_for_nothing(content: bytes) -> None:
    made = sealed()
    attempt = made.state.round.attempt
    assert attempt is not None
    made.vote(*made.peers)
    for drawn in attempt.drawn:
        assert report(made, drawn.order[0], drawn.span, content)
        assert report(made, drawn.order[1], drawn.span)
    made.wait(AUDIT)
    assert made.state.version == 0
    for drawn in attempt.drawn:
        assert report(made, drawn.order[2], drawn.span)
    assert made.state.version == 1
    made.check_replay()


def test_without_enough_audits_the_attempt_fails_and_the_next_seal_draws_others() -> None:
    made = sealed()
    first = made.state.round.attempt
    assert first is not None
    made.vote(*made.peers)
    made.wait(made.config.timing.exchange + TURNS * AUDIT + 1.9)
    assert made.state.round.attempt is first
    made.wait(0.1)
    (failed,) = made.of(ev.AttemptFailed)
    assert failed.reason == "no auditor agreed in time with spans 0, 1, 2"
    made.exchange()
    second = made.state.round.attempt
    assert second is not None
    assert second.plan.attempt == 2
    made.vote(*made.peers)
    assert second.drawn != first.drawn
    made.check_replay()


def test_reports_that_make_no_sense_are_refused() -> None:
    made = sealed()
    attempt = made.state.round.attempt
    assert attempt is not None
    made.vote(*made.peers)
    reducer, (auditor, *_) = attempt.plan.reducers[0].peer, attempt.drawn[0].order

    def reason(peer: str, **fields: object) -> str:
        message = pb.AuditReport(plan=attempt.digest, seal=attempt.seal_digest, span=0, content=bytes(32))
        for name, value in fields.items():
            setattr(message, name, value)
        return made.report(peer, message).reason

    assert reason(reducer).startswith("invalid: this peer was not drawn")
    assert reason(auditor, span=9).startswith("invalid: this peer was not drawn")
    assert reason(auditor, plan=b"p" * 32).startswith("stale")
    assert reason(auditor, seal=b"s" * 32).startswith("invalid")
    assert reason(auditor) == reason(auditor) == ""
    assert reason(auditor, content=b"c" * 32).startswith("refused")
    assert len(made.of(ev.AuditReported)) == 1


def test_without_audits_nothing_is_drawn_or_waited_for() -> None:
    made = sealed(rate=0.0)
    made.vote(*made.peers)
    assert made.state.version == 1


def ban(made: Machine, peer: str) -> None:
    made.happen(ev.PeerBanned(made.now, peer, "it lied", b"p" * 32, 9))


def test_a_ban_in_the_step_fails_the_attempt_and_the_next_goes_on_without() -> None:
    made = sealed()
    liar = made.plan.reducers[1].peer
    made.vote(*made.peers)
    ban(made, liar)
    (failed,) = made.of(ev.AttemptFailed)
    assert liar in failed.reason
    (rejected,) = made.of(ev.ContributionRejected)
    assert (rejected.peer, rejected.reason) == (liar, "its peer was banned: it lied")
    assert liar not in {contributor.peer for contributor in made.plan.contributors}
    assert len(made.plan.contributors) == PEERS - 1
    assert made.report(liar, pb.Ready(version=0, state_root=b"0" * 32)).reason == "banned: it lied"
    made.check_replay()


def test_a_ban_in_the_rollout_ends_the_lease_or_the_contribution() -> None:
    made = machine()
    worker, contributor, *others = made.peers
    made.contribute(contributor)
    ban(made, worker)
    ban(made, contributor)
    assert [event.reason for event in made.of(ev.LeaseExpired)] == ["its peer was banned: it lied"]
    assert [event.peer for event in made.of(ev.ContributionRejected)] == [contributor]
    assert not {worker, contributor} & (made.state.connected.keys() | made.state.idle.keys())
    made.contribute(*others)
    assert {item.peer for item in made.plan.contributors} == set(others)
    made.check_replay()


def test_a_late_ban_leaves_the_committed_version_and_takes_no_more_of_the_peer() -> None:
    made = sealed(rate=0.0)
    made.vote(*made.peers)
    assert made.state.version == 1
    ban(made, made.peers[0])
    assert made.state.version == 1
    made.ready(*made.peers[1:], version=1, root=b"\x01" * 32)
    assert made.peers[0] not in {lease.message.peer for lease in made.state.leases.values()}
    made.check_replay()


def vote_for(made: Machine, content: pb.Blob, *, signed: bool) -> pb.StepReport:
    """A vote that names another content of span 0, with the reducer's signature or without."""
    attempt = made.state.round.attempt
    assert attempt is not None
    vote = made.step_report()
    vote.spans[0].CopyFrom(content)
    if signed:
        reducer = made.identities[attempt.plan.reducers[0].peer]
        receipt = receipt_of(attempt.digest, attempt.seal_digest, 0, content)
        vote.receipts[0] = sign_payload(reducer, made.run_id, "SpanReceipt", receipt).signature
    return vote


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True), (False, False)])
def test_two_receipts_are_found_in_votes_only_if_both_verify(first: bool, second: bool) -> None:
    made = sealed()
    attempt = made.state.round.attempt
    assert attempt is not None
    one = vote_for(made, pb.Blob(root=b"1" * 32, size=9), signed=first)
    other = vote_for(made, pb.Blob(root=b"2" * 32, size=9), signed=second)
    assert not list(two_receipts(attempt, one, made.run_id))
    assert made.report(made.peers[0], one).accepted
    assert not list(two_receipts(attempt, one, made.run_id)), "the same content"
    found = [(reducer, span) for reducer, span, _ in two_receipts(attempt, other, made.run_id)]
    assert found == ([(attempt.plan.reducers[0].peer, 0)] if first and second else [])


def plan_of(peers: int, reducers: int) -> pb.RoundPlan:
    names = [f"peer {place:03d}" for place in range(peers)]
    return pb.RoundPlan(
        contributors=[pb.Contributor(peer=name) for name in names],
        reducers=[pb.Reducer(peer=name) for name in names[:reducers]],
    )


def test_what_is_drawn_follows_the_rate() -> None:
    plan = plan_of(10, 10)
    seals = [digest_of(bytes([place])) for place in range(200)]
    assert not any(draw(plan, seal, 0.0) for seal in seals)
    assert all(len(draw(plan, seal, 1.0)) == 10 for seal in seals)
    drawn = [item for seal in seals for item in draw(plan, seal, 0.25)]
    # 2,000 spans: 500 expected, and 125 of them with a second auditor; four standard deviations are 77 and 43.
    assert abs(len(drawn) - 500) < 77
    assert abs(sum(item.needed == 2 for item in drawn) - 125) < 43
    first = [item.order[0] for seal in seals for item in draw(plan, seal, 1.0) if item.span == 0]
    assert "peer 000" not in first
    assert set(first) == {f"peer {place:03d}" for place in range(1, 10)}


def test_lots_are_drawn_as_the_protocol_says() -> None:
    plan, rate = plan_of(10, 10), 0.25
    for seed in (digest_of(bytes([place])) for place in range(50)):
        expected = []
        for span in range(10):
            lots = {
                name: int.from_bytes(sha256(b"audit" + seed + span.to_bytes(4, "big") + name.encode()).digest()[:8])
                for name in ("0", "1", *(contributor.peer for contributor in plan.contributors))
            }
            if lots["0"] < rate * 2**64:
                others = [peer for peer in lots if peer not in ("0", "1", plan.reducers[span].peer)]
                needed = 2 if lots["1"] < rate * 2**64 else 1
                expected.append((span, needed, tuple(sorted(others, key=lots.__getitem__))))
        assert [(item.span, item.needed, item.order) for item in draw(plan, seed, rate)] == expected


@pytest.mark.parametrize(("peers", "needed"), [(1, []), (2, [1]), (3, [1]), (4, [2]), (64, [2])])
def test_a_third_of_the_roster_may_be_silent(peers: int, needed: list[int]) -> None:
    assert [item.needed for item in draw(plan_of(peers, 1), bytes(32), 1.0)] == needed


def test_turns_begin_after_those_that_begin_at_once() -> None:
    (item,) = draw(plan_of(6, 1), bytes(32), 1.0)
    assert [item.starts(rank, 10.0) for rank in range(5)] == [0.0, 0.0, 10.0, 20.0, 30.0]
