"""The coordinator's log on disk: append-only, all or nothing, and bound to its run."""

import random
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hivegrpo.coordinator import log as log_module
from hivegrpo.coordinator.events import ContributionReceived, CoordinatorStarted, Event, PeerDisconnected, PeerJoined
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import SEGMENTS_FOLDER, EventLog
from hivegrpo.coordinator.snapshots import Snapshot
from hivegrpo.protocol.errors import BusyError, ChainError, ConfigError

RUN = "ab" * 32
EVENTS: list[Event] = [
    CoordinatorStarted(1.5),
    PeerJoined(2.0, "alice", ("/ip4/10.0.0.1/tcp/1/p2p/alice",), "test"),
    PeerDisconnected(3.0, "alice"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = EventLog(tmp_path / "events.sqlite", RUN)
    log.append(EVENTS)
    log.close()
    return tmp_path / "events.sqlite"


def test_events_come_back_as_they_were(path: Path) -> None:
    log = EventLog(path, RUN)
    received = ContributionReceived(4.0, bytes(range(256)))
    log.append([received])
    assert list(log.replay()) == [*EVENTS, received]
    log.close()


def test_every_commit_is_synced_to_disk(path: Path) -> None:
    log = EventLog(path, RUN)
    assert log._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert log._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    log.close()


def test_an_append_that_fails_leaves_nothing_behind(path: Path) -> None:
    log = EventLog(path, RUN)
    log._database.execute(
        "CREATE TRIGGER full BEFORE INSERT ON events WHEN new.kind = 'PeerDisconnected' "
        "BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with pytest.raises(ConfigError, match="disk full"):
        log.append([CoordinatorStarted(5.0), PeerDisconnected(6.0, "alice")])
    log.append([CoordinatorStarted(7.0)])
    assert list(log.replay()) == [*EVENTS, CoordinatorStarted(7.0)]
    log.close()


@pytest.mark.parametrize("statement", ["DELETE FROM events", "UPDATE events SET kind = 'PeerLeft'"])
def test_what_is_written_stays(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)
    database.close()


def test_a_log_of_another_run_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to run abab") as caught:
        EventLog(path, "cd" * 32)
    assert "--home" in caught.value.hint


def test_a_log_of_another_schema_is_refused(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
    database.commit()
    database.close()
    with pytest.raises(ConfigError, match="has schema 99, this version reads 2"):
        EventLog(path, RUN)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    path.write_bytes(b"not a database, " * 512)
    with pytest.raises(ChainError, match="is damaged") as caught:
        EventLog(path, RUN)
    assert "backup" in caught.value.hint


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ("UPDATE events SET body = x'7b7d' WHERE sequence = 2", "damaged at event 2"),
        ("UPDATE events SET kind = 'PeerExploded' WHERE sequence = 3", "damaged at event 3: it is not what was"),
        ("UPDATE events SET sequence = 4 WHERE sequence = 3", "lacks events"),
        ("DELETE FROM events WHERE sequence = 2", "lacks events"),
        ("DELETE FROM events WHERE sequence = 1", "lacks events"),
    ],
)
def test_damaged_events_are_noticed(path: Path, damage: str, complaint: str) -> None:
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER events_keep")
    database.execute("DROP TRIGGER events_stay")
    database.execute(damage)
    database.commit()
    database.close()
    with pytest.raises(ChainError, match=complaint), closing(EventLog(path, RUN)) as log:
        list(log.replay())


def test_records_begin_with_the_run(path: Path) -> None:
    log = EventLog(path, RUN)
    records = list(read_records(log))
    log.close()
    assert records[0] == {"kind": "run", "run_id": RUN}
    assert [record["kind"] for record in records[1:]] == ["started", "joined", "disconnected"]
    assert records[2] == {
        "kind": "joined",
        "at": 2.0,
        "peer": "alice",
        "addresses": ["/ip4/10.0.0.1/tcp/1/p2p/alice"],
        "agent": "test",
    }


def more(count: int, at: float = 10.0) -> list[Event]:
    return [PeerDisconnected(at + index, f"peer {index}") for index in range(count)]


@pytest.fixture
def compacted(path: Path) -> Path:
    """Five events in a segment, three in the database, and a snapshot of the five."""
    with closing(EventLog(path, RUN)) as log:
        log.append(more(2))
        log.append(more(3, at=20.0))
        log.compact(Snapshot(5, "shape", b"body"))
    return path


def test_events_that_were_compacted_are_still_there(compacted: Path) -> None:
    with closing(EventLog(compacted, RUN)) as log:
        assert log.last == 8
        assert log.snapshot() == Snapshot(5, "shape", b"body")
        assert list(log.replay()) == [*EVENTS, *more(2), *more(3, at=20.0)]
        assert list(log.replay(after=5)) == more(3, at=20.0)
        assert list(log.replay(after=4)) == [*more(2)[1:], *more(3, at=20.0)]
        assert list(log.replay(after=8)) == []
        assert log._database.execute("SELECT count(*) FROM events").fetchone() == (3,)
        assert [record["kind"] for record in read_records(log)][1:4] == ["started", "joined", "disconnected"]
    assert [file.name for file in (compacted.parent / SEGMENTS_FOLDER).iterdir()] == ["000000000001.gz"]


def test_the_log_goes_on_after_everything_in_it_was_compacted(path: Path) -> None:
    with closing(EventLog(path, RUN)) as log:
        log.compact(Snapshot(3, "shape", b"one"))
        log.compact(Snapshot(3, "shape", b"two"))
        log.append(more(2))
        log.compact(Snapshot(5, "shape", b"three"))
    with closing(EventLog(path, RUN)) as log:
        log.append(more(1, at=30.0))
        assert log.last == 6
        assert log.snapshot() == Snapshot(5, "shape", b"three")
        assert list(log.replay()) == [*EVENTS, *more(2), *more(1, at=30.0)]


def test_only_what_is_in_a_segment_can_be_deleted(compacted: Path) -> None:
    with closing(sqlite3.connect(compacted)) as database, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute("DELETE FROM events WHERE sequence = 6")


def test_a_crash_between_segment_and_database_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment that is not in the database yet does not count, and is written over."""
    with closing(EventLog(path, RUN)) as log:
        monkeypatch.setattr(log, "_transaction", lambda: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            log.compact(Snapshot(2, "shape", b"body"))
    monkeypatch.undo()
    with closing(EventLog(path, RUN)) as log:
        assert log.snapshot() is None
        assert list(log.replay()) == EVENTS
        log.compact(Snapshot(3, "shape", b"body"))
        assert list(log.replay()) == EVENTS


def test_a_reader_sees_one_moment_of_a_log_that_is_compacted_meanwhile(path: Path) -> None:
    with closing(EventLog(path, RUN)) as log, closing(EventLog(path, RUN)) as other:
        log.compact(Snapshot(2, "shape", b"body"))
        reading = other.replay()
        seen = [next(reading)]
        log.append(more(2))
        log.compact(Snapshot(4, "shape", b"body"))
        assert [*seen, *reading] == EVENTS


def test_a_damaged_snapshot_is_passed_over(compacted: Path) -> None:
    with closing(sqlite3.connect(compacted)) as database:
        database.execute("UPDATE snapshots SET body = zeroblob(9)")
        database.commit()
    with closing(EventLog(compacted, RUN)) as log:
        assert log.snapshot() is None
        assert len(list(log.replay())) == 8


def test_a_damaged_segment_is_noticed_by_whoever_reads_it(compacted: Path) -> None:
    (segment,) = (compacted.parent / SEGMENTS_FOLDER).iterdir()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with closing(EventLog(compacted, RUN)) as log:
        assert list(log.replay(after=5)) == more(3, at=20.0), "a start from the snapshot needs none"
        with pytest.raises(ChainError, match="damaged at event 1"):
            list(log.replay())
    segment.unlink()
    with closing(EventLog(compacted, RUN)) as log, pytest.raises(ConfigError, match="events from 1 on") as caught:
        list(log.replay())
    assert "Put the missing file" in caught.value.hint


def test_events_that_a_segment_should_have_are_missed(compacted: Path) -> None:
    with closing(sqlite3.connect(compacted)) as database:
        database.execute("DELETE FROM segments")
        database.commit()
    with pytest.raises(ChainError, match="lacks events"):
        EventLog(compacted, RUN)


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_page_is_noticed_before_anything_is_served(tmp_path: Path, seed: int) -> None:
    """By SQLite where it breaks the tree, by an event's checksum where it is in an event."""
    path = tmp_path / "events.sqlite"
    with closing(EventLog(path, RUN)) as log:
        log.append(more(2000))
        whole = list(log.replay())
    chance = random.Random(seed)
    data = bytearray(path.read_bytes())
    start = 4096 * chance.randrange(8, len(data) // 4096 - 1) + chance.randrange(2048, 4000)
    data[start : start + 40] = chance.randbytes(40)
    path.write_bytes(data)
    with pytest.raises(ChainError, match=r"damaged|lacks"), closing(EventLog(path, RUN)) as log:
        assert list(log.replay()) == whole


def test_the_check_at_a_start_ends_in_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(EventLog(path, RUN)) as log:
        log.append(more(5000))
    monkeypatch.setattr(log_module, "CHECK_SECONDS", -1.0)
    monkeypatch.setattr(log_module, "_STEPS", 10)
    with closing(EventLog(path, RUN)) as log:
        assert log.last == 5003
    assert "too large to be checked" in capsys.readouterr().out


def test_another_process_that_writes_the_log_is_noticed(path: Path) -> None:
    with closing(EventLog(path, RUN)) as log, closing(EventLog(path, RUN)) as other:
        other.append(more(1))
        with pytest.raises(BusyError, match="Another process writes") as caught:
            log.append(more(1))
    assert "Stop all coordinators" in caught.value.hint


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(log: EventLog, written: list[Event]) -> None:
    for number in range(1000):
        log.append(batch := more(50, at=100.0 * number))
        written += batch


def test_a_full_disk_takes_events_whole_or_not_and_the_log_goes_on_once_there_is_room(path: Path) -> None:
    written = list(EVENTS)
    with closing(EventLog(path, RUN)) as log, small_disk(300_000):
        with pytest.raises(ConfigError, match="Cannot write the event log") as caught:
            fill(log, written)
        assert "Free disk space" in caught.value.hint
        assert len(written) > 100
        assert list(log.replay()) == written, "it can still be read"
        with pytest.raises(ConfigError, match="Cannot write the event log"):
            log.append(more(5000))
    with closing(EventLog(path, RUN)) as log:
        assert list(log.replay()) == written
        log.append(more(3))
        assert list(log.replay()) == [*written, *more(3)]


def test_a_disk_that_is_full_of_a_segment_loses_nothing(path: Path) -> None:
    with closing(EventLog(path, RUN)) as log:
        log.append(more(5000))
        with small_disk(4096), pytest.raises(ConfigError, match="Cannot write the event log"):
            log.compact(Snapshot(5003, "shape", b"body"))
    with closing(EventLog(path, RUN)) as log:
        assert list(log.replay()) == [*EVENTS, *more(5000)]
        log.compact(Snapshot(5003, "shape", b"body"))
        assert list(log.replay()) == [*EVENTS, *more(5000)]
