"""The KL reference moves to later versions by the coordinator's signed event, and every peer has its parameters."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.invariants import assert_invariants
from support.runs import Gate, IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator import decide, planning
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.step import state_from_bytes
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.errors import ChainError
from hivegrpo.protocol.identity import Identity

VALUES = 40_000


def roll_out(lease: int) -> None:
    """Work that takes longer than catching up by one version does, as real rollouts do."""
    time.sleep(0.2)


class Keeper(IntegerLearner):
    """Remembers the parameters of every version that it worked under."""

    def __init__(self, before: Callable[[int], None] | None = None) -> None:
        super().__init__(VALUES, before)
        self.parameters: dict[int, torch.Tensor] = {}

    def load(self, version: int, vector: torch.Tensor) -> None:
        super().load(version, vector)
        self.parameters[version] = self.loaded


def make_swarm(folder: Path, **sections: dict[str, Any]) -> Swarm:
    grpo = {"beta": 0.1, "ref_model_sync_steps": 3} | sections.pop("grpo", {})
    config = small_config(grpo=grpo, **sections)
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def to_the_end(swarm: Swarm) -> None:
    await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
    assert swarm.coordinator is not None
    await swarm.coordinator.leave()


async def stored(swarm: Swarm, version: int, home: Path) -> None:
    """Until that version's state is there. Nobody tells when: look again and again, for as long as `run` does."""
    store, state = BlobStore(home / "blobs"), chain_of(swarm).entries[version].manifest.message.state
    while not store.has(ref_of(state)):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def chain_of(swarm: Swarm) -> Chain:
    return ChainFile.open(swarm.coordinator_home).chain


def held_states(store: BlobStore, chain: Chain) -> list[int]:
    """Versions, after the first, whose state is there whole."""
    manifests = [entry.manifest.message for entry in chain.entries[1:]]
    return [manifest.version for manifest in manifests if store.has(ref_of(manifest.state))]


def assert_references(learner: Keeper, parameters: dict[int, torch.Tensor], every: int = 3) -> None:
    """Each of its gradients was taken with the right reference, and each reference was loaded once."""
    for version, reference in learner.used:
        expected = parameters.get(version - version % every) if version >= every else None
        assert (reference is None) == (expected is None), version
        if reference is not None and expected is not None:
            assert torch.equal(reference, expected), version
    moves = {version - version % every for version, _ in learner.used if version >= every}
    assert len(learner.references) == len(moves)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_reference_moves_every_so_many_versions(tmp_path: Path, num_iterations: int) -> None:
    swarm = make_swarm(tmp_path, run={"versions": 10}, grpo={"num_iterations": num_iterations})
    learners = {"a": Keeper(), "b": Keeper()}

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name, learner in learners.items():
            await swarm.start_peer(name, learner)
        await to_the_end(swarm)

    run(scenario)
    chain = chain_of(swarm)
    assert [entry.manifest.message.reference_version for entry in chain.entries] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9]
    for version, entry in enumerate(chain.entries[1:]):
        assert {one.iteration for one in entry.manifest.message.contributors} == {version % num_iterations}
    for learner in learners.values():
        assert [version for version, _ in learner.used] == list(range(10))
        assert_references(learner, learners["a"].parameters)
    for home in (swarm.coordinator_home, *map(swarm.peer_home, swarm.peers)):
        assert 9 in held_states(BlobStore(home / "blobs"), chain), "though only every second version is an anchor"
    assert_invariants(swarm)


