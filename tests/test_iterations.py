"""Several updates from one rollout: at the state machine, and over the in-memory network."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from support.invariants import assert_invariants
from support.machine import Machine, run_of
from support.runs import Gate, IntegerLearner, signed_run, small_config
from support.swarm import Node, Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.positions import Positions
from hivegrpo.coordinator.state import Phase
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.history import Record, read_history
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check

VALUES = 40_000
PATIENCE = 60.0


def records_of(machine: Machine, folder: Path) -> list[Record]:
    with closing(EventLog(folder / LOG_FILE, machine.run_id)) as log:
        log.append(machine.events)
        return list(read_records(log))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(run={"versions": 9}, grpo={"num_iterations": 3})
    yield machine
    machine.check_replay()
    assert check(records_of(machine, tmp_path), {}) == []


def again(machine: Machine, peer: str, used: Sequence[int] | None = None) -> pb.Contribution:
    """What a peer contributes to a later iteration if it kept its rollout, or with `used` = [], if it lost it."""
    lease = machine.lease(peer)
    assert lease.iteration > 0
    if used is None:
        used = machine.state.round.rollouts[peer].message.used
    root = bytes([lease.iteration]) * 32 if used else bytes(32)
    return pb.Contribution(
        lease=lease.id,
        iteration=lease.iteration,
        version=lease.version,
        used=used,
        weight=10 * len(used),
        root=root,
        metrics={"entropy": 0.5},
    )


def finish(machine: Machine) -> None:
    """From the plan to the commit."""
    machine.exchange()
    machine.vote(*(contributor.peer for contributor in machine.plan.contributors))


def next_iteration(machine: Machine) -> None:
    for peer in machine.peers:
        assert machine.report(peer, again(machine, peer)).accepted
    finish(machine)


def leases(machine: Machine) -> list[tuple[str, int, int, range, int]]:
    return [
        (lease.message.peer, lease.message.id, lease.message.iteration, run_of(lease.message), lease.message.wanted)
        for lease in machine.state.leases.values()
    ]


def test_each_update_of_a_rollout_is_a_version_and_the_same_leases_are_renewed(machine: Machine) -> None:
    machine.start()
    sampled = {lease[0]: lease for lease in leases(machine)}
    first = machine.peers[0]
    last = machine.lease(first).count - 1
    assert machine.report(first, machine.contribution(first, returned=[last])).accepted
    machine.contribute(*machine.peers[1:])
    finish(machine)
    book = canonical_book(machine)
    for iteration in (1, 2):
        renewed = {lease[0]: lease for lease in leases(machine)}
        assert renewed == {peer: (peer, one[1], iteration, *one[3:]) for peer, one in sampled.items()}
        assert {lease.message.version for lease in machine.state.leases.values()} == {iteration}
        next_iteration(machine)
        assert {contributor.iteration for contributor in machine.manifest.contributors} == {iteration}
        assert machine.manifest.metrics == {"entropy": 0.5}
        if iteration == 1:
            assert canonical_book(machine) == book, "later iterations take no positions and give none back"
    assert machine.state.version == 3
    assert [lease[1:3] for lease in leases(machine)] == [(4, 0), (5, 0), (6, 0)], "then prompts are sampled again"
    assert all(run.start >= 10 for *_, run, _ in leases(machine))


def canonical_book(machine: Machine) -> Positions:
    return machine.state.positions.copy()


def test_nobody_else_works_in_an_iteration_round(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.contribute(a, b, c)
    machine.senders(a, a, b)
    machine.senders(b, a, b)  # c's chunks are incomplete
    machine.senders(c, a, b, c)
    machine.lose(b)
    machine.vote(a, c)
    machine.wait(0.5)
    assert machine.state.version == 1
    assert [lease[0] for lease in leases(machine)] == [a], "c does not count, b is away: neither is renewed"
    late = Identity.generate()
    machine.identities[late.peer_id] = late
    machine.join(late.peer_id, b)
    machine.ready(late.peer_id, b, version=1, root=bytes([1]) * 32)
    assert [lease[0] for lease in leases(machine)] == [a]
    for _ in range(2):
        assert machine.report(a, again(machine, a)).accepted
        finish(machine)
    assert machine.state.version == 3
    machine.ready(b, c, late.peer_id, version=3, root=bytes([3]) * 32)
    given = [parse_lease(event) for event in machine.of(ev.LeaseGranted)]
    assert {lease.peer for lease in given if lease.version == 3 and lease.iteration == 0} >= {a, b}


def parse_lease(event: ev.LeaseGranted) -> pb.Lease:
    return pb.Lease.FromString(event.payload)


def test_a_rollout_that_is_lost_costs_its_peer_the_iterations_and_nobody_else(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.round()
    assert machine.report(a, again(machine, a, used=[])).accepted
    assert machine.report(b, again(machine, b)).accepted
    assert machine.report(c, again(machine, c)).accepted
    finish(machine)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [b, c]
    assert [lease[0] for lease in leases(machine)] == [b, c]


@pytest.mark.parametrize("how", ["lost", "too late", "gone", "rejected"])
def test_without_any_rollout_left_the_round_begins_again_with_other_prompts(machine: Machine, how: str) -> None:
    machine.start()
    machine.round()
    book = canonical_book(machine)
    match how:
        case "lost":
            for peer in machine.peers:
                assert machine.report(peer, again(machine, peer, used=[])).accepted
        case "too late":
            machine.wait(60)
        case "gone":
            machine.lose(*machine.peers)
            machine.wait(5)
            assert machine.state.positions == book, "what they had was spent by iteration 0"
            machine.join(*machine.peers)
        case "rejected":
            for peer in machine.peers:
                assert machine.report(peer, again(machine, peer)).accepted
            machine.lose(*machine.peers)
            machine.wait(12)
            assert {event.iteration for event in machine.of(ev.ContributionRejected)} == {1}
            assert machine.state.positions == book
            machine.join(*machine.peers)
    (abandoned,) = machine.of(ev.RoundAbandoned)
    assert abandoned.version == 2
    assert machine.of(ev.RoundEmpty) == []
    fresh = leases(machine)  # of all peers, or of the first to be back
    assert {lease[2] for lease in fresh} == {0}
    assert min(lease[1] for lease in fresh) == 4
    assert sorted(p for *_, run, _ in fresh for p in run) == list(range(10, 20))
    machine.contribute(*(lease[0] for lease in fresh))
    finish(machine)
    assert machine.state.version == 2
    assert sorted(lease[:3] for lease in leases(machine)) == sorted((peer, number, 1) for peer, number, *_ in fresh)


def test_a_late_lease_of_an_iteration_is_left_out(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.round()
    book = canonical_book(machine)
    assert machine.report(a, again(machine, a)).accepted
    machine.wait(60)
    assert [contributor.peer for contributor in machine.plan.contributors] == [a]
    assert [(event.lease, event.iteration) for event in machine.of(ev.LeaseExpired)] == [
        (machine.state.round.rollouts[peer].lease.id, 1) for peer in machine.state.round.rollouts if peer != a
    ]
    assert machine.state.positions == book
    finish(machine)
    assert [lease[:3] for lease in leases(machine)] == [(a, machine.state.round.rollouts[a].lease.id, 2)]
    assert {machine.state.members[peer].lease for peer in (b, c)} == {None}


def test_reports_of_all_iterations_may_be_repeated(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    first = machine.contribution(a)
    machine.round()
    second = again(machine, a)
    assert machine.report(a, second).accepted
    count = len(machine.events)
    sent: list[Message] = [first, second]
    for message in sent:
        assert machine.report(a, message).accepted, "each is known by lease and iteration"
    changed = pb.Contribution()
    changed.CopyFrom(second)
    changed.root = b"x" * 32
    assert machine.report(a, changed).reason == "refused: another contribution was committed for lease 1"
    assert len(machine.events) == count
    assert machine.report(b, again(machine, b)).accepted
    assert machine.report(c, again(machine, c)).accepted
    finish(machine)
    count = len(machine.events)
    assert machine.report(a, second).accepted, "it counted in the version that was just made"
    assert machine.report(a, first).reason == "stale: lease 1 is for version 2, iteration 2"
    early = again(machine, a)
    early.iteration = 3
    assert machine.report(a, early).reason == "invalid: lease 1 is for version 2, iteration 2"
    assert len(machine.events) == count


@pytest.mark.parametrize(
    "change",
    [{"used": [0]}, {"used": [0, 1, 2, 3], "weight": 41 * 32}, {"dropped": [0]}, {"returned": [3]}],
    ids=["fewer", "heavier", "dropped", "returned"],
)
def test_an_iteration_uses_what_the_first_one_used(machine: Machine, change: dict[str, Any]) -> None:
    machine.start()
    machine.round()
    peer = next(peer for peer in machine.peers if machine.lease(peer).count == 4)
    contribution = again(machine, peer)
    for name, value in change.items():
        contribution.ClearField(name)
        contribution.MergeFrom(pb.Contribution(**{name: value}))
    count = len(machine.events)
    with pytest.raises(FrameError):
        machine.report(peer, contribution)
    assert len(machine.events) == count


def test_a_restart_in_an_iteration_round_goes_on_with_it(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.start()
    machine.round()
    assert machine.report(a, again(machine, a)).accepted
    before = leases(machine)
    machine.check_replay()
    machine.now += 10_000
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(a, b, c)
    assert leases(machine) == before
    assert machine.state.phase is Phase.ROLLOUT
    for peer in (b, c):
        assert machine.report(peer, again(machine, peer)).accepted
    finish(machine)
    assert [contributor.peer for contributor in machine.manifest.contributors] == [a, b, c]


def test_one_iteration_measures_accuracy_when_its_version_is_to_be_measured(tmp_path: Path) -> None:
    machine = Machine(evaluation={"path": "held_out.jsonl", "every": 1}, grpo={"num_iterations": 2})
    machine.start()
    machine.round()
    (measuring,) = [lease.message for lease in machine.state.leases.values() if lease.message.evaluate]
    contribution = again(machine, measuring.peer, used=[])
    contribution.metrics["eval/accuracy"] = 0.5
    assert machine.report(measuring.peer, contribution).accepted
    for peer in machine.peers:
        if peer != measuring.peer:
            assert machine.report(peer, again(machine, peer)).accepted
    finish(machine)
    assert machine.manifest.metrics == {"entropy": 0.5, "eval/accuracy": 0.5}


def make_swarm(folder: Path, **sections: dict[str, Any]) -> Swarm:
    grpo = {"num_iterations": 3} | sections.pop("grpo", {})
    config = small_config(grpo=grpo, **sections)
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(bounded())


def iterations(chain: Chain) -> list[set[int]]:
    """Of each version after the first, the iterations that its contributions are of."""
    return [
        {contributor.iteration for contributor in entry.manifest.message.contributors} for entry in chain.entries[1:]
    ]


def chain_of(swarm: Swarm) -> Chain:
    return ChainFile.open(swarm.coordinator_home).chain


def coordinator_records(swarm: Swarm, kind: str) -> list[Record]:
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)) as log:
        return [record for record in read_records(log) if record["kind"] == kind]


def metrics_of(swarm: Swarm, name: str) -> dict[tuple[int, int], Record]:
    """A peer's records of metrics, by version and iteration."""
    history = read_history(PeerHome(swarm.peer_home(name)).history)
    return {(record["version"], record["iteration"]): record for record in history if record["kind"] == "metrics"}


