"""Rounds of the coordinator's state machine, driven by reports and a clock of its own: no network, no disk."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.machine import VALUES, Machine, canonical, run_of

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.log import EventLog
from hivegrpo.coordinator.pushes import current_for
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.coordinator.status import snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_manifest, check_plan, check_seal
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.scalars import StepScalars, fp32_from_bits


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.check_replay()


def test_a_round_from_genesis_to_commit(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    assert machine.manifest.version == 0
    assert machine.manifest.parent == bytes.fromhex(machine.run_id)
    assert machine.manifest.state == pb.Blob(root=b"0" * 32, size=12 * VALUES + 8)
    check_manifest(machine.manifest)
    # 10 positions over 3 peers: 4, then an even share of the 6 that are left.
    assert [len(run_of(machine.lease(peer))) for peer in machine.state.round.served] == [4, 3, 3]
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == list(range(10))
    assert machine.lease(a).max_weight == machine.lease(a).count * 4 * 8

    genesis = machine.state.head
    machine.contribute(*machine.peers)
    plan = machine.plan
    check_plan(plan)
    assert (plan.version, plan.attempt, plan.parent) == (1, 1, genesis.digest if genesis else b"")
    assert [contributor.peer for contributor in plan.contributors] == machine.peers
    assert [(reducer.first, reducer.chunks) for reducer in plan.reducers] == [(0, 1), (1, 1), (2, 1)]
    expected = StepScalars.for_step(1, learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    assert list(plan.scalars) == expected.to_bits()

    machine.exchange()
    check_seal(machine.seal, plan)
    shares = [fp32_from_bits(sealed.coefficient) for sealed in machine.seal.contributors]
    weights = [contributor.weight for contributor in plan.contributors]
    assert shares == pytest.approx([weight / 100 for weight in weights], rel=1e-7)  # 100 = 10 positions of weight 10

    machine.vote(a, b)
    assert machine.state.version == 0, "it gives the third vote half a second"
    machine.vote(c)
    assert machine.manifest.version == 1
    assert machine.manifest.state.root == bytes([1]) * 32
    assert machine.manifest.contributors == plan.contributors
    assert machine.manifest.metrics["num_tokens"] == 100.0
    # Means by weight: groups of 4, 3 and 3 with weights of ten times that.
    assert machine.manifest.metrics["reward"] == pytest.approx((4 * 40 + 3 * 30 + 3 * 30) / 100)
    assert [machine.lease(peer).version for peer in machine.peers] == [1, 1, 1], "voters are leased again at once"


def test_a_run_ends_after_its_last_version(machine: Machine) -> None:
    machine.start()
    for _ in range(3):
        machine.round()
    assert machine.state.phase is Phase.FINISHED
    assert machine.manifest.version == 3
    assert machine.state.leases == {}
    assert decide(machine.state, machine.now + 1e6).events == ()
    assert [member.contributed for member in machine.state.members.values()] == [3, 3, 3]


def test_genesis_waits_for_enough_peers_that_agree() -> None:
    machine = Machine(peers=4, run={"start_peers": 3})
    a, b, c, d = machine.peers
    machine.join(a, b, c, d)
    machine.ready(a, b)
    assert machine.state.phase is Phase.GENESIS, "two of the three it waits for"
    machine.ready(c, root=b"x" * 32)
    assert machine.manifest.state.root == b"0" * 32, "two of three agree"
    assert machine.state.idle == {}
    assert set(machine.state.round.served) == {a, b}, "a peer with another root gets no work"
    answer = machine.report(c, pb.Ready(version=0, state_root=b"x" * 32))
    assert not answer.accepted
    assert answer.reason.startswith("invalid")


def test_genesis_takes_no_other_root_than_the_manifest_pins() -> None:
    machine = Machine(peers=2, genesis=b"0" * 32, run={"start_peers": 1})
    liar, honest = machine.peers
    machine.join(liar, honest)
    answer = machine.report(liar, pb.Ready(version=0, state_root=b"x" * 32))
    assert not answer.accepted
    assert machine.state.phase is Phase.GENESIS
    machine.ready(honest, root=b"0" * 32)
    assert machine.manifest.state.root == b"0" * 32


def test_genesis_does_not_settle_a_tie() -> None:
    machine = Machine(peers=3)
    machine.join(*machine.peers)
    for index, peer in enumerate(machine.peers):
        machine.ready(peer, root=bytes([index]) * 32)
    machine.wait(3600)
    assert machine.state.head is None
    assert snapshot(machine.state, {}, machine.now)["trouble"] == "the peers report 3 different states for version 0"


def test_a_contributor_that_is_away_is_waited_for_and_then_left_out(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    machine.lose(a)
    machine.wait(1)
    machine.contribute(b, c)
    assert machine.state.phase is Phase.PLAN
    machine.wait(3.9)
    machine.join(a)
    assert len(machine.plan.contributors) == 3, "it came back within the grace"
    machine.exchange()
    machine.vote(a, b, c)
    machine.contribute(a, b)
    machine.lose(b)
    machine.wait(5)
    machine.contribute(c)
    assert [contributor.peer for contributor in machine.plan.contributors] == sorted([a, c])
    assert [(event.peer, event.reason) for event in machine.of(ev.ContributionRejected)] == [(b, "peer lost")]


def test_a_lost_reducer_leads_to_an_attempt_of_the_survivors(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    first = machine.plan
    machine.exchange(c)
    machine.lose(c)
    machine.wait(4.9)
    assert machine.plan is first
    machine.wait(0.1)
    second = machine.plan
    check_plan(second)
    assert (second.version, second.attempt) == (1, 2)
    assert list(second.contributors) == list(first.contributors)[:2], "the same contributions, without the lost one"
    assert [reducer.peer for reducer in second.reducers] == [a, b]
    assert [event.peer for event in machine.of(ev.ContributionRejected)] == [c]
    machine.exchange()
    machine.vote(a, b)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [a, b]
    assert machine.state.trouble == ""


def test_a_reducer_that_does_not_report_in_time_is_left_out(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange(b)
    machine.wait(12)
    assert machine.plan.attempt == 2
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, c]
    (rejected,) = machine.of(ev.ContributionRejected)
    assert (rejected.peer, rejected.reason) == (b, "as a reducer, it did not report in time")


def test_a_contributor_incomplete_at_most_reducers_does_not_count(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.senders(a, a, b)
    machine.senders(b, a, b)
    assert machine.state.phase is Phase.EXCHANGE
    machine.senders(c, c, b, a)
    check_seal(machine.seal, machine.plan)
    assert [sealed.peer for sealed in machine.seal.contributors] == [a, b]
    weights = [contributor.weight for contributor in machine.plan.contributors][:2]
    assert fp32_from_bits(machine.seal.contributors[0].coefficient) == pytest.approx(
        weights[0] / sum(weights), rel=1e-7
    )
    assert machine.of(ev.ContributionRejected) == [], "another attempt could still have it"
    positions = machine.accounted()
    machine.vote(a, b, c)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [a, b]
    (rejected,) = machine.of(ev.ContributionRejected)
    assert (rejected.peer, rejected.reason) == (c, f"incomplete at reducer {a}")
    again = {p for peer in machine.peers for p in run_of(machine.lease(peer))}
    assert again | {p for run in machine.state.positions.returned for p in run} > set(positions[-3:])


def test_without_a_common_sender_there_is_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    for peer in machine.peers:
        machine.senders(peer, peer)
    assert machine.plan.attempt == 2
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, b, c]
    assert machine.state.trouble == "no contributor was complete at every reducer"


def test_votes_that_disagree_lead_to_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a, root=b"x" * 32)
    machine.vote(b, root=b"y" * 32)
    assert machine.state.phase is Phase.STEP, "the third vote can still make a quorum"
    machine.vote(c, root=b"z" * 32)
    assert machine.plan.attempt == 2
    assert machine.state.trouble == "the votes disagree: 3 different results"


def test_a_quorum_waits_half_a_second_for_the_last_votes(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a, b)
    last = machine.step_report(b"x" * 32)
    machine.wait(0.49)
    assert machine.state.version == 0
    machine.wait(0.01)
    assert machine.state.version == 1
    assert machine.state.members[c].lease is None
    assert machine.report(c, last).accepted, "a late vote is written down"
    assert machine.state.members[c].lease is None, "but its root is another one, so it does not hold the version"
    assert len(machine.of(ev.StepReported)) == 3


def test_two_thirds_are_needed_and_a_majority_is_not_enough() -> None:
    machine = Machine(peers=5, run={"start_peers": 5})
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(*machine.peers[:3])
    machine.wait(1)
    assert machine.state.version == 0, "three of five"
    machine.vote(machine.peers[3])
    machine.wait(1)
    assert machine.state.version == 1


def test_a_late_vote_that_agrees_makes_a_peer_ready(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    vote = machine.step_report()
    machine.vote(a, b)
    machine.wait(0.5)
    assert machine.report(c, vote).accepted
    assert machine.lease(c).version == 1


def test_nobody_waits_for_the_votes_of_the_lost(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.lose(c)
    machine.vote(a, b)
    assert machine.state.version == 1


def test_a_reducer_lost_before_anyone_has_all_spans_is_not_waited_for(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.lose(c)
    machine.wait(5)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a, b]


def test_too_few_survivors_for_a_quorum_lead_to_a_new_attempt(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(a)
    machine.lose(b, c)
    machine.wait(5)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a]
    machine.exchange()
    machine.vote(a)
    assert machine.state.version == 1


def test_a_round_that_fails_every_attempt_is_abandoned_and_begun_again(machine: Machine) -> None:
    machine.start()
    positions = sorted(p for peer in machine.peers for p in run_of(machine.lease(peer)))
    machine.contribute(*machine.peers)
    for attempt in (1, 2, 3):
        assert machine.plan.attempt == attempt
        machine.exchange()
        machine.wait(22)  # the step's time and two seconds
    (abandoned,) = machine.of(ev.RoundAbandoned)
    assert abandoned.reason == "no version after 3 attempts; the last: 0 of 3 votes within the step's time"
    assert len(machine.of(ev.ContributionRejected)) == 3
    assert sorted(p for peer in machine.peers for p in run_of(machine.lease(peer))) == positions
    machine.contribute(*machine.peers)
    assert machine.plan.attempt == 4, "a number that fences the attempts before"
    machine.exchange()
    machine.vote(*machine.peers)
    assert machine.state.version == 1


def test_without_a_reducer_that_can_be_dialled_the_round_is_abandoned_after_the_grace(machine: Machine) -> None:
    machine.join(*machine.peers, dialable=False)
    machine.ready(*machine.peers)
    machine.contribute(*machine.peers)
    machine.wait(4.9)
    assert machine.state.phase is Phase.PLAN
    machine.wait(0.1)
    assert len(machine.of(ev.RoundAbandoned)) == 1
    assert machine.state.phase is Phase.ROLLOUT


def test_a_restart_gives_everyone_their_time_again(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a)
    leased = canonical(machine.state.leases)
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    assert canonical(machine.state.leases) != leased
    assert len(machine.state.leases) == 2
    machine.wait(4.9)
    assert machine.of(ev.LeaseExpired) == []
    machine.join(a, b)
    machine.wait(0.1)
    assert [event.reason for event in machine.of(ev.LeaseExpired)] == ["its peer was lost"], "c has not come back"
    machine.join(c)
    machine.wait(50)
    machine.contribute(b, c)
    machine.exchange(c)
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(a, b, c)
    machine.wait(11.9)
    assert machine.plan.attempt == 1
    machine.exchange()
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(a, b, c)
    machine.vote(a, b, c)
    assert machine.state.version == 1
    assert [machine.lease(peer).version for peer in machine.peers] == [1, 1, 1]


def test_a_state_replayed_from_the_log_on_disk_is_equal(machine: Machine, tmp_path: Path) -> None:
    a, b, _ = machine.peers
    machine.start()
    machine.round()
    machine.contribute(a)
    machine.lose(b)
    log = EventLog(tmp_path / "events.sqlite", machine.run_id)
    log.append(machine.events[:5])
    log.append(machine.events[5:])
    log.close()
    state = State(machine.terms)
    reopened = EventLog(tmp_path / "events.sqlite", machine.run_id)
    for event in reopened.replay():
        apply(state, event)
    assert list(reopened.replay()) == machine.events
    assert canonical(state) == canonical(machine.state)
    reopened.close()


def test_in_a_large_swarm_each_further_attempt_has_half_as_many_reducers() -> None:
    """Of 150 that could, 64 may; the second attempt replaces the lost, and then fewer can be lost."""
    machine = Machine(
        peers=150,
        run={"start_peers": 150},
        grpo={"prompts_per_round": 150},
        timing={"max_attempts": 9},
    )
    machine.terms = replace(machine.terms, values=100 * CHUNK_VALUES)
    machine.state = State(machine.terms)
    machine.start()
    machine.contribute(*machine.peers)
    reducers = []
    for attempt in range(1, 9):
        reducers.append(len(machine.plan.reducers))
        machine.happen(ev.AttemptFailed(machine.now, 1, attempt, "planted"))
    assert reducers == [64, 64, 32, 16, 8, 4, 2, 1]
    machine.check_replay()


def test_who_joins_is_told_of_those_that_hold_the_head_and_can_be_dialled(machine: Machine) -> None:
    def told() -> set[str]:
        (welcome, *_) = current_for(machine.state, "newcomer", finished=False)
        message = parse(pb.Welcome, welcome.payload)
        assert welcome.payload == message.SerializeToString(deterministic=True), "as if it were not made of parts"
        return {holder.peer for holder in message.holders}

    first, second, third = machine.peers
    machine.join("newcomer", *machine.peers)
    machine.ready(first, second)
    assert told() == set(), "version 0 is not agreed yet"
    machine.ready(third)
    assert told() == set(machine.peers)
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(first, second)
    machine.wait(1.0)
    assert machine.state.version == 1
    assert told() == {first, second}, "the third has not voted for it"
    machine.ready(third, version=1, root=machine.manifest.state.root)
    machine.lose(first)
    machine.join(second, dialable=False)
    assert told() == {third}
