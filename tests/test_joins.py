"""Late joins at once onto a run with three holders, in memory; `make bench-joins` does it with processes over libp2p.

One holder serves wrong pieces, one dies in mid-transfer, and nobody tells the joiners where the others are.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.joiner import Joiner
from support.runs import Gate, IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.peer.home import PeerHome
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.identity import Identity

VALUES = 300_000
STATE_BYTES = 12 * VALUES + 8
JOINERS = 30
HOLDERS = ("honest", "liar", "dying")


class LyingStore(BlobStore):
    """Every piece that is served has a wrong byte."""

    def read_piece(self, ref: BlobRef, index: int) -> bytes | None:
        piece = super().read_piece(ref, index)
        return piece and piece[:-1] + bytes([piece[-1] ^ 1])


class DyingStore(BlobStore):
    """Tells when it has served some pieces, and has more to give."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.mid_transfer = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._served = 0

    def read_piece(self, ref: BlobRef, index: int) -> bytes | None:
        self._served += 1
        if self._served == 10:
            self._loop.call_soon_threadsafe(self.mid_transfer.set)
        return super().read_piece(ref, index)


async def make_versions(swarm: Swarm) -> None:
    """Three versions, the second an anchor; all three peers hold them, and stop in the gradient of the fourth."""
    coordinator = await swarm.start_coordinator()
    gates = [Gate(4) for _ in HOLDERS]
    for name, gate in zip(HOLDERS, gates, strict=True):
        await swarm.start_peer(name, IntegerLearner(VALUES, before=gate))
    for gate in gates:
        await gate.reached.wait()
    for node in swarm.peers.values():
        swarm.network.crash(node.identity.peer_id)
        node.task.cancel()
    for gate in gates:
        gate.open()
    await asyncio.gather(*(node.task for node in swarm.peers.values()), return_exceptions=True)
    await coordinator.leave()


@pytest.mark.parametrize("hints", [True, False], ids=["with the DHT", "without it"])
def test_thirty_join_at_once_through_three_holders_of_which_one_lies_and_one_dies(tmp_path: Path, hints: bool) -> None:
    config = small_config(run={"start_peers": 3, "versions": 100}, distribution={"anchor_every": 2})
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)

    async def scenario() -> None:
        await make_versions(swarm)
        coordinating = await swarm.start_coordinator()
        async with AsyncExitStack() as stack:
            worker = stack.enter_context(ThreadPoolExecutor(max_workers=1))
            dying = DyingStore(PeerHome(swarm.peer_home("dying")).blobs)
            stores = {
                "honest": BlobStore(PeerHome(swarm.peer_home("honest")).blobs),
                "liar": LyingStore(PeerHome(swarm.peer_home("liar")).blobs),
                "dying": dying,
            }
            holders = {
                name: Joiner(swarm, swarm.peer_home(name), swarm.identities[name], store, worker)
                for name, store in stores.items()
            }
            joiners = []
            for number in range(JOINERS):
                home = tmp_path / f"joiner-{number}"
                joiners.append(Joiner(swarm, home, Identity.generate(), BlobStore(home / "blobs"), worker))
            for node in (*holders.values(), *joiners):
                await node.serve()
                stack.push_async_callback(node.transport.close)
                if hints:
                    announcing = asyncio.create_task(node.sharing.announce())
                    stack.callback(announcing.cancel)
            joining = [asyncio.create_task(joiner.synchronise()) for joiner in joiners]
            await dying.mid_transfer.wait()
            swarm.network.crash(swarm.identities["dying"].peer_id)
            await asyncio.gather(*joining)

            head = holders["honest"].chainfile.chain.entries[-1].manifest.message
            assert head.version == 3
            for joiner in joiners:
                assert (joiner.versions.version, joiner.versions.state_root) == (head.version, head.state.root)
            assert swarm.service is not None
            assert swarm.service.snapshot()["served_bytes"] <= 3 * STATE_BYTES
            assert sum(joiner.sharing.server.sent for joiner in joiners) > STATE_BYTES, "joiners serve each other"
        await coordinating.leave()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))
