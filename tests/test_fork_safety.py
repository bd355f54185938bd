"""What keeps one run from having two histories: disk before network, fenced attempts, and heads that are compared."""

import asyncio
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.chains import ChainMaker
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config
from support.scripted import Node, ScriptedPeer, is_version, run
from support.swarm import Swarm

from hivegrpo.coordinator.events import Event, PlanMade
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.session import Session
from hivegrpo.protocol import chainfile
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ENTRIES_FILE, ChainFile
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, FrameError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, Stream
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.memory import MemoryNetwork

COMMITTING = {"Lease", "RoundPlan", "Seal", "VersionManifest"}
"""What the coordinator signs that binds it; a Welcome or a Notice commits it to nothing."""


def signed_parts(frame: bytes) -> list[pb.Signed]:
    """What is signed in a frame: a push, or the parts of an entry of the chain."""
    found: list[pb.Signed] = []
    for kind, pick in (
        (pb.Signed, lambda message: [message]),
        (pb.ChainEntry, lambda message: [message.manifest, message.plan, message.seal]),
    ):
        with suppress(FrameError):  # a frame of another kind
            found += [part for part in pick(parse(kind, frame)) if part.type in COMMITTING]
    return found


@dataclass
class Exit:
    """Looks up what a coordinator signed, as it leaves, in the log, as a crash would leave it."""

    node: Node
    left: Counter[str] = field(default_factory=Counter)
    early: list[str] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        send = FramedStream.send

        async def look(stream: FramedStream, frame: bytes, timeout: float = 30.0) -> None:
            for part in signed_parts(bytes(frame)):
                if part.signer == self.node.identity.peer_id:
                    self.left[part.type] += 1
                    if part.payload not in self.written():
                        self.early.append(part.type)
            await send(stream, frame, timeout)

        monkeypatch.setattr(FramedStream, "send", look)

    def written(self) -> set[bytes]:
        log = EventLog(self.node.home / LOG_FILE, self.node.run_id)
        try:
            return {event.payload for event in log.replay() if hasattr(event, "payload")}
        finally:
            log.close()


def test_nothing_that_the_coordinator_signs_leaves_before_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = EventLog.append

    def slow(log: EventLog, events: Sequence[Event]) -> None:
        time.sleep(0.02)  # the disk's time, in its own thread
        append(log, events)

    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        monkeypatch.setattr(EventLog, "append", slow)
        out = Exit(node)
        out.watch(monkeypatch)
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
        assert out.early == []
        assert set(out.left) == COMMITTING

    run(test())


