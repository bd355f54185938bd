"""Group commit: one transaction for what happens together, and nothing follows before it is on disk."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from hivegrpo.coordinator.events import CoordinatorStarted, Event
from hivegrpo.coordinator.journal import Journal
from hivegrpo.coordinator.log import EventLog
from hivegrpo.coordinator.snapshots import Snapshot
from hivegrpo.protocol.errors import ConfigError, RemoteError

RUN = "ab" * 32
PATIENCE = 20.0


class Disk(EventLog):
    """A log that notes its transactions, and can be made to fail, or to wait."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, RUN)
        self.transactions: list[int] = []
        self.full = False
        self.busy, self.free = threading.Event(), threading.Event()
        """Set once something is being written; unset to hold that up."""
        self.free.set()

    def append(self, events: Sequence[Event]) -> None:
        self.busy.set()
        assert self.free.wait(PATIENCE)
        if self.full:
            raise ConfigError("Cannot write: the disk is full.", "Free disk space.")
        super().append(events)
        self.transactions.append(len(events))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "events.sqlite")


def started(at: float) -> Event:
    return CoordinatorStarted(at)


def test_what_happens_together_is_written_together_and_followed_up_in_order(disk: Disk) -> None:
    followed: list[tuple[float, int]] = []

    async def report(journal: Journal, at: float) -> None:
        journal.add(started(at), lambda: followed.append((at, len(disk.transactions))))
        await journal.written()
        assert (at, 1) in followed, "it is answered after it was written"

    async def test() -> None:
        journal = Journal(disk, pytest.fail)
        await asyncio.gather(*(report(journal, at) for at in (1.0, 2.0, 3.0)))
        assert journal.idle

    asyncio.run(test())
    assert disk.transactions == [3]
    assert followed == [(1.0, 1), (2.0, 1), (3.0, 1)]
    assert list(disk.replay()) == [started(at) for at in (1.0, 2.0, 3.0)]
    disk.close()


def test_the_event_loop_goes_on_while_the_disk_is_busy(disk: Disk) -> None:
    """What happens meanwhile is one transaction, and whoever waits for the first does not wait for that one."""
    disk.free.clear()

    async def test() -> None:
        journal = Journal(disk, pytest.fail)
        journal.add(started(1.0), lambda: None)
        first = asyncio.create_task(journal.written())
        assert await asyncio.to_thread(disk.busy.wait, PATIENCE)
        for at in (2.0, 3.0):
            journal.add(started(at), lambda: None)
        assert not journal.idle
        second = asyncio.create_task(journal.written())
        await asyncio.sleep(0)  # it waits from here on
        disk.free.set()
        await first
        assert disk.transactions[0] == 1
        await second
        assert disk.transactions == [1, 2]

    asyncio.run(test())
    assert disk.transactions == [1, 2]
    assert [event.at for event in disk.replay()] == [1.0, 2.0, 3.0]
    disk.close()


def test_after_a_failure_nothing_is_written_and_nothing_follows(disk: Disk) -> None:
    errors: list[Exception] = []

    async def test() -> None:
        journal = Journal(disk, errors.append)
        disk.full = True
        journal.add(started(1.0), pytest.fail)
        with pytest.raises(RemoteError, match="is stopping"):
            await journal.written()
        disk.full = False
        journal.add(started(2.0), pytest.fail)
        with pytest.raises(RemoteError, match="is stopping"):
            await journal.written()

    asyncio.run(test())
    assert [str(error) for error in errors] == ["Cannot write: the disk is full. Free disk space."]
    assert list(disk.replay()) == [], "an event after the lost one would be a gap"
    disk.close()


def test_a_snapshot_is_kept_once_what_is_in_it_is_on_disk_and_followed_up(disk: Disk) -> None:
    """And not of what was added after it; who waits for an event does not wait for it."""
    followed: list[float] = []
    disk.free.clear()

    async def test() -> None:
        journal = Journal(disk, pytest.fail)
        for at in (1.0, 2.0):
            journal.add(started(at), lambda at=at: followed.append(at))
            journal.keep(Snapshot(journal.last, "shape", str(at).encode()))
        assert await asyncio.to_thread(disk.busy.wait, PATIENCE)
        assert disk.snapshot() is None
        journal.add(started(3.0), lambda: followed.append(3.0))
        disk.free.set()
        await journal.settled()
        assert disk.snapshot() == Snapshot(2, "shape", b"2.0")
        assert (journal.last, journal.idle) == (3, True)

    asyncio.run(test())
    assert followed == [1.0, 2.0, 3.0]
    assert [event.at for event in disk.replay()] == [1.0, 2.0, 3.0]
    assert [event.at for event in disk.replay(after=2)] == [3.0]
    disk.close()


def test_what_happened_is_on_disk_before_the_snapshot_of_it_is(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for that, to say that the run is finished, is not told when the snapshot is kept."""
    free = threading.Event()

    async def test() -> None:
        journal = Journal(disk, pytest.fail)
        monkeypatch.setattr(disk, "compact", lambda _: free.wait(PATIENCE))
        journal.add(started(1.0), lambda: None)
        journal.keep(Snapshot(1, "shape", b""))
        assert not journal.idle
        await journal.written()
        assert journal.idle
        free.set()
        await journal.settled()

    asyncio.run(test())
    disk.close()


def test_a_snapshot_that_cannot_be_kept_is_a_failure(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []

    def full(_: Snapshot) -> None:
        raise ConfigError("Cannot write: the disk is full.", "Free disk space.")

    async def test() -> None:
        journal = Journal(disk, errors.append)
        monkeypatch.setattr(disk, "compact", full)
        journal.add(started(1.0), lambda: None)
        journal.keep(Snapshot(1, "shape", b""))
        await journal.settled()
        with pytest.raises(RemoteError, match="is stopping"):
            await journal.written()

    asyncio.run(test())
    assert [type(error) for error in errors] == [ConfigError]
    assert [event.at for event in disk.replay()] == [1.0]
    disk.close()


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError(28, "No space left on device"), ConfigError), (ZeroDivisionError(), ZeroDivisionError)]
)
def test_an_effect_that_fails_is_a_failure_too(disk: Disk, error: Exception, seen: type[Exception]) -> None:
    errors: list[Exception] = []

    def fail() -> None:
        raise error

    async def test() -> None:
        journal = Journal(disk, errors.append)
        journal.add(started(1.0), fail)
        with pytest.raises(RemoteError):
            await journal.written()

    asyncio.run(test())
    assert [type(error) for error in errors] == [seen]
    disk.close()
