"""Leases, positions and reports at the coordinator's state machine."""

from collections.abc import Iterator

import pytest
from google.protobuf.message import Message
from support.machine import Machine, run_of

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.planning import LARGEST_ROSTER, manifest_payload
from hivegrpo.coordinator.positions import Positions
from hivegrpo.coordinator.reports import judge
from hivegrpo.coordinator.round import EMPTY_SECONDS
from hivegrpo.coordinator.state import Phase
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import MAX_ENTRY_BYTES
from hivegrpo.protocol.checks import MAX_LEASE_POSITIONS, MAX_METRIC_NAME, MAX_METRICS, check_lease
from hivegrpo.protocol.envelope import sign
from hivegrpo.protocol.errors import FrameError, SignatureError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.check_replay()


def test_an_expired_lease_is_leased_again(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    before = {peer: run_of(machine.lease(peer)) for peer in machine.peers}
    assert machine.report(a, machine.contribution(a, returned=range(machine.lease(a).count))).accepted
    late = machine.contribution(b)
    machine.wait(59.9)
    assert len(machine.of(ev.LeaseExpired)) == 0
    machine.wait(0.1)
    assert {event.lease for event in machine.of(ev.LeaseExpired)} == {2, 3}
    assert set(run_of(machine.lease(b))) | set(run_of(machine.lease(c))) == set(range(10)), "a's come back, too"
    assert machine.accounted() == sorted(p for run in before.values() for p in run)
    answer = machine.report(b, late)
    assert (answer.accepted, answer.reason) == (False, "stale: lease 2 expired")


def test_a_lost_peer_keeps_its_lease_for_the_grace(machine: Machine) -> None:
    a, b, _ = machine.peers
    machine.start()
    machine.lose(a)
    machine.wait(4.9)
    machine.join(a)
    machine.wait(10)
    assert machine.of(ev.LeaseExpired) == []
    machine.lose(a)
    machine.wait(5)
    assert [event.reason for event in machine.of(ev.LeaseExpired)] == ["its peer was lost"]
    machine.happen(ev.PeerDisconnected(machine.now, b), ev.PeerLeft(machine.now, b, "enough for today"))
    assert machine.of(ev.LeaseExpired)[1].reason == "its peer left"


def test_every_position_is_in_one_place_over_epochs(machine: Machine) -> None:
    machine.start()
    first, second, third = machine.state.round.served
    assert machine.report(first, machine.contribution(first, dropped=[0], returned=[3])).accepted
    assert machine.report(second, machine.contribution(second, returned=[2])).accepted
    machine.contribute(third)
    used = {p for h in machine.state.round.contributions.values() for p in (h.lease.start + o for o in h.message.used)}
    assert used == {1, 2, 4, 5, 7, 8, 9}
    assert machine.state.positions.returned == [range(3, 4), range(6, 7)]
    machine.exchange()
    machine.vote(*machine.peers)
    leased = sorted(p for peer in machine.peers for p in run_of(machine.lease(peer)))
    # The two returned ones are less than half of what a peer is to have; they wait, and the cursor goes on.
    assert leased == list(range(10, 20))
    assert machine.state.positions == Positions(cursor=20, returned=[range(3, 4), range(6, 7)])


def test_positions_are_picked_taken_and_merged() -> None:
    book = Positions()
    book.take(book.pick(10))
    assert (book.cursor, book.returned) == (10, [])
    book.give_back([2, 3, 7])
    book.give_back(range(4, 6))
    assert book.returned == [range(2, 6), range(7, 8)]
    assert book.pick(3) == range(2, 5), "the first that is long enough"
    assert book.pick(8) == range(2, 6), "half of what is wanted is taken"
    assert book.pick(9) == range(10, 19), "less than that is left for smaller requests"
    book.take(range(3, 5))
    assert book.returned == [range(2, 3), range(5, 6), range(7, 8)]
    book.give_back(range(3, 5))
    book.give_back([6])
    assert book.returned == [range(2, 8)]


def test_the_plan_is_made_at_the_deadline_with_what_there_is(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    machine.wait(59.9)
    assert machine.state.phase is Phase.ROLLOUT
    machine.wait(0.1)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a]
    assert {event.lease for event in machine.of(ev.LeaseExpired)} == {2, 3}
    assert not machine.report(b, pb.Contribution(lease=2, used=range(3), weight=1, root=b"r" * 32)).accepted
    assert machine.state.members[c].lease is None, "no new leases while the round is averaged"


def test_an_empty_round_is_begun_again_with_other_prompts(machine: Machine) -> None:
    machine.start()
    for _ in range(2):
        drop_everything(machine)
    assert machine.state.empty_rounds == 2
    assert machine.of(ev.PlanMade) == []
    machine.wait(EMPTY_SECONDS)
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == list(range(20, 30))
    machine.round()
    assert machine.state.version == 1
    assert machine.state.empty_rounds == 0


def drop_everything(machine: Machine) -> None:
    """An empty round."""
    for peer in machine.peers:
        everything = range(machine.lease(peer).count)
        assert machine.report(peer, machine.contribution(peer, dropped=everything)).accepted


def test_empty_rounds_are_begun_ever_more_slowly(machine: Machine) -> None:
    machine.start()
    drop_everything(machine)
    pauses = []
    while machine.now < 1000.0 + 120.0:
        drop_everything(machine)
        assert machine.state.leases == {}
        empty_at, wake = machine.now, decide(machine.state, machine.now).wake
        assert wake is not None
        machine.wait(wake - machine.now - 0.01)
        assert machine.state.leases == {}
        machine.wait(0.01)
        assert machine.lease(machine.peers[0]).version == 0
        pauses.append(machine.now - empty_at)
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30])
    machine.round()
    assert machine.state.version == 1
    drop_everything(machine)
    assert machine.state.leases != {}, "one empty round may be bad luck"


