"""The coordinator's network shell, over the in-memory network, with scripted peers."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.machine import canonical
from support.scripted import Node, ScriptedPeer, frames_until_end, histories, is_version, run, state_of

from hivegrpo.coordinator import service, snapshots
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.events import (
    CoordinatorStarted,
    Event,
    LeaseExpired,
    LeaseGranted,
    PeerDisconnected,
    VersionCommitted,
)
from hivegrpo.coordinator.followers import QUEUE_FRAMES
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ENTRIES_FILE
from hivegrpo.protocol.chainstream import extend_chain, fetch_run
from hivegrpo.protocol.envelope import parse, sign
from hivegrpo.protocol.errors import ChainError, ConfigError, RemoteError
from hivegrpo.protocol.invariants import check
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES
from hivegrpo.protocol.transport.memory import MemoryNetwork


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


def test_a_round_with_nothing_to_learn_is_one_line_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), run={"start_peers": 2})
        peers = [ScriptedPeer(node, mute={"Lease"}) for _ in range(2)]
        async with node.running(), peers[0].online(), peers[1].online():
            for peer in peers:
                lease = await peer.until(lambda message: isinstance(message, pb.Lease))
                assert isinstance(lease, pb.Lease)
                contribution = pb.Contribution(
                    lease=lease.id,
                    dropped=range(lease.count),
                    root=bytes(32),
                    metrics={"frac_reward_zero_std": 1.0, "groups/dropped": float(lease.count)},
                )
                assert (await peer.report(contribution)).accepted
        (empty,) = [record for record in node.records() if record["kind"] == "round_empty"]
        reason = "no contribution has weight: frac_reward_zero_std = 1, groups/dropped = 9"
        assert (empty["version"], empty["reason"]) == (1, reason)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "nothing to learn" in line]
        assert reason in line

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
            stream, ack = await peer.join(transport)
            assert not ack.accepted
            assert ack.reason.startswith(reason)
            assert coordinator.state.members == {}
            with pytest.raises(RemoteError, match=r"within 0\.2 s"):
                await stream.receive(0, 0.2)  # the peer closes first, so that p2pd cannot lose the reason

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
            assert await frames_until_end(older) == ["Welcome", "Notice"]
            assert coordinator.state.members[peer.peer_id].connected
            welcome = parse(pb.Signed, await newer.receive(MAX_CALL_BYTES))
            assert welcome.type == "Welcome"

    run(test())


def test_a_peer_that_falls_silent_counts_as_gone(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        silent, alive, leaving = (ScriptedPeer(node) for _ in range(3))
        async with node.running() as coordinator, silent.online(), alive.online():
            async with leaving.online():
                for peer in (silent, alive, leaving):
                    await peer.until(lambda message: isinstance(message, pb.Welcome))
                node.later = 5.0
                await alive.report(pb.Heartbeat(version=0, state="online", metrics={"tokens_per_second": 5.0}))
                node.later = 6.3  # three missed heartbeats, and the grace of 0.2 s
            await node.until(PeerDisconnected(0.0, silent.peer_id))
            assert coordinator.state.members[alive.peer_id].connected
            shown = {peer["peer"]: peer for peer in coordinator.snapshot()["peers"]}
            assert shown[alive.peer_id]["tokens_per_second"] == 5.0
            assert shown[silent.peer_id]["state"] == "unreachable"

    run(test())


def test_a_follower_that_does_not_drain_is_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), timing={"grace": 60.0})  # long: not for silence
        peer = ScriptedPeer(node)
        async with node.running() as coordinator, peer.connected() as transport:
            stream, _ = await peer.join(transport)
            await stream.receive(MAX_CALL_BYTES)  # the welcome
            for _ in range(QUEUE_FRAMES):
                coordinator._followers.push([peer.peer_id], b"frame")
            for _ in range(QUEUE_FRAMES):
                assert await stream.receive(MAX_CALL_BYTES) == b"frame"
            for _ in range(QUEUE_FRAMES + 1):
                coordinator._followers.push([peer.peer_id], b"frame")
            await node.until(PeerDisconnected(0.0, peer.peer_id))

    run(test())


def test_a_peer_that_leaves_gives_its_lease_back_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), run={"start_peers": 1}, timing={"grace": 60.0})
        peer = ScriptedPeer(node, mute={"Lease"})
        async with node.running(), peer.online():
            lease = await peer.until(lambda message: isinstance(message, pb.Lease))
            assert isinstance(lease, pb.Lease)
            assert (await peer.report(pb.Leave(reason="bye"))).accepted
            await node.until(LeaseExpired(0.0, lease.id, "its peer left"))

    run(test())


def test_a_peer_that_joins_again_is_told_whatever_is_current(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), run={"start_peers": 1})
        peer = ScriptedPeer(node)
        async with node.running(), peer.connected() as transport:
            await peer.join(transport)
            await peer.report(pb.Ready(version=0, state_root=b"r" * 32))
            stream, _ = await peer.join(transport)
            told = [parse(pb.Signed, await stream.receive(MAX_CALL_BYTES)).type for _ in range(3)]
            assert told == ["Welcome", "VersionManifest", "Lease"]

    run(test())


def test_the_chain_is_written_anew_from_the_log_and_never_gets_ahead_of_it(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
        entries = [coordinator.chain.chain.entry(version) for version in range(3)]
        (node.home / ENTRIES_FILE).unlink()
        async with node.running() as coordinator, peers[0].connected() as transport:
            await peers[0].join(transport)
            assert [coordinator.chain.chain.entry(version) for version in range(3)] == entries
        (node.home / LOG_FILE).unlink()
        async with node.running(ending=ChainError):
            pass

    run(test())


def test_a_restart_begins_with_the_newest_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in the middle of rounds, and read back with what came after it: it is the state that all events make."""
    replayed: list[int] = []
    replay = EventLog.replay

    def noting(log: EventLog, after: int = 0) -> Iterator[Event]:
        replayed.append(log.last - after)
        return replay(log, after)

    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), snapshot_every=7)
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
        node.events.clear()
        monkeypatch.setattr(EventLog, "replay", noting)
        async with node.running() as again, peers[0].connected():
            await node.until(CoordinatorStarted(0.0))
            assert replayed[0] < 7 + 1
            apply(coordinator.state, CoordinatorStarted(again.state.round.closed_at))
            assert canonical(again.state) == canonical(coordinator.state)
        monkeypatch.undo()
        assert check(node.records(), histories(peers)) == []

    run(test())