def test_who_joins_while_the_disk_is_busy_is_told_nothing_that_is_not_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer of the roster comes back after a plan was made, and before it is written."""
    append, disk = EventLog.append, threading.Event()

    async def test() -> None:
        planned, loop = asyncio.Event(), asyncio.get_running_loop()

        def stall(log: EventLog, events: Sequence[Event]) -> None:
            if any(isinstance(event, PlanMade) for event in events):
                loop.call_soon_threadsafe(planned.set)
                assert disk.wait(20.0)
            append(log, events)

        node = Node(tmp_path / "coordinator", MemoryNetwork())
        monkeypatch.setattr(EventLog, "append", stall)
        out = Exit(node)
        out.watch(monkeypatch)
        peers = [ScriptedPeer(node, mute={"Seal"}) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            await planned.wait()
            since = coordinator.state.members[peers[0].peer_id].since
            again = asyncio.create_task(peers[0].join(peers[0].transport))
            for _ in range(300):  # more turns than the join takes to arrive, and a frame to leave
                await asyncio.sleep(0)
            assert coordinator.state.members[peers[0].peer_id].since > since
            assert not again.done()
            disk.set()
            stream, ack = await again
            assert ack.accepted
            await stream.close()
        assert out.early == []
        assert "RoundPlan" in out.left

    run(test())


def test_an_entry_of_the_chain_is_synced_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ChainMaker()
    synced: list[int] = []
    folders: list[Path] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_size)

    file = ChainFile.create(tmp_path, maker.run, maker.identity.peer_id)
    monkeypatch.setattr(chainfile.os, "fsync", note)
    monkeypatch.setattr(chainfile, "sync_folder", folders.append)
    sizes = []
    for version in range(3):
        file.append(maker.entry(version))
        sizes.append((tmp_path / ENTRIES_FILE).stat().st_size)
    assert synced == sizes
    assert folders == [tmp_path], "a new file is lost with its name"
    file.take(maker.entry(3))
    assert (tmp_path / ENTRIES_FILE).stat().st_size == sizes[-1]
    file.flush()
    assert synced[-1] == (tmp_path / ENTRIES_FILE).stat().st_size > sizes[-1]


def test_the_coordinator_takes_no_report_of_an_attempt_that_is_over() -> None:
    machine = Machine()
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    vote = machine.step_report()
    fenced = machine.state.round.attempt
    assert fenced is not None
    report = pb.SenderReport(plan=fenced.digest, complete=[pb.Complete(peer=peer) for peer in machine.peers])
    machine.wait(22.0)  # the step's time, and two seconds
    assert machine.plan.attempt == 2
    reducer = machine.plan.reducers[0].peer
    assert machine.report(reducer, report).reason.startswith("stale: ")
    machine.exchange()
    for peer in machine.peers:
        assert machine.report(peer, vote).reason.startswith("stale: ")
    assert machine.state.version == 0
    machine.vote(*machine.peers)
    assert machine.state.version == 1


class Told:
    """A peer with versions 0 and 1, and a coordinator that tells it whatever a test signs."""

    def __init__(self) -> None:
        self.maker = ChainMaker()
        self.chain: Chain = self.maker.chain()
        self.first = self.maker.entry(0)
        for entry in (self.first, self.maker.entry(1)):
            self.chain.append(entry)
        self.manifest, plan, seal = self.maker.messages(2)
        assert plan is not None
        assert seal is not None
        self.plan, self.seal = plan, seal
        self.maker.bind(self.manifest, plan, seal)

    async def hear(self, *messages: Any) -> tuple[Session, dict[str, int]]:
        """What a session makes of these pushes, and what it rejected."""
        network = MemoryNetwork()
        coordinator, peer = network.join(self.maker.identity), network.join(Identity.generate())
        done = asyncio.Event()

        async def tell(stream: Stream) -> None:
            await stream.receive(MAX_CALL_BYTES)
            await stream.send(pb.Ack(accepted=True).SerializeToString())
            for message in (*messages, pb.Notice(kind="finished")):
                await stream.send(self.maker.sign(message).SerializeToString())
            await done.wait()

        await coordinator.serve_stream("follow", tell)
        session = Session(
            address=network.address(coordinator.peer_id),
            chain=self.chain,
            identity=Identity.generate(),
            transport=peer,
            directory=Directory(peer),
            join=pb.Join,
        )
        await session.run()
        done.set()
        await peer.close()
        await coordinator.close()
        return session, peer.rejected


def hear(told: Told, *messages: Any) -> tuple[Session, dict[str, int]]:
    return run(told.hear(*messages))


def copy(message: Any, **changes: Any) -> Any:
    other = type(message)()
    other.CopyFrom(message)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_a_peer_takes_what_is_in_order() -> None:
    told = Told()
    session, rejected = hear(told, told.plan, told.seal, told.manifest)
    assert session.plan is not None
    assert session.seal is not None
    assert session.head is not None
    assert (session.plan.message, session.seal.message, session.head.message.version) == (told.plan, told.seal, 2)
    assert rejected == {}


@pytest.mark.parametrize("version", [0, 1])
def test_a_peer_refuses_a_second_version_where_it_has_one(version: int) -> None:
    told = Told()
    second = copy(told.chain.entries[version].manifest.message, reference_version=0)
    second.state.size += 1
    session, rejected = hear(told, second)
    assert session.head is None
    assert rejected == {"SignatureError": 1}


def test_a_peer_refuses_a_second_version_of_the_head_that_it_was_told_of() -> None:
    told = Told()
    second = copy(told.manifest)
    second.state.size += 1
    session, rejected = hear(told, told.manifest, second, told.manifest)
    assert session.head is not None
    assert session.head.message == told.manifest
    assert rejected == {"SignatureError": 1}


def test_a_peer_does_not_go_back_to_an_older_head() -> None:
    told = Told()
    session, rejected = hear(told, told.manifest, told.chain.entries[1].manifest.message)
    assert session.head is not None
    assert session.head.message.version == 2
    assert rejected == {"StaleError": 1}


def test_a_newer_attempt_fences_the_older_ones() -> None:
    told = Told()
    newer = copy(told.plan, attempt=3)
    session, rejected = hear(told, told.plan, newer, told.plan, copy(told.plan, attempt=2), told.seal)
    assert session.plan is not None
    assert session.plan.message.attempt == 3
    assert session.seal is None, "of a fenced attempt"
    assert rejected == {"StaleError": 3}


def test_a_peer_refuses_a_second_plan_of_an_attempt_and_a_second_seal_of_a_plan() -> None:
    told = Told()
    other_seal = copy(told.seal)
    other_seal.contributors[0].norm_squared = b"\x07"  # of a mean, which needs no norms
    session, rejected = hear(told, told.plan, copy(told.plan, step_seconds=2.0), told.seal, other_seal)
    assert session.plan is not None
    assert session.plan.message == told.plan
    assert session.seal is not None
    assert session.seal.message == told.seal
    assert rejected == {"SignatureError": 2}


def test_peers_at_work_stop_a_coordinator_that_is_started_from_an_old_copy(tmp_path: Path) -> None:
    """They present the highest version that they verified when they join again; then the newer copy goes on."""
    config = small_config(run={"start_peers": 2, "versions": 500}, timing={"grace": 0.3})
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, 40_000), coordinator)
    home, old = swarm.coordinator_home, tmp_path / "old"

    async def test() -> None:
        node = await swarm.start_coordinator()
        peers = [await swarm.start_peer(name, IntegerLearner(40_000)) for name in ("a", "b")]
        await swarm.committed(1)
        await node.leave()
        shutil.copytree(home, old)
        node = await swarm.start_coordinator()
        copied = ChainFile.open(old).chain.height
        await swarm.committed(copied + 2)
        await swarm.crash(node)
        home.rename(tmp_path / "newer")
        old.rename(home)
        node = await swarm.start_coordinator()
        with pytest.raises(ChainError, match="this home is older than the run") as caught:
            await node.task
        assert "newer home folder" in caught.value.hint
        assert not any(peer.task.done() for peer in peers), "they wait for the newer one"
        home.rename(old)
        (tmp_path / "newer").rename(home)
        node = await swarm.start_coordinator()
        await swarm.committed(ChainFile.open(home).chain.height + 1)
        for one in (*peers, node):
            await swarm.crash(one)

    run(test())
    chain = ChainFile.open(home).chain
    for name in ("a", "b"):
        peer = ChainFile.open(swarm.peer_home(name)).chain
        assert peer.height >= ChainFile.open(old).chain.height + 2
        assert peer.head is not None
        assert peer.head.manifest.digest == chain.entries[peer.height].manifest.digest
