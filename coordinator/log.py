"""The event log: append-only, in SQLite, on disk (fsync) before `append` returns."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hivegrpo.coordinator.events import Event, decode_event, encode_event
from hivegrpo.protocol.errors import ChainError, ConfigError

SCHEMA_VERSION = 1
LOG_FILE = "events.sqlite"

_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE events (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL) STRICT",
    "CREATE TRIGGER events_keep BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END",
    "CREATE TRIGGER events_stay BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END",
)


class EventLog:
    """One run's events, oldest first."""

    def __init__(self, path: Path, run_id: str) -> None:
        """Open or create. ConfigError if the file is of another run or schema, ChainError if it is damaged."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.run_id = run_id
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
        except ConfigError:
            self._database.close()
            raise

    def append(self, events: Sequence[Event]) -> None:
        """Write all of them or none. ConfigError if the disk does not take them."""
        rows = [encode_event(event) for event in events]
        try:
            with self._transaction():
                self._database.executemany("INSERT INTO events (kind, body) VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise ConfigError(
                f"Cannot write the event log {self.path}: {error}.",
                "Free disk space or repair the disk, then start the coordinator again: it resumes.",
            ) from error

    def replay(self) -> Iterator[Event]:
        """All events, oldest first. ChainError if one is missing or cannot be read."""
        expected = 1
        try:
            rows = self._database.execute("SELECT sequence, kind, body FROM events ORDER BY sequence")
            for sequence, kind, body in rows:
                if sequence != expected:
                    raise ChainError(f"The event log {self.path} lacks event {expected}.", DAMAGED_HINT)
                yield decode_event(kind, body)
                expected += 1
        except (sqlite3.DatabaseError, ValueError) as error:
            raise ChainError(
                f"The event log {self.path} is damaged at event {expected}: {error}.", DAMAGED_HINT
            ) from error

    def close(self) -> None:
        """Release the file; idempotent."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

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


DAMAGED_HINT = (
    "Restore the file from a backup that is not older than the newest version any peer has; "
    "if there is none, start a new run."
)
