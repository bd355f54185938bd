"""The coordinator's log on disk: append-only, all or nothing, and bound to its run."""

import sqlite3
from pathlib import Path

import pytest

from hivegrpo.coordinator.events import ContributionReceived, CoordinatorStarted, Event, PeerDisconnected, PeerJoined
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import EventLog
from hivegrpo.protocol.errors import ChainError, ConfigError

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
    with pytest.raises(ConfigError, match="has schema 99, this version reads 1"):
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
        ("UPDATE events SET kind = 'PeerExploded' WHERE sequence = 3", "damaged at event 3: no event is called"),
        ("DELETE FROM events WHERE sequence = 2", "lacks event 2"),
    ],
)
def test_damaged_events_are_noticed(path: Path, damage: str, complaint: str) -> None:
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER events_keep")
    database.execute("DROP TRIGGER events_stay")
    database.execute(damage)
    database.commit()
    database.close()
    log = EventLog(path, RUN)
    with pytest.raises(ChainError, match=complaint):
        list(log.replay())
    log.close()


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