def test_a_restart_does_not_sit_out_a_pause(machine: Machine) -> None:
    machine.start()
    drop_everything(machine)
    drop_everything(machine)
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(*machine.peers)
    assert machine.lease(machine.peers[0]).version == 0


def sampled(machine: Machine, peer: str, used: int, dropped: int) -> pb.Contribution:
    """Dynamic sampling under a peer's lease: the first groups are dropped, the next used, the rest returned."""
    count = machine.lease(peer).count
    return machine.contribution(peer, dropped=range(dropped), returned=range(dropped + used, count))


def test_dynamic_sampling_leases_more_than_it_wants_and_counts_what_it_wanted() -> None:
    machine = Machine(grpo={"dynamic_sampling_factor": 1.5})
    a, b, c = machine.peers
    machine.start()
    shares = {peer: (lease.wanted, lease.count) for peer in machine.peers if (lease := machine.lease(peer))}
    assert sorted(shares.values()) == [(3, 5), (3, 5), (4, 6)], "half as many again, rounded up"
    assert all(machine.lease(peer).max_weight == machine.lease(peer).wanted * 4 * 8 for peer in machine.peers)
    first, second, third = machine.state.round.served
    assert machine.report(first, sampled(machine, first, used=4, dropped=1)).accepted
    assert machine.state.round.spent == 4, "what was dropped was replaced"
    assert machine.report(second, sampled(machine, second, used=1, dropped=4)).accepted
    assert machine.state.round.spent == 7, "what was dropped in vain is not leased again in this round"
    assert machine.report(third, sampled(machine, third, used=1, dropped=1)).accepted
    assert machine.state.phase is Phase.EXCHANGE
    assert machine.state.round.spent == 9
    # Offsets 5 of the first lease (0 to 5) and 2 to 4 of the third (11 to 15) came back.
    assert machine.state.positions == Positions(cursor=16, returned=[range(5, 6), range(13, 16)])
    machine.exchange()
    machine.vote(a, b, c)
    assert sum(machine.lease(peer).wanted for peer in machine.peers) == 10
    machine.check_replay()


def test_what_a_lease_wanted_and_returned_is_leased_to_others_in_the_round() -> None:
    machine = Machine(grpo={"dynamic_sampling_factor": 2.0})
    machine.start()
    first, second, third = machine.state.round.served
    late = Identity.generate()
    machine.identities[late.peer_id] = late
    machine.join(late.peer_id)
    machine.ready(late.peer_id)
    assert machine.state.members[late.peer_id].lease is None
    assert machine.report(first, sampled(machine, first, used=1, dropped=1)).accepted
    lease = machine.lease(late.peer_id)
    assert (lease.wanted, lease.count) == (2, 4), "two of the four were not tried"
    assert list(run_of(lease)) == [2, 3, 4, 5]
    for peer in (second, third):
        assert machine.report(peer, sampled(machine, peer, used=3, dropped=0)).accepted
    assert machine.report(late.peer_id, sampled(machine, late.peer_id, used=2, dropped=0)).accepted
    assert machine.state.round.spent == 10
    assert len(machine.plan.contributors) == 4
    machine.check_replay()


def test_a_round_in_which_everything_is_dropped_ends_and_says_why() -> None:
    machine = Machine(grpo={"dynamic_sampling_factor": 2.0})
    machine.start()
    for peer in machine.peers:
        contribution = sampled(machine, peer, used=0, dropped=machine.lease(peer).count)
        contribution.metrics["frac_reward_zero_std"] = 1.0
        assert machine.report(peer, contribution).accepted
    (empty,) = machine.of(ev.RoundEmpty)
    assert (empty.version, empty.reason) == (1, "no contribution has weight: frac_reward_zero_std = 1")
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == list(range(20, 40))
    machine.check_replay()


