"""Leases ahead: at the state machine, with restarts and losses, and over the in-memory network."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.invariants import assert_invariants
from support.machine import Machine, make_config, run_of
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.pushes import current_for, push_of
from hivegrpo.coordinator.round import Ahead
from hivegrpo.coordinator.state import Phase
from hivegrpo.peer.home import PeerHome
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.history import read_history
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check

OVERLAP: dict[str, Any] = {"averaging": {"overlap": True}}
VALUES = 40_000
PATIENCE = 60.0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(run={"versions": 4}, **OVERLAP)
    yield machine
    assert_sound(machine, tmp_path)


def assert_sound(machine: Machine, folder: Path) -> None:
    """A restart remembers the same; no position is in two places, or in none; the histories have no violation."""
    machine.check_replay()
    places = machine.accounted()
    assert len(places) == len(set(places))
    with closing(EventLog(folder / LOG_FILE, machine.run_id)) as log:
        log.append(machine.events)
        assert not check(read_records(log), {})


def ahead(machine: Machine) -> dict[str, pb.Lease]:
    return {granted.message.peer: granted.message for granted in machine.state.ahead.leases.values()}


def test_while_a_version_is_exchanged_its_contributors_get_leases_for_the_next_one(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    assert machine.state.phase is Phase.EXCHANGE
    leases = ahead(machine)
    assert sorted(leases) == machine.peers
    assert {(lease.version, lease.ahead, lease.reference_version) for lease in leases.values()} == {(1, True, 0)}
    assert sorted(lease.wanted for lease in leases.values()) == [3, 3, 4]
    assert sorted(p for lease in leases.values() for p in run_of(lease)) == list(range(10, 20))
    pushed = [push for event in machine.of(ev.LeaseGranted) if (push := push_of(event, machine.state)) is not None]
    assert [push.peers for push in pushed[3:]] == [(peer,) for peer in leases]

    early = pb.Contribution(lease=leases[machine.peers[0]].id, version=1, used=range(3), weight=30, root=b"r" * 32)
    assert machine.report(machine.peers[0], early).reason.startswith("invalid")

    machine.exchange()
    machine.now += 15.0
    machine.vote(*machine.peers)
    assert machine.state.version == 1
    assert machine.state.ahead == Ahead()
    assert {peer: machine.lease(peer) for peer in machine.peers} == leases, "the round goes on with them"
    assert machine.state.round.rollout_at == machine.now
    assert {granted.at for granted in machine.state.leases.values()} == {machine.now}
    assert machine.state.round.leased == 10
    machine.wait(59.0)
    assert len(machine.state.leases) == 3, "a lease's time begins when its version is there"
    machine.contribute(*machine.peers)
    assert machine.plan.version == 2


def test_there_is_no_lease_beyond_the_last_version(machine: Machine) -> None:
    machine.start()
    for _ in range(4):
        machine.round()
    assert machine.state.phase is Phase.FINISHED
    assert machine.state.ahead == Ahead()
    assert machine.state.leases == {}
    assert machine.state.positions.cursor == 40


def test_without_overlap_nobody_is_leased_ahead() -> None:
    machine = Machine()
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    assert machine.state.phase is Phase.STEP
    assert machine.state.ahead == Ahead()


def test_a_newcomer_has_its_share_when_the_version_is_there(machine: Machine) -> None:
    machine.start()
    late = Identity.generate()
    machine.identities[late.peer_id] = late
    machine.contribute(*machine.peers[:2])
    machine.join(late.peer_id)
    machine.ready(late.peer_id)
    machine.contribute(machine.peers[2])
    assert late.peer_id not in ahead(machine), "it contributed nothing: it may not be able to"
    assert sum(lease.wanted for lease in ahead(machine).values()) == 8, "3, 3 and 2; the rest of 10 is for the fourth"
    machine.exchange()
    machine.vote(*machine.peers)
    machine.ready(late.peer_id, version=1, root=bytes([1]) * 32)
    assert machine.lease(late.peer_id).wanted == 2


def test_who_is_lost_or_leaves_gives_its_lease_ahead_back(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a, b, c)
    machine.exchange()
    machine.vote(c)
    of_a, of_b = ahead(machine)[a], ahead(machine)[b]
    machine.lose(a)
    machine.wait(4.0)
    assert sorted(ahead(machine)) == [a, b, c], "it keeps its place for the grace"
    machine.wait(1.0)
    assert sorted(ahead(machine)) == [b, c]
    machine.join(a)
    assert run_of(ahead(machine)[a]) == run_of(of_a), "positions that came back are leased first"
    assert ahead(machine)[a].id > of_a.id
    assert machine.report(b, pb.Leave()).accepted
    assert sorted(ahead(machine)) == [a, c]
    assert [event.lease for event in machine.of(ev.LeaseExpired)] == [of_a.id, of_b.id]


def test_who_is_banned_loses_its_lease_ahead(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    banned, *others = machine.peers
    assert banned in ahead(machine)
    machine.happen(ev.PeerBanned(machine.now, banned, "it lied", b"p" * 32, 9))
    assert set(ahead(machine)) == set(others)
    [expired] = [event for event in machine.of(ev.LeaseExpired) if "banned" in event.reason]
    assert expired.lease not in machine.state.leases
    machine.exchange()
    machine.vote(*others)
    assert machine.state.members[banned].lease is None


def test_who_is_away_at_the_commit_has_the_rest_of_its_grace(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a, b, c)
    machine.exchange()
    machine.lose(c)
    machine.wait(3.0)
    machine.vote(a, b)
    machine.wait(0.5)
    assert machine.state.version == 1
    assert machine.state.members[c].lease is not None
    machine.wait(1.4)
    assert machine.state.members[c].lease is not None
    machine.wait(0.2)
    assert machine.state.members[c].lease is None


def test_another_attempt_keeps_the_leases_ahead(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    before = ahead(machine)
    machine.exchange(machine.peers[0])  # this reducer is silent
    machine.wait(12.0)
    assert machine.plan.attempt == 2
    assert ahead(machine) == before
    machine.exchange()
    machine.vote(*machine.peers[1:])
    machine.wait(0.5)
    assert machine.state.version == 1
    assert {machine.lease(peer).id for peer in machine.peers} == {lease.id for lease in before.values()}


def test_an_abandoned_round_ends_the_leases_ahead(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    ids = {lease.id for lease in ahead(machine).values()}
    machine.exchange(*machine.peers)
    machine.wait(12.0)  # every reducer was silent: nobody is left
    assert machine.of(ev.RoundAbandoned)
    assert {event.lease for event in machine.of(ev.LeaseExpired)} == ids
    assert machine.state.ahead == Ahead()
    assert {(machine.lease(peer).version, machine.lease(peer).ahead) for peer in machine.peers} == {(0, False)}
    assert machine.accounted() == list(range(20))


def test_a_restart_keeps_the_leases_ahead_and_tells_them_again(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    before = ahead(machine)
    machine.now += 3.0
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(*machine.peers)
    assert ahead(machine) == before
    for peer in machine.peers:
        told = [
            parse(pb.Lease, p.payload) for p in current_for(machine.state, peer, finished=False) if p.type == "Lease"
        ]
        assert told == [before[peer]]


def test_one_lease_ahead_measures_the_version_that_is_being_made(tmp_path: Path) -> None:
    machine = Machine(evaluation={"path": "held_out.jsonl", "every": 1}, **OVERLAP)
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    (measuring,) = [lease for lease in ahead(machine).values() if lease.evaluate]
    machine.vote(next(peer for peer in machine.peers if peer != measuring.peer))
    assert machine.report(measuring.peer, pb.Leave()).accepted
    machine.join(measuring.peer)
    assert [lease.evaluate for lease in ahead(machine).values()].count(True) == 1
    machine.vote(*(peer for peer in machine.peers if peer not in machine.state.round.attempt.votes))
    assert sum(granted.message.evaluate for granted in machine.state.leases.values()) == 1
    assert machine.state.round.evaluating
    assert_sound(machine, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_no_position_is_lost_or_taken_twice(seed: int, tmp_path: Path) -> None:
    """A coordinator that restarts, peers that are lost, leave, return, contribute little, report late or not at all."""
    dice = random.Random(seed)
    machine = Machine(peers=4, run={"versions": 12, "start_peers": 2}, **OVERLAP)
    machine.start()
    most = 0
    for _ in range(250):
        step = dice.random()
        peer = dice.choice(machine.peers)
        member = machine.state.members[peer]
        if step < 0.06:
            machine.now += dice.random() * 8
            machine.happen(ev.CoordinatorStarted(machine.now))
        elif step < 0.14 and member.connected:
            machine.lose(peer)
        elif step < 0.17 and member.connected:
            machine.report(peer, pb.Leave())
        elif step < 0.30:
            machine.join(*(name for name in machine.peers if not machine.state.members[name].connected))
        elif step < 0.36:
            machine.wait(dice.random() * 9)
        else:
            act(machine, dice, peer)
        places = machine.accounted()
        assert len(places) == len(set(places))
        most = max(most, len(machine.state.ahead.leases))
    assert most >= 2, "the history has leases ahead"
    assert machine.state.version >= 2
    assert_sound(machine, tmp_path)


def act(machine: Machine, dice: random.Random, peer: str) -> None:
    """What this peer owes now, done by it; then everybody's part of the exchange, or nearly."""
    state = machine.state
    if state.phase is Phase.ROLLOUT and state.members[peer].connected:
        version = max(state.version, 0)
        root = bytes([version]) * 32 if version else b"0" * 32
        if state.members[peer].lease is None:
            machine.ready(peer, version=version, root=root)
        else:
            count = machine.lease(peer).count
            returned = [count - 1] if dice.random() < 0.3 and count > 1 else []
            assert machine.report(peer, machine.contribution(peer, returned=returned)).accepted
    elif state.phase is Phase.EXCHANGE:
        attempt, silent = state.round.attempt, dice.sample(machine.peers, dice.choice([0, 0, 0, 1]))
        for reducer in machine.plan.reducers:
            if state.round.attempt is attempt and state.phase is Phase.EXCHANGE and reducer.peer not in silent:
                machine.senders(reducer.peer, *(item.peer for item in machine.plan.contributors))
    elif state.phase is Phase.STEP:
        for voter in [item.peer for item in machine.plan.contributors]:
            if state.phase is Phase.STEP and dice.random() < 0.9 and state.round.attempt is not None:
                machine.report(voter, machine.step_report())


