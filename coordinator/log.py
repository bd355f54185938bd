"""The event log: append-only, in SQLite, on disk (fsync) before `append` returns.

The database has the newest events and the newest snapshot; older events are in segments beside it (`segments`). So
its size, and the time that a start takes, do not grow with the run.
"""

import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import structlog

from hivegrpo.coordinator.events import Event, decode_event, encode_event
from hivegrpo.coordinator.segments import Row, Segment, read_segment, write_segment
from hivegrpo.coordinator.snapshots import Snapshot
from hivegrpo.protocol.errors import BusyError, ChainError, ConfigError

SCHEMA_VERSION = 2
LOG_FILE = "events.sqlite"
SEGMENTS_FOLDER = "events"

CHECK_SECONDS = 2.0
"""For SQLite's own check of the file at a start; events are checked one by one as well, as they are read."""

_STEPS = 10_000
"""Of SQLite's virtual machine, between two looks at the clock."""

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE events (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL)"
    " STRICT",
    "CREATE TABLE segments (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, digest BLOB NOT NULL) STRICT",
    "CREATE TABLE snapshots (sequence INTEGER PRIMARY KEY, shape TEXT NOT NULL, body BLOB NOT NULL,"
    " digest BLOB NOT NULL) STRICT",
    "CREATE TRIGGER events_keep BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END",
    "CREATE TRIGGER events_stay BEFORE DELETE ON events"
    " WHEN old.sequence > (SELECT coalesce(max(last), 0) FROM segments)"
    " BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END",
)

log = structlog.get_logger(__name__)


