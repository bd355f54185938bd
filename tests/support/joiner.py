"""A node that only synchronises and serves, in memory."""

from concurrent.futures import Executor
from pathlib import Path

from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.memory import MemoryTransport
from support.swarm import Swarm


class Joiner:
    """What a late joiner is before it works; also a holder, given a home that has versions."""

    def __init__(self, swarm: Swarm, home: Path, identity: Identity, store: BlobStore, worker: Executor) -> None:
        self.transport: MemoryTransport = swarm.network.join(identity)
        coordinator = swarm.coordinator_identity.peer_id
        self.sharing = Sharing(self.transport, identity, swarm.run_id, coordinator, store)
        self.chainfile = ChainFile.create(home, swarm.run, coordinator)
        self.versions = Versions(home, self.chainfile, store, swarm.config)
        self._synchroniser = Synchroniser(self.versions, self.transport, self.sharing, worker)
        self._address = swarm.network.address(coordinator)

    async def serve(self) -> None:
        await self.transport.connect([self._address])
        await self.sharing.start()
        await serve_chain(self.transport, self.chainfile.chain)

    async def synchronise(self) -> None:
        await self._synchroniser.run()