@pytest.mark.parametrize("grpo", [{"num_iterations": 2}, {"max_staleness": 0}])
def test_overlap_needs_rollouts_that_may_be_a_version_behind(grpo: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(grpo))):
        make_config(grpo=grpo, **OVERLAP)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


class HeldLearner(IntegerLearner):
    """Its sampling ahead waits for the exchange under way to end: they run at the same time, or never."""

    def __init__(self, home: Path) -> None:
        super().__init__(VALUES)
        self.home = home
        self.during_sample = self.hold

    def hold(self, lease: int) -> None:
        committed = threading.Event()
        for _ in range(600):
            if max((r["version"] for r in self.records("version")), default=-1) > self.version:
                return
            committed.wait(0.05)
        raise AssertionError("the version was not made while this peer sampled")

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_history(PeerHome(self.home).history) if record["kind"] == kind]


def test_peers_sample_under_the_version_before_while_the_next_one_is_made(tmp_path: Path) -> None:
    config = small_config(run={"versions": 4}, **OVERLAP)
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)
    learners = {name: HeldLearner(tmp_path / name) for name in ("anna", "bert")}

    async def scenario() -> None:
        await swarm.start_coordinator()
        nodes = [await swarm.start_peer(name, learner) for name, learner in learners.items()]
        await asyncio.gather(*(node.task for node in nodes))
        assert swarm.coordinator is not None
        await swarm.coordinator.leave()

    run(scenario)
    chain = ChainFile.open(swarm.coordinator_home).chain
    assert chain.height == 4
    assert_invariants(swarm)
    for learner in learners.values():
        # The reduction and the step of version v were done while the learner's own thread was held.
        assert [version for _, version, _ in learner.sampled] == [0, 1, 2]
        gradients = [version for version, _ in learner.used]
        assert gradients == [0, 1, 2, 3], "the gradient is always taken at the newest version"
        loaded = [vector for *_, vector in learner.sampled]
        assert not torch.equal(loaded[0], loaded[1])
        told = {record["version"]: record["metrics"] for record in learner.records("metrics")}
        assert told[0]["seconds/hidden"] == 0.0
        assert all(told[version]["seconds/hidden"] > 0.0 for version in (1, 2, 3))