def roll_out(lease: int) -> None:
    """Work that takes longer than catching up by one version does, as real rollouts do."""
    time.sleep(0.2)


async def crash(swarm: Swarm, node: Node, gate: Gate) -> None:
    """End a peer whose learner is held: nothing of its contribution gets out."""
    swarm.network.crash(node.identity.peer_id)
    node.task.cancel()
    gate.open()
    await asyncio.gather(node.task, return_exceptions=True)


async def to_the_end(swarm: Swarm) -> None:
    await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
    assert swarm.coordinator is not None
    await swarm.coordinator.leave()


def test_three_updates_from_each_rollout(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, run={"start_peers": 3, "versions": 7})
    learners = {name: IntegerLearner(VALUES) for name in ("a", "b", "c")}

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name, learner in learners.items():
            await swarm.start_peer(name, learner)
        await to_the_end(swarm)

    run(scenario)
    chain = chain_of(swarm)
    assert iterations(chain) == [{0}, {1}, {2}, {0}, {1}, {2}, {0}]
    for learner in learners.values():
        assert [version for version, _ in learner.used] == list(range(7)), "each gradient is at the newest parameters"
    leased = [record for record in coordinator_records(swarm, "lease") if record["iteration"] == 0]
    assert sum(record["count"] for record in leased) == 3 * 6, "three rollouts of six groups for seven versions"
    records = metrics_of(swarm, "a")
    assert sorted(records) == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2), (6, 0)]
    assert records[0, 0]["metrics"]["reward"] == 0.5
    assert "reward" not in records[1, 1]["metrics"]
    assert records[1, 1]["metrics"]["entropy"] == 0.5
    assert_invariants(swarm)


