"""A coordinator that is killed at one of its writes, in a run that is the same each time up to there.

A write is whatever outlives the process or leaves it: events appended to the log, a snapshot kept, an entry of the
chain, a renamed file, a frame on a stream. At each there are two moments to die, before and after; in the middle of the
chain's entries, which are not written in one piece, there is a third.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from structlog.testing import capture_logs

from hivegrpo.coordinator.events import Event
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.coordinator.snapshots import Snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.chainfile import ENTRIES_FILE, ChainFile
from hivegrpo.protocol.errors import HiveError, RemoteError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport
from hivegrpo.protocol.transport.rate import UploadCap
from support.scripted import Node, ScriptedPeer, histories, is_version, state_of
from support.virtual import run_virtually

DOWN_SECONDS = 0.5
"""From the coordinator's death to its next start."""

RETRY_SECONDS = 0.2
COMMIT_SECONDS = 10.0
"""From a start to the next commit, at most."""

MEMORY = Path("/dev/shm")
"""Where it is: runs by the hundred, each with a disk of its own."""

LONGEST = 300.0
"""Of a run that goes on: seconds of its own clock."""


class Killed(Exception):
    """Nothing that this process does reaches anybody any more."""


class Fuse:
    """Counts the moments at which the coordinator could die, and kills it at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0
        self.burnt = asyncio.Event()
        self.moment = ""

    def burn(self, moment: str) -> None:
        if self.burnt.is_set():
            raise Killed
        self.count += 1
        if self.count == self.at:
            self.moment = moment
            self.burnt.set()
            raise Killed


class MortalLog(EventLog):
    def __init__(self, path: Path, run_id: str, fuse: Fuse) -> None:
        super().__init__(path, run_id)
        self._fuse = fuse

    def append(self, events: Sequence[Event]) -> None:
        self._fuse.burn("before an append")
        super().append(events)
        self._fuse.burn("after an append")

    def compact(self, snapshot: Snapshot) -> None:
        self._fuse.burn("before a snapshot")
        super().compact(snapshot)
        self._fuse.burn("after a snapshot")


class MortalNode(Node):
    """A coordinator on virtual time, which dies by its fuse and starts again from its home."""

    def __init__(self, home: Path, network: MemoryNetwork, fuse: Fuse, **sections: Any) -> None:
        with mock.patch.object(Identity, "generate", return_value=identity_of("coordinator")):
            super().__init__(home, network, **sections)
        self.fuse = fuse
        self.logs: list[EventLog] = []

    def clock(self) -> float:
        return asyncio.get_running_loop().time()

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[asyncio.Task[None]]:
        """One life, from a start until it is killed, or until the block ends."""
        fuse, transport = self.fuse, join(self.network, self.identity)
        make_mortal(transport, fuse)
        log = MortalLog(self.home / LOG_FILE, self.run_id, fuse)
        self.logs.append(log)
        stop = asyncio.Event()
        with mortal_files(self.home, fuse):
            task = asyncio.create_task(self._live(transport, log, stop))
            try:
                yield task
            finally:
                stop.set()
                dying = asyncio.create_task(fuse.burnt.wait())
                await asyncio.wait([task, dying], return_when=asyncio.FIRST_COMPLETED)
                dying.cancel()
                if fuse.burnt.is_set():
                    self.network.crash(self.identity.peer_id)
                    task.cancel()
                    await asyncio.wait([task])
                else:
                    await transport.close()
                    task.result()

    async def _live(self, transport: MemoryTransport, log: EventLog, stop: asyncio.Event) -> None:
        self.coordinator = self.over(transport, log)
        make_chain_mortal(self.coordinator, self.home / ENTRIES_FILE, self.fuse)
        await self.coordinator.run(stop)

    def close(self) -> None:
        """Those of the dead were not closed by anybody: what is on disk is what they left."""
        for log in self.logs:
            log.close()


def join(network: MemoryNetwork, identity: Identity) -> MemoryTransport:
    """A node whose blobs yield to the rest on the loop's clock."""
    return network.join(identity, UploadCap(clock=asyncio.get_running_loop().time))


