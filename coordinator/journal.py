"""Group commit: what happens while the disk is busy is written together; what follows from it waits for the disk."""

import asyncio
from collections.abc import Callable

from hivegrpo.coordinator.events import Event
from hivegrpo.coordinator.log import EventLog
from hivegrpo.coordinator.snapshots import Snapshot
from hivegrpo.protocol.errors import ConfigError, RemoteError


class Journal:
    """One transaction at a time, in a thread: a sync to disk takes milliseconds, in which the event loop goes on."""

    def __init__(self, log: EventLog, on_failure: Callable[[Exception], None]) -> None:
        """`on_failure` is called with what goes wrong, on disk or in an effect; nothing is written from then on."""
        self._log = log
        self._on_failure = on_failure
        self._events: list[Event] = []
        self._effects: list[Callable[[], None]] = []
        self._gathering: asyncio.Future[None] | None = None
        """Done once the events that wait for the disk are written; None if there are none."""
        self._writing: asyncio.Future[None] | None = None
        """The same for those that are being written."""
        self._writer: asyncio.Task[None] | None = None
        self._snapshot: Snapshot | None = None
        self._failed = False
        self.last = log.last
        """Number of the newest event that was added, on disk or not."""

    def add(self, event: Event, effect: Callable[[], None]) -> None:
        """Write `event` soon, in order, and call `effect` once it is on disk."""
        self.last += 1
        self._events.append(event)
        self._effects.append(effect)
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().create_future()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    def keep(self, snapshot: Snapshot) -> None:
        """Keep a snapshot of what the events added so far come to, once they are on disk and followed up."""
        assert snapshot.sequence == self.last
        self._snapshot = snapshot

    @property
    def idle(self) -> bool:
        """Whether all that happened is on disk."""
        return self._gathering is None and self._writing is None

    async def settled(self) -> None:
        """Until nothing is being written any more."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def written(self) -> None:
        """Until everything added so far is on disk; RemoteError, for the peer that waits, if that fails."""
        pending = self._gathering or self._writing
        if pending is not None:
            await asyncio.shield(pending)
        if self._failed:
            raise RemoteError("the coordinator is stopping")

    async def _write(self) -> None:
        while self._gathering is not None:
            events, effects, snapshot = self._events, self._effects, self._snapshot
            self._events, self._effects, self._snapshot = [], [], None
            written, self._gathering = self._gathering, None
            self._writing = written
            try:
                if not self._failed:
                    await asyncio.to_thread(self._log.append, events)
                    for effect in effects:
                        effect()
            except Exception as error:  # noqa: BLE001 - of the disk or of an effect: nobody waits for this task
                self._fail(error)
            finally:
                self._writing = None
                written.set_result(None)
            if snapshot is not None and not self._failed:
                await self._compact(snapshot)
        self._writer = None

    async def _compact(self, snapshot: Snapshot) -> None:
        """Nobody waits for it but what happens meanwhile, which is written after it."""
        try:
            await asyncio.to_thread(self._log.compact, snapshot)
        except Exception as error:  # noqa: BLE001 - of the disk, as above
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._on_failure(disk_error(error) if isinstance(error, OSError) else error)


def disk_error(error: OSError) -> ConfigError:
    """For the user, who has to mend it."""
    return ConfigError(f"Cannot write to the coordinator's home: {error}.", "Repair the disk; then start again.")
