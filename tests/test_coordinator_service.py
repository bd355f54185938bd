"""The coordinator's network shell, over the in-memory network, with scripted peers that hold no model."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from hivegrpo.coordinator.events import LeaseGranted, VersionCommitted
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import FOLLOW, REPORT, Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstream import BlobStore, serve_blobs
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainstream import extend_chain, fetch_run
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, digest_of, open_signed, parse, run_id_of, sign, sign_payload
from hivegrpo.protocol.errors import ChainError, ConfigError, HiveError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, MAX_FRAME_BYTES, Stream
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport

KNOWN_ANSWER = b"k" * 32
VALUES = 40_000
T = TypeVar("T")


def make_run(coordinator: Identity, **sections: dict[str, Any]) -> tuple[pb.Signed, RunConfig]:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "versions": 2, "start_peers": 3},
        "model": {"path": "starter"},
        "dataset": {"path": "rows.jsonl"},
        "rewards": {"functions": ["exact"]},
        "grpo": {"num_generations": 4, "prompts_per_round": 9, "loss_type": "grpo"},
        "timing": {"lease": 30.0, "exchange": 10.0, "step": 10.0, "grace": 0.2},
        "distribution": {"anchor_every": 1, "keep_versions": 5},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    config = RunConfig.model_validate(tables)
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=coordinator.peer_id,
        config=config.canonical_json(),
        layout=[pb.Tensor(name="a", shape=[VALUES])],
        digests={"known_answer": KNOWN_ANSWER},
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(coordinator, run_id_of(payload), "RunManifest", payload), config


def state_of(version: int) -> bytes:
    """The bytes that all scripted peers pretend to have as the state of a version."""
    return bytes([version]) * (12 * VALUES + 8)


class Node:
    """A coordinator that can be started again from its home."""

    def __init__(self, home: Path, network: MemoryNetwork, **sections: dict[str, Any]) -> None:
        self.home = home
        self.network = network
        self.identity = Identity.generate()
        self.run, self.config = make_run(self.identity, **sections)
        self.run_id = run_id_of(self.run.payload)
        self.events: list[Any] = []

    @asynccontextmanager
    async def running(
        self, ending: type[HiveError] | None = None, exit_when_finished: bool = False
    ) -> AsyncIterator[Coordinator]:
        """Started, and stopped at the end; or `ending`: it has to end by itself, with that error."""
        transport = self.network.join(self.identity)
        log = EventLog(self.home / LOG_FILE, self.run_id)
        self.coordinator = Coordinator(
            identity=self.identity,
            transport=transport,
            log=log,
            run=self.run,
            config=self.config,
            home=self.home,
            blobs=BlobStore(self.home / "blobs"),
            clock=time.monotonic,
            on_event=lambda event, _: self.events.append(event),
            exit_when_finished=exit_when_finished,
        )
        stop = asyncio.Event()
        self.task = asyncio.create_task(self.coordinator.run(stop))
        try:
            yield self.coordinator
            if ending is not None:
                with pytest.raises(ending):
                    await self.task
            stop.set()
            await asyncio.wait([self.task])
            if ending is None:
                self.task.result()
        finally:
            stop.set()
            await asyncio.gather(self.task, return_exceptions=True)
            await transport.close()
            log.close()

    def records(self) -> list[dict[str, Any]]:
        log = EventLog(self.home / LOG_FILE, self.run_id)
        try:
            return list(read_records(log))
        finally:
            log.close()


@dataclass
class ScriptedPeer:
    """Follows, and answers every push as an honest peer would, except for the pushes in `mute`."""

    node: Node
    identity: Identity = field(default_factory=Identity.generate)
    mute: set[str] = field(default_factory=set)
    head: pb.Signed | None = None
    known_answer: bytes = KNOWN_ANSWER
    protocol: str = PROTOCOL

    def __post_init__(self) -> None:
        self.seen: list[Message] = []
        self.history: list[dict[str, Any]] = []
        self.reported: dict[str, pb.Signed] = {}
        self.news = asyncio.Condition()
        self.attempt: tuple[pb.RoundPlan, bytes] | None = None

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @asynccontextmanager
    async def online(self) -> AsyncIterator["ScriptedPeer"]:
        """In the network, joined, and at work."""
        async with self.connected() as transport:
            task = asyncio.create_task(self.follow(transport))
            try:
                yield self
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError, HiveError):
                    await task

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[MemoryTransport]:
        self.transport = self.node.network.join(self.identity)
        store = BlobStore(self.node.home.parent / f"blobs-{self.peer_id}")
        for version in range(self.node.config.run.versions + 1):
            store.add_bytes(state_of(version))
        await serve_blobs(self.transport, store)
        try:
            yield self.transport
        finally:
            await self.transport.close()

    async def join(self, transport: MemoryTransport) -> tuple[Stream, pb.Ack]:
        await transport.connect([self.node.network.address(self.node.identity.peer_id)])
        stream = await transport.open_stream(self.node.identity.peer_id, FOLLOW)
        join = pb.Join(
            protocol=self.protocol,
            addresses=transport.addresses(),
            known_answer=self.known_answer,
            head=self.head,
            agent="scripted",
        )
        await stream.send(sign(self.identity, self.node.run_id, join).SerializeToString())
        return stream, parse(pb.Ack, await stream.receive(MAX_CALL_BYTES))

    async def follow(self, transport: MemoryTransport) -> None:
        stream, ack = await self.join(transport)
        assert ack.accepted, ack.reason
        version = max((record["version"] for record in self.history if record["kind"] == "version"), default=0)
        await self.report(pb.Ready(version=version, state_root=blob_ref(state_of(version)).root))
        while True:
            signed = parse(pb.Signed, await stream.receive(MAX_FRAME_BYTES))
            kind: type[Message] = getattr(pb, signed.type)
            message = open_signed(signed, self.node.run_id, kind, signer=self.node.identity.peer_id).message
            if signed.type not in self.mute:
                await self.react(message, signed)
            async with self.news:
                self.seen.append(message)
                self.news.notify_all()

    async def react(self, message: Message, signed: pb.Signed) -> None:
        match message:
            case pb.Lease():
                contribution = pb.Contribution(
                    lease=message.id,
                    version=message.version,
                    used=range(message.count),
                    weight=4 * message.count,
                    root=digest_of(signed.payload),
                    metrics={"reward": 1.0},
                )
                if (await self.report(contribution)).accepted:
                    self.history.append({"kind": "contribution_acked", "lease": message.id})
            case pb.RoundPlan():
                self.attempt = message, digest_of(signed.payload)
                if any(reducer.peer == self.peer_id for reducer in message.reducers):
                    complete = [pb.Complete(peer=contributor.peer) for contributor in message.contributors]
                    await self.report(pb.SenderReport(plan=self.attempt[1], complete=complete))
            case pb.Seal():
                assert self.attempt is not None
                plan, digest = self.attempt
                vote = pb.StepReport(
                    version=plan.version,
                    plan=digest,
                    seal=digest_of(signed.payload),
                    spans=[pb.Blob(root=digest, size=9) for _ in plan.reducers],
                    state_root=blob_ref(state_of(plan.version)).root,
                )
                await self.report(vote)
            case pb.VersionManifest():
                self.head = signed
                self.history.append(
                    {
                        "kind": "version",
                        "version": message.version,
                        "state_root": message.state.root.hex(),
                        "manifest": digest_of(signed.payload).hex(),
                    }
                )

    async def report(self, message: Message) -> pb.Ack:
        signed = sign(self.identity, self.node.run_id, message)
        self.reported[message.DESCRIPTOR.name] = signed
        return await self.send(signed)

    async def send(self, signed: pb.Signed) -> pb.Ack:
        answer = await self.transport.call(self.node.identity.peer_id, REPORT, signed.SerializeToString())
        return parse(pb.Ack, answer)

    async def until(self, wanted: Callable[[Message], bool]) -> Message:
        """The first push that is wanted."""
        async with self.news:
            while True:
                for message in self.seen:
                    if wanted(message):
                        return message
                await self.news.wait()


def is_version(version: int) -> Callable[[Message], bool]:
    return lambda message: isinstance(message, pb.VersionManifest) and message.version == version


def run(test: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(30):
            return await test

    return asyncio.run(bounded())


async def frames_until_end(stream: Stream) -> list[str]:
    """Types of the pushes on a follow stream that the coordinator ends."""
    types = []
    with suppress(HiveError):
        while True:
            types.append(parse(pb.Signed, await stream.receive(MAX_CALL_BYTES)).type)
    return types


def histories(peers: Iterable[ScriptedPeer]) -> dict[str, list[dict[str, Any]]]:
    return {peer.peer_id: peer.history for peer in peers}


def test_two_rounds_to_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running(exit_when_finished=True) as coordinator:
            async with peers[0].online(), peers[1].online(), peers[2].online():
                for peer in peers:
                    await peer.until(lambda message: isinstance(message, pb.Notice) and message.kind == "finished")
            await node.task
            assert coordinator.state.version == 2
            assert coordinator.snapshot()["archived"] == [1, 2], "version 0 can be made anew from the seed"
            blobs = BlobStore(node.home / "blobs")
            assert blobs.read(blob_ref(state_of(2))) == state_of(2)
        assert check(node.records(), histories(peers)) == []
        roots = {record["state_root"] for peer in peers for record in peer.history if record.get("version") == 2}
        assert roots == {blob_ref(state_of(2)).root.hex()}

    run(test())


def test_a_restart_in_the_middle_of_a_round_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        network = MemoryNetwork()
        node = Node(tmp_path / "coordinator", network)
        peers = [ScriptedPeer(node, mute={"Seal"}) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            for peer in peers:
                await peer.until(lambda message: isinstance(message, pb.Seal))
        sealed = coordinator.state.round.attempt
        for peer in peers:
            peer.mute.clear()
            peer.seen.clear()
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            for peer in peers:
                manifest = await peer.until(is_version(1))
                assert isinstance(manifest, pb.VersionManifest)
                assert sealed is not None
                assert manifest.plan == sealed.digest, "the plan from before the restart was finished, not made again"
                await peer.until(is_version(2))
        assert check(node.records(), histories(peers)) == []

    run(test())


def test_a_lost_reducer_costs_an_attempt_and_not_the_round(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        lost = peers[2]
        lost.mute.add("RoundPlan")
        async with node.running(), peers[0].online(), peers[1].online():
            async with lost.online():
                await lost.until(lambda message: isinstance(message, pb.RoundPlan))
            manifest = await peers[0].until(is_version(1))
            assert isinstance(manifest, pb.VersionManifest)
            assert [contributor.peer for contributor in manifest.contributors] == sorted(
                peer.peer_id for peer in peers[:2]
            )
        records = node.records()
        assert [record["attempt"] for record in records if record["kind"] == "plan" and record["version"] == 1] == [
            1,
            2,
        ]
        assert check(records, histories(peers)) == []

    run(test())


def test_the_chain_is_served_and_verifies(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
            coordinator = node.identity.peer_id
            chain = Chain(await fetch_run(peers[0].transport, coordinator), coordinator)
            assert await extend_chain(peers[0].transport, coordinator, chain) == 3
            assert chain.head is not None
            assert chain.head.manifest.signed == peers[0].head

    run(test())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": "hivegrpo/0"}, "protocol: this run speaks hivegrpo/1, you speak hivegrpo/0"),
        ({"known_answer": b"x" * 32}, "numerics: "),
    ],
)
def test_a_join_is_refused_with_a_reason(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer = ScriptedPeer(node, **change)
        async with node.running() as coordinator, peer.connected() as transport:
            _, ack = await peer.join(transport)
            assert not ack.accepted
            assert ack.reason.startswith(reason)
            assert coordinator.state.members == {}

    run(test())


def test_bad_reports_are_answered_counted_and_survived(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer, stranger = ScriptedPeer(node), ScriptedPeer(node)
        async with node.running() as coordinator, peer.online():
            await peer.until(lambda message: isinstance(message, pb.Welcome))
            ready = peer.reported["Ready"]
            forged = sign(stranger.identity, node.run_id, parse(pb.Ready, ready.payload))
            tampered = pb.Signed(type="Leave", payload=ready.payload, signer=ready.signer, signature=ready.signature)
            of_another_run = sign(peer.identity, "0" * 64, parse(pb.Ready, ready.payload))
            for signed in (forged, tampered, of_another_run):
                ack = await peer.send(signed)
                assert not ack.accepted
                assert ack.reason.startswith("invalid: ")
            assert (await peer.send(pb.Signed(type="Gossip"))).reason.startswith("invalid: ")
            assert coordinator.snapshot()["rejected"] == {"SignatureError": 3, "FrameError": 1}
            assert (await peer.send(ready)).accepted, "it is still there, and still answers"

    run(test())


def test_a_newer_head_stops_the_coordinator(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        newer = pb.VersionManifest(version=5, parent=b"p" * 32, state=pb.Blob(root=b"r" * 32, size=1))
        peer = ScriptedPeer(node, head=sign(node.identity, node.run_id, newer))
        async with node.running(ending=ChainError) as _, peer.connected() as transport:
            _, ack = await peer.join(transport)
            assert not ack.accepted
            assert ack.reason.startswith("fork: A peer holds version 5")

    run(test())


def test_a_newer_session_takes_the_place_of_the_older(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer = ScriptedPeer(node)
        async with node.running() as coordinator, peer.connected() as transport:
            older, _ = await peer.join(transport)
            newer, ack = await peer.join(transport)
            assert ack.accepted
            assert await frames_until_end(older) == ["Welcome"]
            assert coordinator.state.members[peer.peer_id].connected
            welcome = parse(pb.Signed, await newer.receive(MAX_CALL_BYTES))
            assert welcome.type == "Welcome"

    run(test())


def test_what_is_pushed_is_on_disk_before(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            lease = await peers[0].until(lambda message: isinstance(message, pb.Lease))
            stored = [event.payload for event in coordinator._log.replay() if isinstance(event, LeaseGranted)]
            assert lease.SerializeToString(deterministic=True) in stored

    run(test())


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer = ScriptedPeer(node)

        def full(_: object) -> None:
            raise ConfigError("Cannot write the event log: disk full.", "Free disk space.")

        async with node.running(ending=ConfigError) as coordinator, peer.connected() as transport:
            older, _ = await peer.join(transport)
            monkeypatch.setattr(coordinator._log, "append", full)
            await older.close()

    run(test())


def test_on_event_sees_every_version(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
        versions = [
            parse(pb.VersionManifest, e.payload).version for e in node.events if isinstance(e, VersionCommitted)
        ]
        assert versions == [0, 1, 2]

    run(test())
