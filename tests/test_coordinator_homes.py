"""What a coordinator makes of its home: moved, copied while it runs, older than the run, or copied elsewhere."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest
from support.scripted import Node, ScriptedPeer, histories, is_version, run

from hivegrpo.coordinator.log import LOG_FILE, SEGMENTS_FOLDER
from hivegrpo.protocol.chainfile import ENTRIES_FILE, ChainFile
from hivegrpo.protocol.errors import ChainError, ConfigError
from hivegrpo.protocol.invariants import check
from hivegrpo.protocol.transport.memory import MemoryNetwork


async def play(node: Node, peers: list[ScriptedPeer], version: int, then: Callable[[], None] = lambda: None) -> None:
    """Until all have this version; `then` happens while the coordinator still runs."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(node.running())
        for peer in peers:
            await stack.enter_async_context(peer.online())
        for peer in peers:
            await peer.until(is_version(version))
        then()


def copy_running(home: Path, to: Path) -> None:
    """In the order of docs/operations.md, section Backups."""
    shutil.copytree(home, to, ignore=shutil.ignore_patterns("events*", "lock"))
    with closing(sqlite3.connect(home / LOG_FILE)) as source, closing(sqlite3.connect(to / LOG_FILE)) as copy:
        source.backup(copy)
    shutil.copytree(home / SEGMENTS_FOLDER, to / SEGMENTS_FOLDER)


def test_a_start_does_not_need_the_older_events(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), snapshot_every=7)
        peers = [ScriptedPeer(node) for _ in range(3)]
        await play(node, peers, 1)
        segments = node.home / SEGMENTS_FOLDER
        moved = segments.rename(tmp_path / "elsewhere")
        await play(node, peers, 2)
        with pytest.raises(ConfigError, match="events from 1 on"):
            node.records()
        for segment in moved.iterdir():
            segment.rename(segments / segment.name)
        assert check(node.records(), histories(peers)) == []

    run(test())


def test_a_home_that_was_copied_while_it_ran_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), snapshot_every=7)
        peers = [ScriptedPeer(node) for _ in range(3)]
        backup = tmp_path / "backup"
        await play(node, peers, 1, lambda: copy_running(node.home, backup))
        node.home = backup
        for peer in peers:
            peer.seen.clear()
            peer.head = None  # it may have seen more than the backup did
            peer.history.clear()
        await play(node, peers, 2)
        assert check(node.records(), histories(peers)) == []

    run(test())


def test_an_older_copy_stops_at_the_first_peer_and_has_signed_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        await play(node, peers, 1)
        backup = tmp_path / "backup"
        shutil.copytree(node.home, backup)
        left = len(node.records())
        await play(node, peers, 2)
        node.home = backup
        async with node.running(ending=ChainError) as coordinator, peers[0].connected() as transport:
            _, ack = await peers[0].join(transport)
            assert ack.reason.startswith("fork: A peer holds version 2")
        assert "newer home" in str(coordinator._fatal)
        assert ChainFile.open(backup).chain.height < 2
        added = node.records()[left:]
        assert {record["kind"] for record in added} <= {"started", "disconnected"}

    run(test())


def test_two_coordinators_with_one_key_stop_once_a_peer_has_met_both(tmp_path: Path) -> None:
    """Each makes its own version 1, of its own peers; then a peer of the one joins the other."""

    async def test() -> None:
        ours = Node(tmp_path / "ours", MemoryNetwork())
        first = [ScriptedPeer(ours) for _ in range(3)]
        await play(ours, first, 0)
        theirs = Node(tmp_path / "theirs", MemoryNetwork())
        shutil.copytree(ours.home, theirs.home)
        theirs.identity, theirs.run, theirs.config, theirs.run_id = ours.identity, ours.run, ours.config, ours.run_id
        await play(ours, first, 1)
        second = [ScriptedPeer(theirs) for _ in range(3)]
        await play(theirs, second, 1)
        stranger = first[0]
        stranger.node = theirs
        async with theirs.running(ending=ChainError), stranger.connected() as transport:
            _, ack = await stranger.join(transport)
            assert ack.reason.startswith("fork: A peer holds version ")

    run(test())


def test_a_chain_that_is_ahead_of_its_log_is_not_cut(tmp_path: Path) -> None:
    """A log from an older backup beside the newest chain: peers have those versions."""

    async def test() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork())
        peers = [ScriptedPeer(node) for _ in range(3)]
        await play(node, peers, 1)
        old = (node.home / LOG_FILE).read_bytes()
        await play(node, peers, 2)
        chain = (node.home / ENTRIES_FILE).read_bytes()
        (node.home / LOG_FILE).write_bytes(old)
        async with node.running(ending=ChainError):
            pass
        assert (node.home / ENTRIES_FILE).read_bytes() == chain

    run(test())
