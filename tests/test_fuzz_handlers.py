"""Every handler, and every reader of an answer, on the in-memory network, given messages that are almost valid."""

import asyncio
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from google.protobuf.message import Message
from structlog.testing import capture_logs
from support import reference
from support.mutation import EXAMPLES, damaged, mutated
from support.rounds import RUN_ID, Case, Ring
from support.scripted import KNOWN_ANSWER, VALUES, Node, ScriptedPeer, state_of
from support.scripted import run as run_scripted
from support.value_attacks import WEIGHT

from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.exchange import Exchange
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.reducer import SpanLayout
from hivegrpo.peer.swarm.session import Session
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainstream import extend_chain, fetch_run
from hivegrpo.protocol.envelope import PROTOCOL, parse, sign
from hivegrpo.protocol.errors import ChainError, RemoteError, WireError
from hivegrpo.protocol.holders import HolderBook
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

MESSAGES = 3 * EXAMPLES
"""In each scenario."""

SEED = int(os.environ.get("HIVEGRPO_FUZZ_SEED", "0"))
MEMORY_BOUND = 32 << 20
"""Bytes that a scenario's whole network may have allocated at once."""


@contextmanager
def watched() -> Iterator[None]:
    """No handler failed in a way that nobody foresaw, and memory stayed within the bound."""
    tracemalloc.start()
    try:
        with capture_logs() as logs:
            yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND
    finally:
        tracemalloc.stop()
    assert [entry for entry in logs if entry["log_level"] in ("error", "critical")] == []


async def offer(transport: Transport, peer: str, name: str, frames: Sequence[bytes]) -> None:
    """Frames on a stream, and whatever comes back, until the other side ends it or says nothing more."""
    with suppress(WireError):
        async with await transport.open_stream(peer, name) as stream:
            for frame in frames:
                await stream.send(frame)
            while True:
                await stream.receive(MAX_FRAME_BYTES, timeout=0.02)


def reports_of(peer: ScriptedPeer, random: Random) -> pb.Signed:
    """A report that is nearly one of a member with a lease, a plan and a seal."""
    lease = next((item for item in reversed(peer.seen) if isinstance(item, pb.Lease)), pb.Lease(count=3, wanted=3))
    plan, digest = peer.attempt or (pb.RoundPlan(), bytes(32))
    choices = [
        pb.Ready(version=0, state_root=blob_ref(state_of(0)).root),
        pb.Contribution(
            lease=lease.id, used=range(lease.count), weight=4 * lease.count, root=bytes(32), metrics={"reward": 1.0}
        ),
        pb.SenderReport(plan=digest, complete=[pb.Complete(peer=item.peer) for item in plan.contributors]),
        pb.StepReport(
            version=1,
            plan=digest,
            seal=bytes(32),
            spans=[pb.Blob(root=digest, size=9) for _ in plan.reducers],
            state_root=bytes(32),
            receipts=[bytes(64)] * len(plan.reducers),
        ),
        pb.Heartbeat(version=0, state="online", metrics={"tokens_per_second": 1.0}),
        pb.AuditReport(plan=digest, seal=bytes(32), content=bytes(32)),
        pb.FaultReport(plan=digest, proof=pb.Blob(root=bytes(32), size=5)),
        pb.Lease(),
    ]
    message = random.choice(choices)
    return sign(peer.identity, peer.node.run_id, mutated(message, random))


