"""Going back to an older version: the pure machine in every phase, the chain, and whole swarms with late joiners."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.invariants import assert_invariants
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator import orders
from hivegrpo.coordinator.operator import Operator
from hivegrpo.coordinator.rollback import rollback_events
from hivegrpo.coordinator.state import Phase
from hivegrpo.peer.inference.locate import open_run
from hivegrpo.peer.inference.states import available, policy_vector
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.step import PolicyState, state_bytes
from hivegrpo.peer.swarm import versions
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import parse, sign
from hivegrpo.protocol.errors import ChainError, ConfigError
from hivegrpo.protocol.history import read_history
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check
from hivegrpo.protocol.scalars import StepScalars, to_fp32

VALUES = 40_000
BETA2 = 0.999


def to_rollout(machine: Machine) -> None:
    """Leases are out."""


def to_a_contribution(machine: Machine) -> None:
    machine.contribute(machine.peers[0])


def to_exchange(machine: Machine) -> None:
    machine.contribute(*machine.peers)


def to_step(machine: Machine) -> None:
    machine.contribute(*machine.peers)
    machine.exchange()


def to_a_vote(machine: Machine) -> None:
    to_step(machine)
    machine.vote(machine.peers[0])


def manifests(machine: Machine) -> list[pb.VersionManifest]:
    return [parse(pb.VersionManifest, event.payload) for event in machine.of(ev.VersionCommitted)]


def go_back(machine: Machine, version: int) -> None:
    machine.happen(*rollback_events(machine.state, manifests(machine)[version], machine.now))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reach", [to_rollout, to_a_contribution, to_exchange, to_step, to_a_vote])
def test_a_rollback_leaves_nothing_of_the_round_in_flight(reach: Callable[[Machine], None], overlap: bool) -> None:
    machine = Machine(run={"versions": 9}, averaging={"overlap": overlap})
    machine.start()
    machine.round()
    machine.round()
    reach(machine)
    spent_before = {position for used in counted(machine) for position in used}
    go_back(machine, 1)

    back = machine.manifest
    assert (back.version, back.restores, back.state.root) == (3, 1, bytes([1]) * 32)
    assert (back.plan, back.seal, list(back.spans), list(back.contributors)) == (b"", b"", [], [])
    state = machine.state
    assert state.phase is Phase.ROLLOUT
    assert (state.leases, state.ahead.leases, state.round.contributions, state.round.attempt) == ({}, {}, {}, None)
    positions = range(state.positions.cursor)
    assert sorted(set(machine.accounted()) | spent_before) == list(positions), "what did not count is free again"
    machine.check_replay()

    machine.ready(*machine.peers, version=3, root=back.state.root)
    machine.round()
    assert machine.manifest.version == 4
    assert machine.manifest.parent != back.parent
    machine.check_replay()


def counted(machine: Machine) -> list[list[int]]:
    """Positions of each contribution that is in a version."""
    named = {contributor.lease for manifest in manifests(machine) for contributor in manifest.contributors}
    signed = [parse(pb.Signed, event.signed) for event in machine.of(ev.ContributionReceived)]
    contributions = [parse(pb.Contribution, item.payload) for item in signed]
    starts = {lease.id: lease.start for lease in (parse(pb.Lease, e.payload) for e in machine.of(ev.LeaseGranted))}
    return [[starts[c.lease] + offset for offset in c.used] for c in contributions if c.lease in named]


def test_bias_corrections_go_on_from_the_older_state_and_the_rate_follows_the_version() -> None:
    machine = Machine(run={"versions": 10}, optimizer={"lr_scheduler_type": "linear", "learning_rate": 1.0})
    machine.start()
    for _ in range(4):
        machine.round()
    go_back(machine, 2)  # version 5: two steps
    machine.ready(*machine.peers, version=5, root=bytes([2]) * 32)
    machine.round()  # version 6: three steps
    go_back(machine, 6 - 1)  # version 7: that of version 5, two steps
    machine.ready(*machine.peers, version=7, root=bytes([2]) * 32)
    machine.contribute(*machine.peers)
    scalars = StepScalars.from_bits(list(machine.plan.scalars))
    expected = StepScalars.for_step(
        3, learning_rate=1.0 - 7 / 10, beta1=0.9, beta2=BETA2, epsilon=1e-8, weight_decay=0.0
    )
    assert scalars == expected
    machine.exchange()
    machine.vote(*machine.peers)
    machine.contribute(*machine.peers)
    assert StepScalars.from_bits(list(machine.plan.scalars)).reciprocal_bias1 == to_fp32(1.0 / (1.0 - 0.9**4))
    machine.check_replay()


def test_late_votes_and_contributions_of_what_was_given_up_are_stale() -> None:
    machine = Machine(run={"versions": 9})
    machine.start()
    machine.round()
    to_step(machine)
    vote = machine.step_report()
    contribution = machine.of(ev.ContributionReceived)[-1]
    go_back(machine, 0)
    assert machine.report(machine.peers[0], vote).reason.startswith("stale: ")
    signed = parse(pb.Signed, contribution.signed)
    again = machine.report(signed.signer, parse(pb.Contribution, signed.payload))
    assert again.reason.startswith("stale: lease ")


class Forger:
    """A chain of versions 0 to 2, the last a rollback to 0, whose manifests can be changed and signed again."""

    def __init__(self) -> None:
        self.machine = Machine(run={"versions": 9})
        self.machine.start()
        self.machine.round()
        go_back(self.machine, 0)
        self.chain = Chain(self.machine.run, self.machine.coordinator.peer_id)
        (plan,) = self.machine.of(ev.PlanMade)
        (seal,) = self.machine.of(ev.SealMade)
        zero, one, self.back = manifests(self.machine)
        self.plan, self.seal = parse(pb.RoundPlan, plan.payload), parse(pb.Seal, seal.payload)
        self.chain.append(pb.ChainEntry(manifest=self.sign(zero)))
        self.chain.append(self.whole(one))

    def sign(self, message: Any) -> pb.Signed:
        return sign(self.machine.coordinator, self.machine.run_id, message)

    def whole(self, manifest: pb.VersionManifest) -> pb.ChainEntry:
        return pb.ChainEntry(manifest=self.sign(manifest), plan=self.sign(self.plan), seal=self.sign(self.seal))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": pb.Blob(root=b"x" * 32, size=8)}, "not to its state and reference"),
        ({"reference_version": 1}, "not to its state and reference"),
        ({"restores": 1}, "not to its state and reference"),
        ({"restores": 2}, "is no rollback to an older version"),
        ({"plan": b"p" * 32}, "names a plan or a seal"),
        ({"spans": [pb.Blob(root=b"s" * 32, size=1)]}, "is no rollback"),
        ({"contributors": [pb.Contributor(peer="someone")]}, "is no rollback"),
        ({"parent": b"p" * 32}, "does not continue the chain"),
        ({"version": 3}, "Expected version 2, got 3"),
    ],
)
def test_a_chain_takes_no_rollback_that_is_none(change: dict[str, Any], reason: str) -> None:
    forger = Forger()
    bad = pb.VersionManifest()
    bad.CopyFrom(forger.back)
    for name, value in change.items():
        bad.ClearField(name)
        bad.MergeFrom(pb.VersionManifest(**{name: value}))
    with pytest.raises(ChainError, match=reason):
        forger.chain.append(pb.ChainEntry(manifest=forger.sign(bad)))
    assert forger.chain.append(pb.ChainEntry(manifest=forger.sign(forger.back))).plan is None


def test_the_reference_goes_back_only_by_order() -> None:
    forger = Forger()
    machine = forger.machine
    machine.ready(*machine.peers, version=2, root=b"0" * 32)
    forger.chain.append(pb.ChainEntry(manifest=forger.sign(forger.back)))
    machine.round()
    manifest = manifests(machine)[-1]
    forger.plan = parse(pb.RoundPlan, machine.of(ev.PlanMade)[-1].payload)
    forger.seal = parse(pb.Seal, machine.of(ev.SealMade)[-1].payload)
    manifest.reference_version = 1
    with pytest.raises(ChainError, match="goes back to an older reference"):
        forger.chain.append(forger.whole(manifest))
    manifest.promoted = True
    forger.chain.append(forger.whole(manifest))


async def nothing_to_wait_for() -> None:
    """Of a log that is not there."""


def test_what_was_leased_ahead_is_leased_anew_when_the_reference_is_to_move(tmp_path: Path) -> None:
    machine = Machine(run={"versions": 9}, averaging={"overlap": True}, grpo={"beta": 0.1})
    machine.start()
    machine.round()
    to_exchange(machine)
    before = set(machine.state.ahead.leases)
    assert len(before) == len(machine.peers)
    operator = Operator(
        identity=machine.coordinator,
        chain=Chain(machine.run, machine.coordinator.peer_id),
        blobs=BlobStore(tmp_path),
        state=lambda: machine.state,
        ready=nothing_to_wait_for,
        happen=lambda events: machine.happen(*events),
        written=nothing_to_wait_for,
        snapshot=dict,
        clock=lambda: machine.now,
    )
    answer = asyncio.run(operator.execute(orders.PromoteReference(command="promote-reference")))
    assert answer == {"version": 2, "reference_version": 2}
    ahead = [granted.message for granted in machine.state.ahead.leases.values()]
    assert len(ahead) == len(before)
    assert before.isdisjoint(lease.id for lease in ahead)
    assert {lease.reference_version for lease in ahead} == {2}
    machine.exchange()
    machine.vote(*machine.peers)
    assert (machine.manifest.reference_version, machine.manifest.promoted) == (2, True)
    machine.check_replay()


def make_swarm(folder: Path, **sections: dict[str, Any]) -> Swarm:
    tables: dict[str, dict[str, Any]] = {"distribution": {"anchor_every": 1}, "run": {"versions": 8}}
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    config = small_config(**tables)
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@pytest.fixture(autouse=True)
def peers_keep_anchors_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """These rounds take a tenth of a second: what the coordinator fetches is not to be gone in the middle of it."""
    monkeypatch.setattr(versions, "KEPT_ANCHORS", 100)


async def order(swarm: Swarm, command: str, **rest: Any) -> dict[str, Any]:
    assert swarm.service is not None
    return await swarm.service.operator.execute(orders.read_order.validate_python({"command": command, **rest}))


async def kept_in_a_pause(swarm: Swarm) -> list[int]:
    """Versions whose state the coordinator has, once the round in flight has ended; the run is paused from then on.

    Nobody tells when: look again and again, for as long as `run` does.
    """
    assert swarm.service is not None
    await order(swarm, "pause")
    while swarm.service.state.leases or swarm.service.state.phase is not Phase.ROLLOUT:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    while not swarm.service._archive.idle:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    archived: list[int] = swarm.service.snapshot()["archived"]
    return archived


async def leased(swarm: Swarm) -> None:
    """Go on after a pause, until there are leases."""
    swarm.events.clear()
    await order(swarm, "resume")
    await swarm.happened(lambda event: isinstance(event, ev.LeaseGranted))


def entries(swarm: Swarm) -> list[pb.VersionManifest]:
    return [entry.manifest.message for entry in ChainFile.open(swarm.coordinator_home).chain.entries]


class Keeper(IntegerLearner):
    """Remembers the parameters of every version that it worked under."""

    parameters: dict[int, torch.Tensor]

    def load(self, version: int, vector: torch.Tensor) -> None:
        super().load(version, vector)
        self.parameters = getattr(self, "parameters", {}) | {version: self.loaded}


def roll_out(_: int) -> None:
    """Long enough for orders to come in the middle of it."""
    time.sleep(0.12)


async def to_the_end(swarm: Swarm, *names: str) -> None:
    await asyncio.gather(*(swarm.peers[name].task for name in names))
    assert swarm.coordinator is not None
    await swarm.coordinator.leave()


def heights(swarm: Swarm, names: Sequence[str]) -> list[int]:
    return [ChainFile.open(swarm.peer_home(name)).chain.height for name in names]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_peers_late_joiners_and_restarts_follow_a_rollback(tmp_path: Path, beta: float) -> None:
    grpo = {"beta": beta, "ref_model_sync_steps": 3} if beta else {}
    swarm = make_swarm(tmp_path, grpo=grpo)

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, roll_out))
        await swarm.committed(2)
        older = (await kept_in_a_pause(swarm))[-2]
        await leased(swarm)
        answer = await order(swarm, "rollback", version=older)
        back = answer["version"]
        assert entries(swarm)[back].state == entries(swarm)[older].state
        assert entries(swarm)[back].reference_version == entries(swarm)[older].reference_version
        assert answer["state_root"] == entries(swarm)[older].state.root.hex()
        assert swarm.coordinator is not None
        await swarm.crash(swarm.coordinator)
        await swarm.start_coordinator()
        await swarm.start_peer("late", IntegerLearner(VALUES, roll_out))
        await swarm.committed(back + 1)
        for home in (swarm.peer_home("b"), swarm.coordinator_home):
            assert BlobStore(home / "blobs").has(ref_of(entries(swarm)[back].state)), "pruning the older one spares it"
        await swarm.crash(swarm.peers["a"])
        await swarm.start_peer("a", IntegerLearner(VALUES, roll_out))
        await to_the_end(swarm, "a", "b", "late")

    run(scenario)
    assert heights(swarm, ("a", "b", "late")) == [8, 8, 8]
    assert_invariants(swarm)
    for name in ("a", "b", "late"):
        assert open_run(swarm.peer_home(name)).has(ref_of(entries(swarm)[8].state))


def test_no_work_is_done_on_a_lease_ahead_that_a_rollback_ended(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, averaging={"overlap": True}, run={"versions": 6})

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, roll_out))
        await swarm.committed(2)
        swarm.events.clear()
        await swarm.happened(lambda event: isinstance(event, ev.LeaseGranted) and parse(pb.Lease, event.payload).ahead)
        await order(swarm, "rollback", version=0)
        await to_the_end(swarm, "a", "b")

    run(scenario)
    assert_invariants(swarm)
    for name in ("a", "b"):
        records = list(read_history(swarm.peer_home(name) / "history.jsonl"))
        done = {record["lease"] for record in records if record["kind"] == "contribution"}
        assert done == {record["lease"] for record in records if record["kind"] == "contribution_acked"}


def test_a_rollback_to_version_0_is_made_from_the_seed(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, distribution={"anchor_every": 3}, run={"versions": 5})

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, roll_out))
        await swarm.committed(2)
        await order(swarm, "pause")
        answer = await order(swarm, "rollback", version=0)
        await swarm.start_peer("late", IntegerLearner(VALUES, roll_out))
        await swarm.happened(
            lambda event: (
                isinstance(event, ev.PeerReady)
                and event.version == answer["version"]
                and event.peer == swarm.identities["late"].peer_id
            )
        )
        await order(swarm, "resume")
        await to_the_end(swarm, "a", "b", "late")

    run(scenario)
    assert heights(swarm, ("a", "b", "late")) == [5, 5, 5]
    assert_invariants(swarm)
    back = next(manifest for manifest in entries(swarm) if manifest.HasField("restores"))
    layout = [(tensor.name, tuple(tensor.shape)) for tensor in parse(pb.RunManifest, swarm.run.payload).layout]
    first = PolicyState.initial(version_zero(layout, swarm.config, None))
    assert back.state.root == blob_root(state_bytes(first))
    held = open_run(swarm.folder)
    assert back.version in available(held)
    assert (policy_vector(held, back.version, tmp_path) == first.parameters).all()
    policy_vector(held, back.version + 1, tmp_path)  # raises unless the updates lead to its signed root
    for store in held.stores:
        store.remove(back.state.root)
    assert back.version in available(held)
    assert (policy_vector(held, back.version, tmp_path) == first.parameters).all(), "by way of version 0 itself"


def test_a_rollback_that_cannot_be_served_is_refused_with_what_can(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, distribution={"anchor_every": 4}, run={"versions": 3})

    async def scenario() -> None:
        await swarm.start_coordinator()
        with pytest.raises(ConfigError, match="no version to roll back yet"):
            await order(swarm, "rollback", version=0)
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, roll_out))
        await swarm.committed(2)
        with pytest.raises(ConfigError, match=r"Version 1 cannot be the new version: its state is not kept here. Kept"):
            await order(swarm, "rollback", version=1)
        with pytest.raises(ConfigError, match="Version 9 cannot be the new version: the newest is 2"):
            await order(swarm, "rollback", version=9)
        with pytest.raises(ConfigError, match="newest version is 2 already"):
            await order(swarm, "rollback", version=2)
        with pytest.raises(ConfigError, match="beta = 0"):
            await order(swarm, "promote-reference")
        await swarm.committed(3)
        with pytest.raises(ConfigError, match="finished"):
            await order(swarm, "rollback", version=0)
        await to_the_end(swarm, "a", "b")

    run(scenario)
    assert_invariants(swarm)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_operator_moves_the_reference_forwards_and_back(tmp_path: Path, overlap: bool) -> None:
    swarm = make_swarm(tmp_path, grpo={"beta": 0.1}, averaging={"overlap": overlap}, run={"versions": 9})
    learner = Keeper(VALUES, roll_out)

    async def scenario() -> None:
        await swarm.start_coordinator()
        await swarm.start_peer("a", learner)
        await swarm.start_peer("b", IntegerLearner(VALUES, roll_out))
        await swarm.committed(2)
        moved = await order(swarm, "promote-reference")
        assert moved["reference_version"] == moved["version"]
        await swarm.committed(moved["version"] + 1)
        kept = await kept_in_a_pause(swarm)
        await leased(swarm)
        older = await order(swarm, "promote-reference", version=kept[-1])
        await swarm.committed(older["version"] + 1)
        base = await order(swarm, "promote-reference", version=0)
        await swarm.start_peer("late", IntegerLearner(VALUES, roll_out))
        await to_the_end(swarm, "a", "b", "late")
        made = entries(swarm)
        ordered = {answer["version"]: answer["reference_version"] for answer in (moved, older, base)}
        assert len(ordered) == 3
        expected = [0]
        for version in range(1, len(made)):
            expected.append(ordered.get(version, expected[-1]))
        assert [manifest.reference_version for manifest in made] == expected
        assert [manifest.version for manifest in made if manifest.promoted] == sorted(ordered)
        assert len(learner.used) >= 8
        for version, reference in learner.used:
            wanted = learner.parameters[expected[version]] if expected[version] else None
            assert (reference is None) == (wanted is None), version
            assert reference is None or torch.equal(reference, wanted), version

    run(scenario)
    assert heights(swarm, ("a", "b", "late")) == [9, 9, 9]
    assert_invariants(swarm)


def test_the_checker_sees_a_rollback_to_another_state() -> None:
    machine = Machine(run={"versions": 9})
    machine.start()
    machine.round()
    records: list[dict[str, Any]] = [
        {"kind": "run", "run_id": machine.run_id},
        {"kind": "version", "version": 0, "parent": machine.run_id, "digest": "d0", "state_root": "r0"}
        | {"contributors": [], "spans": [], "restores": None, "at": 1.0},
        {"kind": "version", "version": 1, "parent": "d0", "digest": "d1", "state_root": "r0", "restores": 0}
        | {"contributors": [], "spans": [], "at": 2.0},
    ]
    assert check(records, {}) == []
    records[-1] |= {"state_root": "r1"}
    assert [violation.invariant for violation in check(records, {})] == [1]
    records[-1] |= {"restores": 1, "state_root": "r1"}
    assert [violation.invariant for violation in check(records, {})] == [1], "it is no older version"
    records[-1] |= {"restores": 0, "state_root": "r0", "spans": [{"root": "s", "size": 1}]}
    assert [violation.invariant for violation in check(records, {})] == [2]