def test_a_peer_that_restarts_between_iterations_has_lost_its_rollout_and_samples_again(tmp_path: Path) -> None:
    # Lease and grace outlast the test: the peer finds its renewed lease again. Two later versions are sampled for anew.
    swarm = make_swarm(tmp_path, run={"start_peers": 3, "versions": 7}, timing={"lease": 300.0, "grace": 60.0})

    async def scenario() -> None:
        await swarm.start_coordinator()
        gate = Gate(at=2)
        await swarm.start_peer("a", IntegerLearner(VALUES, before=roll_out))
        await swarm.start_peer("b", IntegerLearner(VALUES, before=roll_out))
        victim = await swarm.start_peer("c", IntegerLearner(VALUES, before=gate))
        await gate.reached.wait()
        await crash(swarm, victim, gate)
        await swarm.start_peer("c", IntegerLearner(VALUES, before=roll_out))
        await to_the_end(swarm)

    run(scenario)
    victim = swarm.identities["c"].peer_id
    chain = chain_of(swarm)
    assert iterations(chain) == [{0}, {1}, {2}, {0}, {1}, {2}, {0}]
    first, *later = [
        entry.manifest.message.version
        for entry in chain.entries[1:]
        if victim in {contributor.peer for contributor in entry.manifest.message.contributors}
    ]
    assert first == 1
    assert later
    assert later[0] in (4, 7)
    assert "not here any more" in metrics_of(swarm, "c")[1, 1]["note"]
    assert_invariants(swarm)