def test_a_rejected_contribution_gives_back_what_it_used_and_not_what_it_dropped() -> None:
    machine = Machine(grpo={"dynamic_sampling_factor": 2.0})
    machine.start()
    first, *others = machine.state.round.served
    assert machine.report(first, sampled(machine, first, used=2, dropped=3)).accepted
    for peer in others:
        assert machine.report(peer, sampled(machine, peer, used=3, dropped=0)).accepted
    machine.lose(first)
    machine.exchange(first)
    machine.wait(5)
    assert [event.peer for event in machine.of(ev.ContributionRejected)] == [first]
    free = [position for run in machine.state.positions.returned for position in run]
    assert free[:5] == [3, 4, 5, 6, 7], "0 to 2 were dropped"
    machine.check_replay()


def test_a_lease_wants_no_more_than_it_has() -> None:
    """Positions that came back are leased as they are, if they make half of what is asked for."""
    machine = Machine(peers=1, run={"start_peers": 1}, grpo={"prompts_per_round": 4, "dynamic_sampling_factor": 2.0})
    (peer,) = machine.peers
    machine.start()
    assert machine.report(peer, sampled(machine, peer, used=1, dropped=2)).accepted
    machine.exchange()
    machine.vote(peer)
    lease = machine.lease(peer)
    assert (list(run_of(lease)), lease.wanted) == ([3, 4, 5, 6, 7], 4)
    assert machine.report(peer, sampled(machine, peer, used=1, dropped=1)).accepted
    machine.exchange()
    machine.vote(peer)
    assert machine.lease(peer).wanted == 4
    assert machine.lease(peer).count == 8
    machine.check_replay()


def test_no_lease_has_more_positions_than_a_report_can_list() -> None:
    machine = Machine(
        peers=1, run={"start_peers": 1}, grpo={"prompts_per_round": 1 << 20, "dynamic_sampling_factor": 16.0}
    )
    machine.start()
    lease = machine.lease(machine.peers[0])
    check_lease(lease)
    assert lease.count == lease.wanted == MAX_LEASE_POSITIONS
    metrics = {f"{index:0{MAX_METRIC_NAME}}": 1.0 for index in range(MAX_METRICS)}
    contribution = pb.Contribution(lease=lease.id, dropped=range(lease.count), root=b"r" * 32, metrics=metrics)
    signed = sign(machine.identities[machine.peers[0]], machine.run_id, contribution)
    assert signed.ByteSize() <= MAX_CALL_BYTES


