"""A coordinator and peers in one process, on the in-memory network, with real files."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hivegrpo.coordinator.bench import JudgeProof
from hivegrpo.coordinator.events import Event, VersionCommitted
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.coordinator.state import State
from hivegrpo.peer.daemon import work_in_run
from hivegrpo.peer.desk import Learns
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import run_id_of
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

Wrap = Callable[[Transport], Transport]


@dataclass
class Node:
    """One running participant."""

    identity: Identity
    home: Path
    stop: asyncio.Event
    task: asyncio.Task[None]
    transport: Transport

    async def leave(self) -> None:
        """Ask it to stop and wait until it has."""
        self.stop.set()
        await self.task


@dataclass
class Swarm:
    """One run. Everything lives under `folder`; identities are made once, so that nodes can come back."""

    folder: Path
    config: RunConfig
    run: pb.Signed
    coordinator_identity: Identity
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    peers: dict[str, Node] = field(default_factory=dict)
    coordinator: Node | None = None
    identities: dict[str, Identity] = field(default_factory=dict)
    judge_proof: JudgeProof | None = None
    service: Coordinator | None = None
    events: list[Event] = field(default_factory=list)
    """The coordinator's, once they are on disk."""
    successions: list[pb.Signed] = field(default_factory=list)
    _version: int = -1
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def run_id(self) -> str:
        return run_id_of(self.run.payload)

    @property
    def coordinator_home(self) -> Path:
        return self.folder / "coordinator"

    def peer_home(self, name: str) -> Path:
        return self.folder / name

    async def committed(self, version: int) -> None:
        """Wait until the coordinator has committed a version."""
        async with self._news:
            await self._news.wait_for(lambda: self._version >= version)

    async def happened(self, wanted: Callable[[Event], bool]) -> None:
        """Wait until the coordinator has seen such an event."""
        async with self._news:
            await self._news.wait_for(lambda: any(map(wanted, self.events)))

    def _on_event(self, event: Event, state: State) -> None:
        self.events.append(event)
        if isinstance(event, VersionCommitted):
            self._version = state.version
        self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def start_coordinator(self) -> Node:
        """Start it, or start it again from its log."""
        home = self.coordinator_home
        identity = self.coordinator_identity
        transport = self.network.join(identity)
        log = EventLog(home / LOG_FILE, self.run_id)
        service = Coordinator(
            identity=identity,
            transport=transport,
            log=log,
            run=self.run,
            config=self.config,
            home=home,
            clock=time.time,
            blobs=BlobStore(home / "blobs"),
            on_event=self._on_event,
            judge_proof=self.judge_proof,
        )
        stop = asyncio.Event()

        async def run() -> None:
            try:
                await service.run(stop)
            finally:
                log.close()
                await transport.close()

        self.service = service
        self.coordinator = Node(identity, home, stop, asyncio.create_task(run()), transport)
        return self.coordinator

    async def start_peer(self, name: str, learner: Learns, wrap: Wrap | None = None, invite: str = "") -> Node:
        """Start a peer, or start it again from its home."""
        identity = self.identities.setdefault(name, Identity.generate())
        joined: Transport = self.network.join(identity)
        transport = wrap(joined) if wrap else joined
        home = PeerHome(self.peer_home(name))
        stop = asyncio.Event()
        address = self.network.address(self.coordinator_identity.peer_id)

        async def run() -> None:
            with ThreadPoolExecutor(max_workers=1) as worker:
                try:
                    await transport.connect([address])
                    store = BlobStore(home.blobs)
                    sharing = Sharing(transport, identity, self.run_id, self.coordinator_identity.peer_id, store)
                    await sharing.start()
                    await work_in_run(
                        address,
                        identity=identity,
                        transport=transport,
                        chainfile=ChainFile.create(
                            home.root, self.run, self.coordinator_identity.peer_id, self.successions
                        ),
                        config=self.config,
                        home=home,
                        sharing=sharing,
                        learner=learner,
                        worker=worker,
                        stop=stop,
                        show=_ignore,
                        invite=invite,
                    )
                finally:
                    await transport.close()

        node = Node(identity, home.root, stop, asyncio.create_task(run()), transport)
        self.peers[name] = node
        return node

    async def crash(self, node: Node) -> None:
        """End a node in the middle of whatever it does: streams break, tasks are cancelled, only its files remain."""
        self.network.crash(node.identity.peer_id)
        node.task.cancel()
        await asyncio.gather(node.task, return_exceptions=True)


def _ignore(_: dict[str, Any]) -> None:
    """Nobody watches."""