def test_the_coordinator_dies_in_an_iteration_round_and_goes_on_with_it(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, run={"versions": 4}, timing={"lease": 300.0, "grace": 60.0})

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        gate = Gate(at=2)
        await swarm.start_peer("a", IntegerLearner(VALUES))
        await swarm.start_peer("b", IntegerLearner(VALUES, before=gate))
        await gate.reached.wait()
        await swarm.crash(coordinator)
        await swarm.start_coordinator()
        gate.open()
        await to_the_end(swarm)

    run(scenario)
    assert iterations(chain_of(swarm)) == [{0}, {1}, {2}, {0}]
    granted = Counter((record["lease"], record["iteration"]) for record in coordinator_records(swarm, "lease"))
    assert set(granted.values()) == {1}
    assert coordinator_records(swarm, "round_abandoned") == []
    assert_invariants(swarm)


class ForgetfulLearner(IntegerLearner):
    """Keeps no rollout."""

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        return None


def test_when_all_rollouts_are_lost_prompts_are_sampled_again(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, run={"versions": 3})

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, ForgetfulLearner(VALUES))
        await to_the_end(swarm)

    run(scenario)
    assert iterations(chain_of(swarm)) == [{0}, {0}, {0}]
    assert [record["version"] for record in coordinator_records(swarm, "round_abandoned")] == [2, 3]
    assert_invariants(swarm)
