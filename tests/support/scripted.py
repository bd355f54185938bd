"""A coordinator over the in-memory network, with scripted peers that hold no model."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from hivegrpo.coordinator.events import Event
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import FOLLOW, REPORT, SNAPSHOT_EVERY, Coordinator
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, digest_of, open_signed, parse, run_id_of, sign, sign_payload
from hivegrpo.protocol.errors import HiveError
from hivegrpo.protocol.identity import Identity
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
        "averaging": {"audit_rate": 0.0},
        "timing": {"lease": 30.0, "exchange": 10.0, "step": 10.0, "grace": 0.2},
        "distribution": {"anchor_every": 1, "keep_versions": 5},
        "admission": {"mode": "open"},
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

    def __init__(
        self, home: Path, network: MemoryNetwork, snapshot_every: int = SNAPSHOT_EVERY, **sections: dict[str, Any]
    ) -> None:
        self.home = home
        self.snapshot_every = snapshot_every
        self.network = network
        self.identity = Identity.generate()
        self.run, self.config = make_run(self.identity, **sections)
        self.run_id = run_id_of(self.run.payload)
        self.events: list[Any] = []
        self.news = asyncio.Event()
        self.later = 0.0

    def clock(self) -> float:
        """Real time, and what the test adds to it."""
        return time.monotonic() + self.later

    def on_event(self, event: Event, _: State) -> None:
        self.events.append(event)
        self.news.set()

    async def until(self, wanted: Event) -> None:
        """Until an event happens that differs from `wanted` in nothing but its time."""
        while not any(replace(wanted, at=event.at) == event for event in self.events):
            self.news.clear()
            await self.news.wait()

    def over(self, transport: MemoryTransport, log: EventLog, **options: Any) -> Coordinator:
        """A coordinator, not started."""
        return Coordinator(
            identity=self.identity,
            transport=transport,
            log=log,
            run=self.run,
            config=self.config,
            home=self.home,
            blobs=BlobStore(self.home / "blobs"),
            clock=self.clock,
            on_event=self.on_event,
            snapshot_every=self.snapshot_every,
            **options,
        )

    @asynccontextmanager
    async def running(
        self, ending: type[Exception] | None = None, exit_when_finished: bool = False
    ) -> AsyncIterator[Coordinator]:
        """Started, and stopped at the end; or `ending`: it has to end by itself, with that error."""
        transport = self.network.join(self.identity)
        log = EventLog(self.home / LOG_FILE, self.run_id)
        self.coordinator = self.over(transport, log, exit_when_finished=exit_when_finished)
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
    invite: str = ""
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
            invite=self.invite,
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
                    iteration=message.iteration,
                    used=range(message.count),
                    weight=4 * message.count,
                    root=digest_of(signed.payload),
                    metrics={"reward": 1.0},
                )
                if (await self.report(contribution)).accepted:
                    acked = {"lease": message.id, "iteration": message.iteration}
                    self.history.append({"kind": "contribution_acked", **acked})
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
                    receipts=[bytes(64)] * len(plan.reducers),
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