@pytest.mark.parametrize("change", ["another version", "no chain", "damaged"])
def test_without_a_snapshot_that_can_be_used_everything_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), snapshot_every=7)
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with node.running() as coordinator, peers[0].online(), peers[1].online(), peers[2].online():
            await peers[0].until(is_version(2))
        node.events.clear()
        entries = [coordinator.chain.chain.entry(version) for version in range(3)]
        match change:
            case "another version":
                monkeypatch.setattr(snapshots, "SHAPE", "0" * 64)
            case "no chain":
                (node.home / ENTRIES_FILE).unlink()
            case _:
                with closing(sqlite3.connect(node.home / LOG_FILE)) as database:
                    database.execute("UPDATE snapshots SET body = zeroblob(9)")
                    database.commit()
        async with node.running() as again, peers[0].connected():
            await node.until(CoordinatorStarted(0.0))
            assert [again.chain.chain.entry(version) for version in range(3)] == entries
            apply(coordinator.state, CoordinatorStarted(again.state.round.closed_at))
            assert canonical(again.state) == canonical(coordinator.state)
        assert "replaying all events" in capsys.readouterr().out

    run(test())


def test_the_session_of_a_peer_that_left_is_ended(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), timing={"grace": 60.0})  # long: not for silence
        peer = ScriptedPeer(node)
        async with node.running(), peer.connected() as transport:
            stream, _ = await peer.join(transport)
            await peer.report(pb.Leave(reason="bye"))
            assert await frames_until_end(stream) == ["Welcome"]

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


def test_a_report_that_did_not_reach_the_disk_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer = ScriptedPeer(node)

        def full(_: object) -> None:
            raise ConfigError("Cannot write the event log: disk full.", "Free disk space.")

        async with node.running(ending=ConfigError) as coordinator, peer.connected() as transport:
            await peer.join(transport)
            monkeypatch.setattr(coordinator._log, "append", full)
            with pytest.raises(RemoteError, match="is stopping"):
                await peer.report(pb.Ready(version=0, state_root=b"r" * 32))

    run(test())


def test_an_event_that_cannot_be_applied_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own mistake only; but then the state is half changed."""

    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peer = ScriptedPeer(node)

        def mistaken(state: State, event: Event) -> None:
            raise ZeroDivisionError

        async with node.running(ending=ZeroDivisionError), peer.connected() as transport:
            stream, _ = await peer.join(transport)
            monkeypatch.setattr(service, "apply", mistaken)
            await stream.close()
        kinds = [record["kind"] for record in node.records() if record["kind"] != "probed"]
        assert kinds == ["run", "started", "joined"]

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
