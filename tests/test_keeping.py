"""What peers keep on disk: what the policy says, after any jump, and nothing that is damaged."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.joiner import Joiner
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.versions import KEPT_ANCHORS, Versions, ref_of
from hivegrpo.protocol.blobstore import PART, BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.identity import Identity

VALUES = 40_000
OLD = bytes(range(32))
"""A blob of nothing that the chain knows."""


def make_swarm(folder: Path, config: RunConfig) -> Swarm:
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def kept_by(chain: Chain, newest: int, anchors: list[int]) -> set[bytes]:
    """Names of the spans of the last two versions, and of some anchors' states."""
    manifests = [chain.entries[version].manifest.message for version in range(newest + 1)]
    spans = {span.root for manifest in manifests[-2:] for span in manifest.spans}
    return spans | {manifests[anchor].state.root for anchor in anchors}


def test_no_peer_keeps_old_versions_however_it_came_by_the_new_ones(tmp_path: Path) -> None:
    """Two make them all; one is away for most of them, and finds the rests of a killed process in its home."""
    config = small_config(run={"start_peers": 3, "versions": 8}, distribution={"anchor_every": 2, "keep_versions": 2})
    swarm = make_swarm(tmp_path, config)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        away = await swarm.start_peer("away", IntegerLearner(VALUES))
        await swarm.committed(2)
        await swarm.crash(away)
        await swarm.committed(6)
        blobs = PeerHome(swarm.peer_home("away")).blobs
        for name in (OLD.hex(), f"{PART}{OLD.hex()}"):
            (blobs / name).write_bytes(b"rest")
            os.utime(blobs / name, (0, 0))
        await swarm.start_peer("away", IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))
    for name in ("a", "b", "away"):
        home = PeerHome(swarm.peer_home(name))
        chain = ChainFile.open(home.root).chain
        assert chain.height == 8
        store = BlobStore(home.blobs)
        anchors = [version for version in (6, 8) if store.has(ref_of(chain.entries[version].manifest.message.state))]
        assert 8 in anchors
        assert len(anchors) <= KEPT_ANCHORS
        kept = kept_by(chain, 8, anchors)
        assert store.roots() <= kept
        assert store.roots() == kept or name == "away", "who came by an anchor has no older updates"
        assert {path.name for path in store.folder.iterdir()} == {root.hex() for root in store.roots()}


@pytest.mark.parametrize("damage", ["anchor", "update", "both"])
def test_what_is_damaged_on_disk_is_had_from_others(tmp_path: Path, damage: str) -> None:
    config = small_config(run={"versions": 5}, distribution={"anchor_every": 4})
    swarm = make_swarm(tmp_path, config)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        home = PeerHome(swarm.peer_home("a"))
        store = BlobStore(home.blobs)
        last = ChainFile.open(home.root).chain.entries[5].manifest.message
        store.remove(last.state.root)  # so that the fifth version is an update on the fourth
        fourth = ChainFile.open(home.root).chain.entries[4].manifest.message.state
        damaged = {"anchor": [fourth], "update": [last.spans[0]], "both": [fourth, last.spans[0]]}[damage]
        for blob in damaged:
            path = store.folder / blob.root.hex()
            path.write_bytes(bytes(blob.size))
        with ThreadPoolExecutor(max_workers=1) as worker:
            other = Joiner(swarm, swarm.peer_home("b"), swarm.identities["b"], BlobStore(tmp_path / "b/blobs"), worker)
            mended = Joiner(swarm, home.root, swarm.identities["a"], store, worker)
            await other.serve()
            await mended.serve()
            assert (damage == "anchor") == (mended.versions.version == 5), "from version 0, or not at all"
            await mended.synchronise()
            assert (mended.versions.version, mended.versions.state_root) == (5, last.state.root)
            for node in (other, mended):
                await node.transport.close()
        await coordinator.leave()
        for blob in damaged:
            path = store.folder / blob.root.hex()
            assert not path.exists() or path.read_bytes() != bytes(blob.size)

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_equal_spans_of_two_versions_go_with_the_later_one(tmp_path: Path) -> None:
    """A span of zeros has one name in all versions."""
    config = small_config(run={"versions": 4, "start_peers": 1}, distribution={"anchor_every": 2, "keep_versions": 2})
    swarm = make_swarm(tmp_path, config)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        peer = await swarm.start_peer("a", IntegerLearner(VALUES))
        await peer.task
        await coordinator.leave()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))
    home = PeerHome(swarm.peer_home("a"))
    chainfile, store = ChainFile.open(home.root), BlobStore(home.blobs)
    versions = Versions(home.root, chainfile, store, config)
    shared = Versions.span_refs
    with pytest.MonkeyPatch.context() as patch:
        same = store.add_bytes(b"the same")
        patch.setattr(
            Versions, "span_refs", lambda self, version: [same] if version in (2, 4) else shared(self, version)
        )
        versions._held.add(same.root)
        versions._prune()
        assert store.has(same)