def test_a_peer_without_anything_learnt_does_not_hold_up_the_others(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.report(a, machine.contribution(a, dropped=range(machine.lease(a).count)))
    machine.contribute(b, c)
    assert [contributor.peer for contributor in machine.plan.contributors] == [b, c]


def test_a_late_joiner_gets_what_is_left(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.join(a, b, c)
    machine.ready(a, b, c)
    late = Identity.generate()
    machine.identities[late.peer_id] = late
    machine.join(late.peer_id)
    machine.ready(late.peer_id)
    assert machine.state.members[late.peer_id].lease is None, "all is leased"
    lease = machine.lease(a)
    assert machine.report(a, machine.contribution(a, returned=range(1, lease.count))).accepted
    assert list(run_of(machine.lease(late.peer_id))) == list(run_of(lease))[1:]


def test_reports_are_idempotent(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()

    again: list[tuple[str, Message]] = [(a, pb.Ready(version=0, state_root=b"0" * 32))]
    again += [(peer, machine.contribution(peer)) for peer in machine.peers]
    for peer, message in again[1:]:
        assert machine.report(peer, message).accepted
    attempt = machine.state.round.attempt
    assert attempt is not None
    everyone = [pb.Complete(peer=peer) for peer in machine.peers]
    again += [(peer, pb.SenderReport(plan=attempt.digest, complete=everyone)) for peer in machine.peers]
    for peer, message in again[4:]:
        assert machine.report(peer, message).accepted
    again += [(peer, machine.step_report()) for peer in (a, b)]
    machine.vote(a, b)
    count = len(machine.events)
    for peer, message in again:
        assert machine.report(peer, message).accepted, message
    assert len(machine.events) == count
    other = machine.step_report(b"x" * 32)
    assert machine.report(a, other).reason == "refused: this peer's vote was another one"
    machine.vote(c)
    count = len(machine.events)
    assert machine.report(*again[1]).accepted, "it counted in the version that was just made"
    assert len(machine.events) == count


def test_reports_that_make_no_sense_are_refused_and_change_nothing(machine: Machine) -> None:
    a, b, _ = machine.peers
    machine.start()
    count = len(machine.events)
    mine = machine.contribution(a)
    assert machine.report(b, mine).reason == "invalid: lease 1 is not this peer's"
    mine.version = 7
    assert machine.report(a, mine).reason == "invalid: lease 1 is for version 0, iteration 0"
    greedy = machine.contribution(a)
    greedy.weight = machine.lease(a).max_weight + 1
    with pytest.raises(FrameError, match="above the lease's bound"):
        machine.report(a, greedy)
    twice = machine.contribution(a)
    twice.returned.append(0)
    with pytest.raises(FrameError, match="exactly once"):
        machine.report(a, twice)
    assert machine.report(a, pb.Contribution(lease=99)).reason == "invalid: lease 99 is not this peer's"
    assert machine.report(a, pb.SenderReport(plan=b"p" * 32)).reason.startswith("stale")
    assert machine.report(a, pb.StepReport(plan=b"p" * 32)).reason.startswith("stale")
    assert machine.report(a, pb.Ready(version=4, state_root=b"0" * 32)).reason.startswith("invalid")
    with pytest.raises(FrameError, match="unknown type"):
        machine.report(a, pb.Welcome())
    stranger = Identity.generate()
    machine.identities[stranger.peer_id] = stranger
    assert machine.report(stranger.peer_id, pb.Leave()).reason == "unknown: this peer has not joined"
    signed = sign(machine.identities[a], machine.run_id, pb.Leave())
    with pytest.raises(SignatureError, match="is signed by"):
        judge(machine.state, signed, b, machine.run_id, machine.now)
    assert len(machine.events) == count


def test_only_one_lease_of_a_version_measures_accuracy() -> None:
    machine = Machine(evaluation={"path": "held_out.jsonl", "every": 2})
    a, b, c = machine.peers
    machine.start()
    assert [lease.message.evaluate for lease in machine.state.leases.values()] == [True, False, False]
    first = machine.state.leases[1].message.peer
    machine.happen(ev.PeerLeft(machine.now, first, ""))
    machine.join(first)
    assert machine.lease(first).evaluate, "another lease measures when the first is lost"
    for peer in (a, b, c):
        contribution = machine.contribution(peer)
        if machine.lease(peer).evaluate:
            contribution.metrics["eval/accuracy"] = 0.5
        assert machine.report(peer, contribution).accepted
    machine.exchange()
    machine.vote(a, b, c)
    assert machine.manifest.metrics["eval/accuracy"] == 0.5
    assert not any(lease.message.evaluate for lease in machine.state.leases.values()), "version 1 is not measured"
    machine.round()
    assert "eval/accuracy" not in machine.manifest.metrics
    assert sum(lease.message.evaluate for lease in machine.state.leases.values()) == 1


def test_the_largest_roster_fits_in_an_entry_of_the_chain() -> None:
    names = [f"12D3KooW{index:044}" for index in range(LARGEST_ROSTER + 1)]
    grpo = {"prompts_per_round": len(names), "num_iterations": 64}
    machine = Machine(grpo=grpo, run={"start_peers": len(names)})
    addresses = tuple("x" * 200 + name for name in names[:16])
    for name in names:
        apply(machine.state, ev.PeerJoined(machine.now, name, addresses, ""))
        apply(machine.state, ev.PeerReady(machine.now, name, 0, b"0" * 32))
    machine.happen()
    assert len(machine.state.leases) == LARGEST_ROSTER
    for granted in list(machine.state.leases.values()):
        lease = granted.message
        weight = lease.max_weight
        contribution = pb.Contribution(
            lease=lease.id, iteration=63, used=range(lease.count), weight=weight, root=b"r" * 32
        )
        payload = contribution.SerializeToString()
        signed = pb.Signed(type="Contribution", payload=payload, signer=lease.peer)
        apply(machine.state, ev.ContributionReceived(machine.now, signed.SerializeToString()))
    machine.happen()
    attempt = machine.state.round.attempt
    assert attempt is not None
    assert len(attempt.plan.contributors) == LARGEST_ROSTER
    largest = dict.fromkeys(attempt.roster, 1 << 418)  # a span's squared norm, as reducers take it
    attempt.reports = {reducer.peer: largest for reducer in attempt.plan.reducers}
    machine.happen()
    manifest = manifest_payload(machine.state, (b"s" * 32, ((b"b" * 32, 1 << 40),) * len(attempt.plan.reducers)))
    assert len(attempt.payload) + len(attempt.seal_payload) + len(manifest) + 1024 < MAX_ENTRY_BYTES