class EventLog:
    """One run's events, oldest first, counted from 1."""

    def __init__(self, path: Path, run_id: str) -> None:
        """Open or create. ConfigError if the file is of another run or schema, ChainError if it is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.run_id = run_id
        self.last = 0
        """Number of the newest event."""
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise ConfigError(
                f"Cannot open the event log {path}: {error}.", "Check the folder's permissions."
            ) from error
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._database.close()
            raise ConfigError(f"Cannot use the event log {path}: {error}.", "Check the disk.") from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ChainError(f"The event log {path} is damaged: {error}.", DAMAGED_HINT) from error
        except (ConfigError, ChainError):
            self._database.close()
            raise

    def append(self, events: Sequence[Event]) -> None:
        """Write all of them or none. ConfigError if the disk does not take them, BusyError if another one writes."""
        rows = [
            (sequence, *row, _crc(sequence, row))
            for sequence, row in enumerate(map(encode_event, events), start=self.last + 1)
        ]
        try:
            with self._transaction():
                self._database.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                raise BusyError(
                    f"Another process writes the event log {self.path}.",
                    "Stop all coordinators of this run, then start one: it resumes.",
                ) from error
            raise self._unwritable(error) from error
        self.last += len(rows)

    def replay(self, after: int = 0) -> Iterator[Event]:
        """The events after the first `after`, oldest first. ChainError if one is missing or cannot be read.

        Whatever happens to the log meanwhile, it is the log of the moment at which the first one is taken.
        """
        expected = after + 1
        try:
            for sequence, row in self._rows(after):
                if sequence != expected:
                    raise ChainError(f"The event log {self.path} lacks event {expected}.", DAMAGED_HINT)
                yield decode_event(*row)
                expected += 1
        except (sqlite3.DatabaseError, ValueError, EOFError, zlib.error) as error:
            raise ChainError(
                f"The event log {self.path} is damaged at event {expected}: {error}.", DAMAGED_HINT
            ) from error
        except OSError as error:
            raise ConfigError(f"Cannot read the events from {expected} on: {error}.", SEGMENT_HINT) from error

    def snapshot(self) -> Snapshot | None:
        """The newest one; None if there is none, or if it is damaged: the events are there as well."""
        found = self._database.execute("SELECT * FROM snapshots ORDER BY sequence DESC LIMIT 1").fetchone()
        if found is None:
            return None
        sequence, shape, packed, digest = found
        if sha256(packed).digest() != digest or sequence > self.last:
            log.warning("the snapshot in the log is damaged: replaying all events", path=str(self.path))
            return None
        return Snapshot(sequence, shape, zlib.decompress(packed))

    def compact(self, snapshot: Snapshot) -> None:
        """Keep a snapshot, and move the events up to it to a segment. ConfigError if the disk does not take it."""
        assert snapshot.sequence <= self.last
        packed = zlib.compress(snapshot.body, 1)
        try:
            segment = self._archive(snapshot.sequence)
            with self._transaction():
                if segment is not None:
                    self._database.execute(
                        "INSERT INTO segments VALUES (?, ?, ?)", (segment.first, segment.last, segment.digest)
                    )
                self._database.execute("DELETE FROM snapshots")
                row = (snapshot.sequence, snapshot.shape, packed, sha256(packed).digest())
                self._database.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", row)
                self._database.execute("DELETE FROM events WHERE sequence <= ?", (snapshot.sequence,))
        except (sqlite3.Error, OSError) as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Release the file; idempotent."""
        self._database.close()

    @property
    def _folder(self) -> Path:
        return self.path.parent / SEGMENTS_FOLDER

    def _archive(self, until: int) -> Segment | None:
        rows = self._database.execute(
            "SELECT sequence, kind, body FROM events WHERE sequence <= ? ORDER BY sequence", (until,)
        )
        newest = rows.fetchone()
        if newest is None:
            return None
        first, kind, body = newest

        def all_rows() -> Iterator[Row]:
            yield kind, body
            for _, *row in rows:
                yield row[0], row[1]

        return write_segment(self._folder, first, all_rows())

    def _rows(self, after: int) -> Iterator[tuple[int, Row]]:
        """Through a connection of its own, which sees one moment of the log."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            database.execute("BEGIN")
            segments = database.execute("SELECT first, last, digest FROM segments ORDER BY first").fetchall()
            for segment in (Segment(*row) for row in segments):
                if segment.last > after:
                    for sequence, archived in enumerate(read_segment(self._folder, segment), start=segment.first):
                        if sequence > after:
                            yield sequence, archived
            rows = database.execute("SELECT * FROM events WHERE sequence > ? ORDER BY sequence", (after,))
            for sequence, kind, body, crc in rows:
                row = kind, body
                if _crc(sequence, row) != crc:
                    raise ValueError("it is not what was written")
                yield sequence, row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        tables = self._database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0]
        if not tables:
            with self._transaction():
                for statement in _SCHEMA:
                    self._database.execute(statement)
                meta = [("schema", str(SCHEMA_VERSION)), ("run", self.run_id)]
                self._database.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        found = dict(self._database.execute("SELECT name, value FROM meta").fetchall())
        if found.get("schema") != str(SCHEMA_VERSION):
            raise ConfigError(
                f"The event log {self.path} has schema {found.get('schema')}, this version reads {SCHEMA_VERSION}.",
                "Go on with the version of hivegrpo that started this run.",
            )
        if found.get("run") != self.run_id:
            raise ConfigError(
                f"The event log {self.path} belongs to run {str(found.get('run'))[:16]}, not to {self.run_id[:16]}.",
                "Give this run a home folder of its own with --home.",
            )
        self._check()

    def _check(self) -> None:
        """Whether the file is whole, as far as it can be told in time, and has all events that no segment has."""
        complaint = self._quick_check()
        if complaint != "ok":
            raise ChainError(f"The event log {self.path} is damaged: {complaint}.", DAMAGED_HINT)
        self._database.execute("BEGIN")  # one moment: a coordinator may be compacting the log that somebody looks at
        archived = self._database.execute(
            "SELECT coalesce(max(last), 0), coalesce(sum(last - first + 1), 0) FROM segments"
        ).fetchone()
        first, last, count = self._database.execute(
            "SELECT coalesce(min(sequence), ?), coalesce(max(sequence), ?), count(*) FROM events",
            (archived[0] + 1, archived[0]),
        ).fetchone()
        self._database.execute("COMMIT")
        if archived[0] != archived[1] or first != archived[0] + 1 or last - first + 1 != count:
            raise ChainError(f"The event log {self.path} lacks events.", DAMAGED_HINT)
        self.last = last

    def _quick_check(self) -> str:
        until = time.monotonic() + CHECK_SECONDS
        self._database.set_progress_handler(lambda: time.monotonic() > until, _STEPS)
        try:
            return str(self._database.execute("PRAGMA quick_check(1)").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            log.warning("the log is too large to be checked whole at a start", path=str(self.path))
            return "ok"
        finally:
            self._database.set_progress_handler(None, 0)

    def _unwritable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"Cannot write the event log {self.path}: {error}.",
            "Free disk space or repair the disk, then start the coordinator again: it resumes.",
        )


def _crc(sequence: int, row: Row) -> int:
    """Of an event, and its place: SQLite has no checksums of its own."""
    return zlib.crc32(row[1], zlib.crc32(row[0].encode(), sequence & 0xFFFFFFFF))


DAMAGED_HINT = (
    "Restore the home from a backup that is not older than the newest version any peer has; "
    "if there is none, start a new run."
)

SEGMENT_HINT = (
    "Put the missing file of the folder events/ back from where it was moved, or from a backup; a coordinator whose "
    "snapshot and chain are whole does not need it."
)
