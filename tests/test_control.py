"""The coordinator's local socket: a real one, before the real service over the in-memory network."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.scripted import Node, ScriptedPeer, is_version, run

from hivegrpo.cli.operate import send_order
from hivegrpo.coordinator.control import MAX_CLIENTS, MAX_REQUEST, SOCKET_FILE, serve_control, short_path
from hivegrpo.coordinator.events import BanLifted, LeaseGranted
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.errors import ConfigError, UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.memory import MemoryNetwork


@asynccontextmanager
async def operated(node: Node) -> AsyncIterator[Coordinator]:
    async with node.running() as coordinator, serve_control(node.home, coordinator.operator.execute):
        yield coordinator


async def give(node: Node, command: str, **rest: Any) -> dict[str, Any]:
    """An order as the command line gives it: from a thread, since its client blocks."""
    return await asyncio.to_thread(send_order, {"command": command, **rest}, node.home)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path / "coordinator", MemoryNetwork(), run={"versions": 5})


def test_the_socket_is_its_user_s_alone_and_gone_with_the_coordinator(node: Node) -> None:
    async def test() -> None:
        async with operated(node):
            assert stat.S_IMODE((node.home / SOCKET_FILE).stat().st_mode) == 0o600
            status = await give(node, "status")
            assert (status["phase"], status["paused"], status["invites"]) == ("genesis", False, [])
        assert not (node.home / SOCKET_FILE).exists()
        with pytest.raises(UnreachableError, match="No coordinator runs in"):
            await give(node, "status")

    run(test())


def test_a_home_with_a_long_path_and_a_socket_that_a_crash_left(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / ("long" * 40) / "coordinator", MemoryNetwork())
        node.home.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as left, short_path(node.home) as path:
            left.bind(str(path))
        with pytest.raises(UnreachableError):
            await give(node, "status")
        async with operated(node):
            assert (await give(node, "status"))["version"] == -1

    run(test())


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (b"\n", "Invalid JSON"),
        (b"[]\n", "the order: Input should be an object"),
        (b'{"command":"obey"}\n', "the order: Input tag 'obey'"),
        (b'{"command":"status","loudly":true}\n', "loudly: Extra inputs"),
        (b'{"command":"ban","peer":"x"}\n', "reason: Field required"),
        (b'{"command":"invite","hours":NaN}\n', "hours: "),
        (b'{"command":"invite","hours":-1}\n', "hours: Input should be greater than 0"),
        (b"x" * (2 * MAX_REQUEST) + b"\n", f"An order has at most {MAX_REQUEST} bytes"),
    ],
)
def test_a_wrong_order_is_answered_and_changes_nothing(node: Node, line: bytes, wanted: str) -> None:
    async def test() -> None:
        async with operated(node) as coordinator:
            await give(node, "status")
            await coordinator._journal.written()
            before = len(list(coordinator._log.replay()))
            with short_path(node.home) as path:
                reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(line)
            answer = json.loads(await reader.readline())
            writer.close()
            await writer.wait_closed()
            assert (answer["ok"], answer["exit_code"]) == (False, 78)
            assert wanted in answer["error"], answer["error"]
            assert len(list(coordinator._log.replay())) == before

    run(test())


def test_a_command_waits_for_its_place_behind_clients_that_say_nothing(node: Node) -> None:
    async def test() -> None:
        async with operated(node):
            with short_path(node.home) as path:
                silent = [await asyncio.open_unix_connection(str(path)) for _ in range(MAX_CLIENTS)]
            waiting = asyncio.create_task(give(node, "status"))
            assert not (await asyncio.wait([waiting], timeout=0.2))[0]
            for _, writer in silent:
                writer.close()
                await writer.wait_closed()
            assert (await waiting)["phase"] == "genesis"

    run(test())


def test_a_pause_ends_the_round_in_flight_and_grants_no_lease_until_resumed(node: Node) -> None:
    async def test() -> None:
        peers = [ScriptedPeer(node, mute={"Lease"}) for _ in range(3)]
        async with operated(node), peers[0].online(), peers[1].online(), peers[2].online():
            leases = [await peer.until(lambda message: isinstance(message, pb.Lease)) for peer in peers]
            assert await give(node, "pause", reason="the disk is being moved") == {"paused": True}
            for peer, lease in zip(peers, leases, strict=True):
                notice = await peer.until(lambda message: isinstance(message, pb.Notice) and message.kind == "paused")
                assert isinstance(notice, pb.Notice)
                assert notice.text == "the disk is being moved"
                await peer.react(lease, peer.reported["Ready"])
                peer.mute.clear()
            for peer in peers:
                await peer.until(is_version(1))
            late = ScriptedPeer(node)
            async with late.online():
                await late.until(lambda message: isinstance(message, pb.Notice) and message.kind == "paused")
            assert (await give(node, "status"))["paused"]
            assert {parsed.version for parsed in granted(node)} == {0}, "the round ended, and no lease followed"
            assert await give(node, "resume") == {"paused": False}
            for peer in peers:
                await peer.until(is_version(2))

    run(test())


def granted(node: Node) -> list[pb.Lease]:
    return [pb.Lease.FromString(event.payload) for event in node.events if isinstance(event, LeaseGranted)]


def test_a_pause_outlives_a_restart(node: Node) -> None:
    async def test() -> None:
        async with operated(node):
            await give(node, "pause")
        peers = [ScriptedPeer(node) for _ in range(3)]
        async with operated(node), peers[0].online(), peers[1].online(), peers[2].online():
            for peer in peers:
                await peer.until(is_version(0))
            assert not granted(node)
            await give(node, "resume")
            await peers[0].until(is_version(1))

    run(test())


def test_a_ban_ends_a_peer_s_part_at_once_and_itself_in_time(node: Node) -> None:
    async def test() -> None:
        peers = [ScriptedPeer(node) for _ in range(4)]
        bad = peers[3]
        bad.mute.add("Lease")
        crowd = peers[0].online(), peers[1].online(), peers[2].online()
        async with operated(node) as coordinator, bad.connected() as transport, crowd[0], crowd[1], crowd[2]:
            await bad.join(transport)
            await give(node, "ban", peer=bad.peer_id, reason="it is broken", hours=1.0)
            assert (await bad.report(pb.Ready(version=0, state_root=bytes(32)))).reason.startswith("banned: it is")
            _, ack = await bad.join(transport)
            assert ack.reason.startswith("banned: it is broken (until ")
            shown = await give(node, "status")
            assert shown["banned"][bad.peer_id].startswith("it is broken (until ")
            node.later = 3601.0
            coordinator._wake.set()
            await node.until(BanLifted(0.0, bad.peer_id, "its time is over"))
            _, ack = await bad.join(transport)
            assert ack.accepted, ack.reason

    run(test())


def test_an_operator_s_ban_is_lifted_by_hand_and_one_by_proof_is_not(node: Node) -> None:
    async def test() -> None:
        peer, liar = Identity.generate().peer_id, Identity.generate().peer_id
        async with operated(node) as coordinator:
            await give(node, "ban", peer=peer, reason="a mistake")
            assert await give(node, "unban", peer=peer) == {"peer": peer}
            with pytest.raises(ConfigError, match="This peer is not banned"):
                await give(node, "unban", peer=peer)
            await give(node, "ban", peer=liar, reason="a hunch", hours=1.0)
            coordinator._ban(liar, "it lied", BlobRef(b"p" * 32, 9))
            with pytest.raises(ConfigError, match="banned by proof: it lied"):
                await give(node, "unban", peer=liar)
            with pytest.raises(ConfigError, match="banned for good, by proof"):
                await give(node, "ban", peer=liar, reason="again", hours=1.0)
            node.later = 7200.0
            coordinator._wake.set()
            assert (await give(node, "status"))["banned"] == {liar: "it lied"}
            with pytest.raises(ConfigError, match="'nobody' is no peer id"):
                await give(node, "ban", peer="nobody", reason="x")

    run(test())


def test_the_command_line_says_when_no_coordinator_runs(tmp_path: Path) -> None:
    environment = os.environ | {"HIVEGRPO_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "hivegrpo.cli.main", "coordinator", "pause"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 69
    assert done.stderr == (
        "Error: No coordinator runs on this machine. "
        "Start it with `hivegrpo coordinator run`, or name its home with --home.\n"
    )
