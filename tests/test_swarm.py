"""Whole rounds over the in-memory network: the real coordinator, the real peers, gradients made of integers."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.invariants import assert_invariants
from support.runs import IntegerLearner, Split, signed_run, small_config, vector_of
from support.swarm import Swarm

from hivegrpo.cli.prepare import prepare_run
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.preparation import _load
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError, MismatchError
from hivegrpo.protocol.history import read_history
from hivegrpo.protocol.identity import Identity

VALUES = 40_000


ROLLOUT_SECONDS = 0.3


def roll_out(lease: int) -> None:
    """Work that takes longer than catching up by one version does, as real rollouts do."""
    time.sleep(ROLLOUT_SECONDS)


def make_swarm(folder: Path, config: RunConfig) -> Swarm:
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(test: Callable[[], Awaitable[None]], seconds: float = 60.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(bounded())


def chain_of(home: Path) -> Chain:
    return ChainFile.open(home).chain


@pytest.mark.parametrize(
    ("codec", "rule"),
    [("fp32", "auto"), ("mxint8", "auto"), ("mxfp8", "trimmed_mean"), ("mxfp4", "centered_clip")],
)
def test_three_peers_train_to_the_last_version_with_one_root(tmp_path: Path, codec: str, rule: str) -> None:
    swarm = make_swarm(tmp_path, small_config(run={"start_peers": 3}, averaging={"codec": codec, "rule": rule}))

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b", "c"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    chains = [chain_of(swarm.peer_home(name)) for name in swarm.peers]
    assert [chain.height for chain in chains] == [3, 3, 3]
    assert len({chain.entries[-1].manifest.digest for chain in chains}) == 1
    assert_invariants(swarm)


def test_the_swarms_average_is_the_weighted_mean(tmp_path: Path) -> None:
    """Bar: 1e-5 relative in fp32 through the real exchange; a plain mean of uneven contributions is not it."""
    config = small_config(
        run={"start_peers": 3, "versions": 1}, averaging={"codec": "fp32"}, grpo={"prompts_per_round": 7}
    )
    swarm = make_swarm(tmp_path, config)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b", "c"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    home = swarm.peer_home("a")
    entry = chain_of(home).entries[1]
    assert entry.plan is not None
    store = BlobStore(home / "blobs")
    spans = b"".join((store.folder / span.root.hex()).read_bytes() for span in entry.manifest.message.spans)
    averaged = decode_vector(get_codec("fp32"), spans, VALUES).double()
    weights = {contributor.lease: contributor.weight for contributor in entry.plan.message.contributors}
    assert sorted(weights.values()) == [8, 8, 12]  # seven groups of four over three peers
    vectors = {lease: vector_of(lease, VALUES).double() for lease in weights}
    expected = sum(vectors[lease] * weight for lease, weight in weights.items()) / sum(weights.values())
    plain = sum(vectors.values()) / len(vectors)
    assert torch.linalg.norm(averaged - expected) / torch.linalg.norm(expected) <= 1e-5
    assert torch.linalg.norm(averaged - plain) / torch.linalg.norm(plain) > 1e-2


def test_dynamic_sampling_spends_no_more_than_a_round_needs(tmp_path: Path) -> None:
    config = small_config(
        run={"start_peers": 3, "versions": 6},
        grpo={"prompts_per_round": 12, "dynamic_sampling_factor": 2.0},
        distribution={"anchor_every": 1},
    )
    swarm = make_swarm(tmp_path, config)

    def replace_one(count: int, wanted: int) -> Split:
        most = min(wanted + 1, count)  # what came back from others may be less than twice what is wanted
        return range(1, most), (0,), range(most, count)

    def drop_all(count: int, wanted: int) -> Split:
        return (), range(count), ()

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        await swarm.start_peer("a", IntegerLearner(VALUES, before=roll_out, split=replace_one))
        await swarm.start_peer("b", IntegerLearner(VALUES, before=roll_out, split=replace_one))
        await swarm.start_peer("unlucky", IntegerLearner(VALUES, before=roll_out, split=drop_all))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    notes = [
        record["note"] for record in read_history(PeerHome(swarm.peer_home("unlucky")).history) if "note" in record
    ]
    assert "all rewards are equal" in notes
    manifests = [entry.manifest.message for entry in chain_of(swarm.coordinator_home).entries[1:]]
    lucky = {swarm.identities[name].peer_id for name in ("a", "b")}
    assert all({contributor.peer for contributor in manifest.contributors} == lucky for manifest in manifests)
    wanted: dict[int, dict[str, int]] = {}
    used: dict[int, int] = {}
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)) as log:
        for record in read_records(log):
            version = record.get("version", 0) + 1
            if record["kind"] == "lease":
                wanted.setdefault(version, {})[record["peer"]] = record["wanted"]
            elif record["kind"] == "contribution":
                used[version] = used.get(version, 0) + len(record["used"])
    # Each round leases twelve groups, by the speeds of the peers, though some of them come to nothing.
    assert [sum(shares.values()) for shares in wanted.values()] == [12] * 6
    assert {manifest.version: manifest.metrics["num_tokens"] for manifest in manifests} == {
        version: 10.0 * groups for version, groups in used.items()
    }
    assert_invariants(swarm)


def test_what_looks_at_a_whole_batch_is_neither_launched_nor_joined(tmp_path: Path) -> None:
    config, store = small_config(grpo={"scale_rewards": "batch"}), BlobStore(tmp_path)
    with pytest.raises(ConfigError, match="whole batch"):
        prepare_run(config, Identity.generate(), store)
    with pytest.raises(MismatchError, match="whole batch"):
        _load(pb.RunManifest(), config, PeerConfig(), store, tmp_path)


def test_a_peer_that_dies_in_the_rollout_costs_its_lease_and_nothing_else(tmp_path: Path) -> None:
    # The lease itself outlasts the test: only the grace of a lost peer can free it.
    config = small_config(run={"start_peers": 3, "versions": 4}, timing={"lease": 300.0})
    swarm = make_swarm(tmp_path, config)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        loop = asyncio.get_running_loop()
        working = asyncio.Event()

        def hang(lease: int) -> None:
            loop.call_soon_threadsafe(working.set)

        await swarm.start_peer("a", IntegerLearner(VALUES))
        await swarm.start_peer("b", IntegerLearner(VALUES))
        victim = await swarm.start_peer("c", IntegerLearner(VALUES, before=hang))
        await working.wait()
        await swarm.crash(victim)
        await asyncio.gather(swarm.peers["a"].task, swarm.peers["b"].task)
        await coordinator.leave()

    run(scenario)
    assert chain_of(swarm.peer_home("a")).height == 4
    assert_invariants(swarm)


def test_a_late_joiner_verifies_the_chain_and_contributes(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, small_config(run={"start_peers": 2, "versions": 10}))

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, before=roll_out))
        await swarm.committed(5)
        await swarm.start_peer("late", IntegerLearner(VALUES, before=roll_out))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    late = swarm.identities["late"].peer_id
    chain = chain_of(swarm.peer_home("late"))
    contributed = [
        entry.manifest.message.version
        for entry in chain.entries
        if late in {contributor.peer for contributor in entry.manifest.message.contributors}
    ]
    assert contributed[0] <= 8  # it can start at version 5 or 6, and has two rounds
    assert_invariants(swarm)


def test_the_coordinator_dies_in_mid_round_and_goes_on_from_its_log(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, small_config(run={"start_peers": 2, "versions": 6}))

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        await swarm.start_peer("a", IntegerLearner(VALUES))
        await swarm.start_peer("b", IntegerLearner(VALUES))
        await swarm.committed(2)
        await swarm.crash(coordinator)
        coordinator = await swarm.start_coordinator()
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    assert chain_of(swarm.peer_home("b")).height == 6
    assert_invariants(swarm)