def test_the_coordinators_handlers(tmp_path: Path) -> None:
    """A member sends reports, joins and requests; the honest make their version, and the log can be read again."""
    random = Random(SEED)

    async def scenario() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), run={"versions": 1})
        honest = [ScriptedPeer(node, mute={"Seal"}) for _ in range(2)]
        hostile = ScriptedPeer(node, mute={"Lease", "RoundPlan", "Seal"})
        async with node.running() as coordinator, honest[0].online(), honest[1].online(), hostile.online():
            await hostile.until(lambda message: isinstance(message, pb.Lease))
            target = node.identity.peer_id
            for _ in range(MESSAGES):
                data = reports_of(hostile, random).SerializeToString()
                with suppress(RemoteError):
                    answer = await hostile.transport.call(
                        target, "report", damaged(data, random) if random.random() < 0.2 else data
                    )
                    assert parse(pb.Ack, answer).ByteSize() < 1000
            joined = await stranger(node)
            for _ in range(MESSAGES // 4):
                join = pb.Join(
                    protocol=PROTOCOL, addresses=joined.transport.addresses(), known_answer=KNOWN_ANSWER, agent="x"
                )
                if joined.node.coordinator.chain.chain.height >= 0:
                    join.head.CopyFrom(mutated(node.coordinator.chain.chain.entry(0).manifest, random))
                signed = sign(joined.identity, node.run_id, mutated(join, random))
                await offer(joined.transport, target, "follow", [signed.SerializeToString()])
            root = pb.Blob(root=blob_ref(state_of(0)).root, size=12 * VALUES + 8)
            for _ in range(MESSAGES // 4):
                holder = HolderBook(node.run_id, joined.identity, joined.transport.addresses).own()
                for name, requests in (
                    ("chain", [pb.ChainRequest(first=0)]),
                    ("blob", [pb.BlobRequest(blob=root, holder=holder)]),
                    ("blob", [pb.BlobRequest(blob=root), pb.PieceRequest(map=True), pb.PieceRequest()]),
                ):
                    frames = [mutated(request, random).SerializeToString() for request in requests]
                    await offer(joined.transport, target, name, [damaged(frame, random) for frame in frames])
            await joined.transport.close()
            assert coordinator.snapshot()["version"] == 0
            assert not node.task.done()
        node.records()

    with watched():
        run_scripted(scenario())


async def stranger(node: Node) -> ScriptedPeer:
    """Somebody who is in the network, and has not joined."""
    peer = ScriptedPeer(node)
    peer.transport = node.network.join(peer.identity)
    await peer.transport.connect([node.network.address(node.identity.peer_id)])
    return peer


def test_the_handlers_of_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of the roster pushes and asks what is almost right; then it pushes what is, and is complete."""
    monkeypatch.setattr(ExchangeServer._find, "__defaults__", (0.005,))
    random = Random(SEED)
    attacker = 2
    vectors = {peer: np.linspace(-1, 1 + peer, VALUES, dtype=np.float32) for peer in range(3)}
    case = Case(
        codec="mxint8",
        rule="mean",
        vectors=vectors,
        weights=dict.fromkeys(range(3), WEIGHT),
        spans={0: range(0, 2), 1: range(2, 3)},
        silent=frozenset({attacker}),
    )

    async def scenario() -> None:
        async with Ring.open() as ring, asyncio.timeout(120):
            own = {
                peer: EncodedVector.encode(get_codec(case.codec), torch.from_numpy(vector.copy()))
                for peer, vector in vectors.items()
            }
            plan = ring._sign(ring._plan(case, own), pb.RoundPlan)
            exchanges = await ring._begin(case, plan, own)
            reports = await ring._push(case, exchanges)
            seal = ring._sign(ring._seal(case, plan, reports), pb.Seal)
            await asyncio.gather(*(exchange.collect(seal) for exchange in exchanges.values()))
            transport = ring.transports[attacker]
            names = [name for name in ("push", "span", "pull") if name in ring.transports[0]._stream_handlers]
            for target in (0, 1):
                await transport.connect(ring.transports[target].addresses())
            for _ in range(MESSAGES):
                target, name = random.randrange(2), random.choice(names)
                layout = SpanLayout.of(plan.message, target)
                frames = [
                    damaged(frame, random) if random.random() < 0.3 else frame
                    for frame in asked_for(
                        name, plan.digest, target, layout, own[attacker], ring.peers[attacker], random
                    )
                ]
                await offer(transport, ring.peers[target].peer_id, name, frames)
            late = Exchange(
                plan,
                own[attacker],
                identity=ring.peers[attacker],
                run_id=RUN_ID,
                directory=ring.directories[attacker],
                worker=ring.worker,
            )
            await late.push()
            for exchange in exchanges.values():
                assert exchange.reducer is not None
                assert len(exchange.reducer.report().complete) == 3

    with watched():
        asyncio.run(scenario())


def asked_for(
    name: str, plan: bytes, span: int, layout: SpanLayout, own: EncodedVector, sender: Identity, random: Random
) -> list[bytes]:
    """What a stream of that name begins with, all but."""
    if name == "span":
        return [mutated(pb.SpanRequest(plan=plan, span=span), random).SerializeToString()]
    if name == "pull":
        return [mutated(pb.PullRequest(plan=plan, span=span, peer=sender.peer_id), random).SerializeToString()]
    header = mutated(own.header(plan, span, layout.chunks), random)
    return [sign(sender, RUN_ID, header).SerializeToString(), *own.chunks[layout.chunks.start : layout.chunks.stop]]


class Fed(Stream):
    """A stream on which these frames come."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self.remote, self.bytes_sent, self.bytes_received = "", 0, 0
        self.frames = list(frames)

    async def send(self, frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        raise AssertionError("nothing is answered")

    async def receive(self, limit: int, timeout: float | None = 30.0) -> bytes:
        return self.frames.pop(0)

    async def close(self) -> None:
        """Nothing to end."""


def test_what_the_coordinator_pushes(tmp_path: Path) -> None:
    """A peer drops what makes no sense, and goes on listening, whatever its coordinator signs."""
    random = Random(SEED)
    node = Node(tmp_path, MemoryNetwork())
    me = Identity.generate()
    transport = node.network.join(me)
    pushes = [
        pb.Welcome(head=1, holders=[pb.Endpoint(peer=me.peer_id, addresses=["/ip4/1.2.3.4/tcp/1/p2p/x"])]),
        pb.Lease(id=1, peer=me.peer_id, count=3, wanted=3, max_weight=12, seconds=1.0),
        pb.RoundPlan(
            version=1,
            attempt=1,
            parent=bytes(32),
            codec="mxint8",
            rule="mean",
            values=VALUES,
            contributors=[pb.Contributor(peer=me.peer_id, lease=1, weight=4, root=bytes(32))],
            reducers=[pb.Reducer(peer=me.peer_id, addresses=["/ip4/1.2.3.4/tcp/1/p2p/x"], first=0, chunks=3)],
            scalars=[0x3F000000] * 9,
            exchange_seconds=1.0,
            step_seconds=1.0,
            audit_seconds=1.0,
        ),
        pb.Seal(plan=bytes(32), contributors=[pb.Sealed(peer=me.peer_id, coefficient=0x3F800000)]),
        pb.VersionManifest(version=0, parent=bytes(32), state=pb.Blob(root=bytes(32), size=8)),
        pb.Notice(kind="paused", text="x"),
    ]

    async def scenario() -> None:
        session = Session(
            address=node.network.address(me.peer_id),
            chain=Chain(node.run, node.identity.peer_id),
            identity=me,
            transport=transport,
            directory=Directory(transport),
            join=pb.Join,
        )
        for _ in range(4 * MESSAGES):
            signed = sign(node.identity, node.run_id, mutated(random.choice(pushes), random))
            data = signed.SerializeToString()
            await session._take(Fed([damaged(data, random) if random.random() < 0.1 else data]))

    with watched():
        asyncio.run(scenario())
    assert transport.rejected


def test_what_holders_answer(tmp_path: Path) -> None:
    """Readers of chains and blobs end with a typed error, or with what they asked for."""
    random = Random(SEED)
    data = os.urandom(100_000)
    ref = blob_ref(data)

    async def scenario() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        asking, holder = node.network.join(Identity.generate()), node.network.join(Identity.generate())
        await asking.connect(holder.addresses())
        genesis = pb.VersionManifest(
            version=0, parent=bytes.fromhex(node.run_id), state=pb.Blob(root=bytes(32), size=8)
        )
        entry = pb.ChainEntry(manifest=sign(node.identity, node.run_id, genesis))
        header = pb.ChainHeader(run=node.run, first=0, count=1)
        await holder.serve_stream("chain", lambda stream: answer(stream, [header, entry]))
        BlobStore(tmp_path / "holder").add_bytes(data)
        await holder.serve_stream(
            "blob", lambda stream: answer(stream, [reference.leaf(data), pb.PieceMap(have=b"\x01"), data])
        )
        for index in range(MESSAGES):
            with suppress(WireError, ChainError):
                await fetch_run(asking, holder.peer_id)
            chain = Chain(node.run, node.identity.peer_id)
            with suppress(WireError, ChainError):
                await extend_chain(asking, holder.peer_id, chain)
            mine = BlobStore(tmp_path / str(index))
            with suppress(WireError):
                await fetch_blob(asking, ref, [holder.peer_id], mine, stall=5.0)
                assert mine.read(ref) == data
        for transport in (asking, holder):
            await transport.close()

    async def answer(stream: Stream, frames: Sequence[bytes | Message]) -> None:
        await stream.receive(1000)
        for frame in frames:
            plain = frame if isinstance(frame, bytes) else mutated(frame, random).SerializeToString()
            await stream.send(damaged(plain, random) if random.random() < 0.3 else plain)

    with watched():
        asyncio.run(scenario())