def make_mortal(transport: MemoryTransport, fuse: Fuse) -> None:
    """The moments around every frame that a node sends."""
    accept, open_ = transport._accept, transport._open

    def mortal(stream: FramedStream) -> FramedStream:
        send = stream.send

        async def sending(frame: bytes | memoryview, timeout: float = 30.0) -> None:
            fuse.burn("before a frame")
            await send(frame, timeout)
            fuse.burn("after a frame")

        stream.send = sending  # type: ignore[method-assign]  # the fault
        return stream

    async def opening(peer_id: str, name: str) -> FramedStream:
        return mortal(await open_(peer_id, name))

    transport._accept = lambda stream, name: accept(mortal(stream), name)  # type: ignore[method-assign]
    transport._open = opening  # type: ignore[method-assign]


def mortal_files(home: Path, fuse: Fuse) -> Any:
    """The moments around every rename in a home."""
    rename = Path.rename

    def renaming(path: Path, target: Path) -> Path:
        if home not in path.parents:
            return rename(path, target)
        fuse.burn("before a rename")
        renamed = rename(path, target)
        fuse.burn("after a rename")
        return renamed

    return mock.patch.object(Path, "rename", renaming)


def make_chain_mortal(coordinator: Coordinator, path: Path, fuse: Fuse) -> None:
    """The moments around and within every entry of the chain."""
    append = coordinator.chain.append

    def appending(entry: pb.ChainEntry) -> Any:
        fuse.burn("before an entry of the chain")
        try:
            fuse.burn("within an entry of the chain")
        except Killed:
            data = entry.SerializeToString()
            with path.open("ab") as file:
                file.write((len(data).to_bytes(4, "big") + data)[: len(data) // 2])
            raise
        appended = append(entry)
        fuse.burn("after an entry of the chain")
        return appended

    coordinator.chain.append = appending  # type: ignore[method-assign]  # the fault


class SteadyPeer(ScriptedPeer):
    """Joins again and reports again for as long as it takes, as real peers do."""

    store: BlobStore
    early: tuple[pb.Lease, pb.Signed] | None = None
    """A lease for a version that is still being made."""

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[MemoryTransport]:
        self.transport = join(self.node.network, self.identity)
        await serve_blobs(self.transport, self.store)
        try:
            yield self.transport
        finally:
            await self.transport.close()

    async def follow(self, transport: MemoryTransport) -> None:
        while True:
            with suppress(HiveError):
                await super().follow(transport)
            await asyncio.sleep(RETRY_SECONDS)

    async def react(self, message: Message, signed: pb.Signed) -> None:
        version = max((record["version"] for record in self.history if record["kind"] == "version"), default=0)
        if isinstance(message, pb.Lease) and message.version > version:
            self.early = message, signed
            return
        await super().react(message, signed)
        if isinstance(message, pb.VersionManifest):
            root = blob_ref(state_of(message.version)).root
            await self.report(pb.Ready(version=message.version, state_root=root))
            if self.early is not None and self.early[0].version == message.version:
                await super().react(*self.early)

    async def send(self, signed: pb.Signed) -> pb.Ack:
        while True:
            with suppress(RemoteError):
                return await super().send(signed)
            await asyncio.sleep(RETRY_SECONDS)


@dataclass
class Outcome:
    """Of one run in which the coordinator was killed at most once."""

    moments: int
    """That there were."""
    moment: str
    """At which it was killed; empty if the run was over before."""
    wrong: list[str] = field(default_factory=list)


async def play(folder: Path, store: BlobStore, at: int, peers: int, **sections: Any) -> Outcome:
    """A whole run, in which the coordinator is killed at the `at`-th moment and started again; what is wrong then."""
    network, fuse = MemoryNetwork(clock=asyncio.get_running_loop().time), Fuse(at)
    node = MortalNode(folder / "coordinator", network, fuse, **sections)
    swarm = [SteadyPeer(node, identity_of(f"peer {number}")) for number in range(peers)]
    for peer in swarm:
        peer.store = store
    outcome = Outcome(0, "")
    async with asyncio.timeout(LONGEST):
        working = [asyncio.create_task(_work(peer)) for peer in swarm]
        over = asyncio.create_task(_finished(node, swarm))
        burnt = asyncio.create_task(fuse.burnt.wait())
        async with node.alive() as life:
            await asyncio.wait([over, burnt, life, *working], return_when=asyncio.FIRST_COMPLETED)
        if fuse.burnt.is_set():
            outcome.moment = fuse.moment
            await asyncio.sleep(DOWN_SECONDS)
            before = _Left(node)
            outcome.wrong += [violation.text for violation in check(before.records, histories(swarm))]
            node.fuse = Fuse(None)
            begun = node.clock()
            async with node.alive() as life:
                await asyncio.wait([over, life, *working], return_when=asyncio.FIRST_COMPLETED)
            outcome.wrong += before.lost(node, begun)
        for task in (over, burnt, *working):
            task.cancel()
        results = await asyncio.gather(over, *working, return_exceptions=True)
    outcome.moments = fuse.count
    outcome.wrong += [repr(error) for error in results if isinstance(error, Exception)]
    outcome.wrong += [violation.text for violation in check(node.records(), histories(swarm))]
    outcome.wrong += _two_of_a_name(swarm)
    try:
        version = ChainFile.open(node.home, node.identity.peer_id).chain.height
    except HiveError as error:
        outcome.wrong.append(f"the chain on disk does not verify: {error}")
    else:
        if version != node.config.run.versions:
            outcome.wrong.append(f"the chain on disk ends at version {version}")
    node.close()
    return outcome


def play_all(folder: Path, peers: int, versions: int, **sections: Any) -> Counter[str]:
    """The same run again and again, killed at each of its moments; how many there were of which kind.

    AssertionError if the run does not survive one of them.
    """
    sections = sections | {"run": {"versions": versions, "start_peers": peers}}
    store = store_of(folder / "blobs", versions)
    moments: Counter[str] = Counter()
    with capture_logs():
        while (outcome := run_virtually(play(folder / "run", store, moments.total() + 1, peers, **sections))).moment:
            assert not outcome.wrong, f"killed {outcome.moment}, moment {moments.total() + 1}: {outcome.wrong}"
            moments[outcome.moment] += 1
            shutil.rmtree(folder / "run")
    assert not outcome.wrong, f"not killed: {outcome.wrong}"
    return moments


async def _work(peer: SteadyPeer) -> None:
    async with peer.connected() as transport:
        await peer.follow(transport)


async def _finished(node: MortalNode, swarm: Sequence[ScriptedPeer]) -> None:
    """Once all are told so: the last version is committed, and its state archived."""
    for peer in swarm:
        await peer.until(is_version(node.config.run.versions))
        await peer.until(lambda message: isinstance(message, pb.Notice) and message.kind == "finished")


class _Left:
    """What a coordinator that was killed has left on disk."""

    def __init__(self, node: MortalNode) -> None:
        self.records = node.records()
        self._chain = whole_entries(node.home / ENTRIES_FILE)

    def lost(self, node: MortalNode, begun: float) -> list[str]:
        """What is not there any more, or did not follow in time after the start."""
        wrong = []
        records = node.records()
        if records[: len(self.records)] != self.records:
            wrong.append("the log has changed")
        if not whole_entries(node.home / ENTRIES_FILE).startswith(self._chain):
            wrong.append("the chain has changed")
        after = records[len(self.records) :]
        commits = [record["at"] for record in after if record["kind"] == "version"]
        finished = any(record.get("version") == node.config.run.versions for record in self.records)
        if not finished and (not commits or commits[0] > begun + COMMIT_SECONDS):
            wrong.append(f"no commit within {COMMIT_SECONDS} s")
        return wrong


def whole_entries(path: Path) -> bytes:
    """A chain's file, without an entry that a crash cut short."""
    data, end = path.read_bytes() if path.is_file() else b"", 0
    while (size := 4 + int.from_bytes(data[end : end + 4], "big")) > 4 and end + size <= len(data):
        end += size
    return data[:end]


def _two_of_a_name(swarm: Sequence[ScriptedPeer]) -> list[str]:
    """Signed messages that contradict each other: somebody was told what then did not happen."""
    told: dict[tuple[object, ...], bytes] = {}
    wrong = []
    for message in (message for peer in swarm for message in peer.seen):
        match message:
            case pb.Lease():
                name: tuple[object, ...] = "lease", message.id, message.iteration
            case pb.RoundPlan():
                name = "plan", message.version, message.attempt
            case pb.Seal():
                name = "seal", message.plan
            case pb.VersionManifest():
                name = "version", message.version
            case _:
                continue
        payload = message.SerializeToString(deterministic=True)
        if told.setdefault(name, payload) != payload:
            wrong.append(f"two different messages are {name}")
    return wrong


def identity_of(name: str) -> Identity:
    """The same for the same name."""
    return Identity(Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()))


def store_of(folder: Path, versions: int) -> BlobStore:
    """What every scripted peer serves."""
    store = BlobStore(folder)
    for version in range(versions + 1):
        store.add_bytes(state_of(version))
    return store