def test_a_late_joiner_gets_the_reference_and_a_restarted_peer_finds_it(tmp_path: Path) -> None:
    # Every version is an anchor, of which the newest two are kept: the reference is kept beside them.
    swarm = make_swarm(
        tmp_path, run={"versions": 11}, grpo={"ref_model_sync_steps": 4}, distribution={"anchor_every": 1}
    )
    b, late, again = (Keeper(roll_out) for _ in range(3))
    learners = [b, late, again]

    async def scenario() -> None:
        await swarm.start_coordinator()
        gate = Gate(at=7)
        learners.append(Keeper(before=gate))
        await swarm.start_peer("a", learners[-1])
        victim = await swarm.start_peer("b", b)
        await gate.reached.wait()  # under version 6
        await swarm.start_peer("late", late)
        await stored(swarm, 4, swarm.peer_home("late"))
        await swarm.crash(victim)
        await swarm.start_peer("b", again)
        gate.open()
        await to_the_end(swarm)

    run(scenario)
    parameters = {version: vector for learner in learners for version, vector in learner.parameters.items()}
    assert late.used
    assert again.used
    for learner in learners:
        assert_references(learner, parameters, every=4)
    chain = chain_of(swarm)
    for home in (swarm.coordinator_home, *map(swarm.peer_home, swarm.peers)):
        held = held_states(BlobStore(home / "blobs"), chain)
        assert (held[0], held[-1]) == (8, 11), "the reference, and the last"
        assert len(held) <= 3
    assert_invariants(swarm)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_restarted_peer_has_the_reference_of_the_versions_it_samples_under(tmp_path: Path, damaged: bool) -> None:
    """From its own disk; and from the coordinator, if its own copy is damaged."""
    swarm = make_swarm(tmp_path, run={"versions": 5, "start_peers": 1}, distribution={"anchor_every": 1})
    after = Keeper()
    store = BlobStore(PeerHome(swarm.peer_home("a")).blobs)

    async def scenario() -> None:
        await swarm.start_coordinator()
        gate = Gate(at=5)
        peer = await swarm.start_peer("a", IntegerLearner(VALUES, before=gate))
        await gate.reached.wait()
        await stored(swarm, 3, swarm.coordinator_home)
        peer.stop.set()
        gate.open()
        await peer.leave()
        path = store.path(ref_of(chain_of(swarm).entries[3].manifest.message.state))
        assert path is not None
        if damaged:
            path.write_bytes(bytes(path.stat().st_size))
        await swarm.start_peer("a", after)
        await to_the_end(swarm)

    run(scenario)
    assert [version for version, _ in after.used] == [4]
    (reference,) = after.references
    assert reference is not None
    ref = ref_of(chain_of(swarm).entries[3].manifest.message.state)
    state = store.read(ref)
    assert blob_root(state) == ref.root
    assert torch.equal(state_from_bytes(state, VALUES).parameters, reference)


def test_a_run_without_a_reference_keeps_none(tmp_path: Path) -> None:
    swarm = make_swarm(
        tmp_path,
        run={"versions": 4},
        grpo={"beta": 0.0, "ref_model_sync_steps": None},
        distribution={"anchor_every": 100},
    )
    learner = Keeper()

    async def scenario() -> None:
        await swarm.start_coordinator()
        await swarm.start_peer("a", learner)
        await swarm.start_peer("b", Keeper())
        await to_the_end(swarm)

    run(scenario)
    chain = chain_of(swarm)
    assert [entry.manifest.message.reference_version for entry in chain.entries] == [0, 0, 0, 0, 0]
    assert learner.references == []
    assert held_states(BlobStore(PeerHome(swarm.peer_home("a")).blobs), chain) == [4], "the last"


def test_a_reference_that_the_settings_do_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that moved it at every version would take the KL penalty away."""
    monkeypatch.setattr(planning, "reference_of", lambda version, before, grpo: version)
    swarm = make_swarm(tmp_path, run={"versions": 3})
    ends: list[Any] = []

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        peers = [await swarm.start_peer(name, Keeper()) for name in "ab"]
        ends.extend(await asyncio.gather(*(peer.task for peer in peers), return_exceptions=True))
        await coordinator.leave()

    run(scenario)
    assert all(isinstance(end, ChainError) and "KL reference" in str(end) for end in ends)
    assert ChainFile.open(swarm.peer_home("a")).chain.height == 0


def test_a_lease_with_another_reference_than_the_chains_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that says one thing to a peer and another to the world gets no gradient for it."""
    swarm = make_swarm(tmp_path, run={"versions": 1}, timing={"lease": 1.0})
    lease_payload = decide.lease_payload

    def two_faced(*arguments: Any, **settings: Any) -> bytes:
        lease = pb.Lease.FromString(lease_payload(*arguments, **settings))
        lease.reference_version = 1 if lease.id <= 2 else 0
        return lease.SerializeToString(deterministic=True)

    monkeypatch.setattr(decide, "lease_payload", two_faced)
    worked: list[int] = []

    async def scenario() -> None:
        await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, before=worked.append))
        await to_the_end(swarm)

    run(scenario)
    assert sorted(worked) == [3, 4]
