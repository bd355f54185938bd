"""Group commit: events that happen together are written together, and what follows from them waits for the disk."""

import asyncio
from collections.abc import Callable

from hivegrpo.coordinator.events import Event
from hivegrpo.coordinator.log import EventLog
from hivegrpo.protocol.errors import ConfigError, RemoteError


class Journal:
    """Events of one pass of the event loop go into one transaction: a sync to disk costs ten milliseconds."""

    def __init__(self, log: EventLog, on_failure: Callable[[Exception], None]) -> None:
        """`on_failure` is called with what goes wrong, on disk or in an effect; nothing is written from then on."""
        self._log = log
        self._on_failure = on_failure
        self._events: list[Event] = []
        self._effects: list[Callable[[], None]] = []
        self._pending: asyncio.Future[None] | None = None
        self._failed = False

    def add(self, event: Event, effect: Callable[[], None]) -> None:
        """Write `event` soon, in order, and call `effect` once it is on disk."""
        self._events.append(event)
        self._effects.append(effect)
        if self._pending is None:
            loop = asyncio.get_running_loop()
            self._pending = loop.create_future()
            loop.call_soon(self._flush)

    @property
    def idle(self) -> bool:
        """Whether all that happened is on disk."""
        return self._pending is None

    async def written(self) -> None:
        """Until everything added so far is on disk; RemoteError, for the peer that waits, if that fails."""
        while self._pending is not None:
            await asyncio.shield(self._pending)
        if self._failed:
            raise RemoteError("the coordinator is stopping")

    def _flush(self) -> None:
        events, effects, pending = self._events, self._effects, self._pending
        self._events, self._effects, self._pending = [], [], None
        assert pending is not None
        try:
            if not self._failed:
                self._log.append(events)
                for effect in effects:
                    effect()
        except Exception as error:  # noqa: BLE001 - called by the event loop: nobody else would see it
            self._failed = True
            self._on_failure(_disk_error(error) if isinstance(error, OSError) else error)
        pending.set_result(None)


def _disk_error(error: OSError) -> ConfigError:
    return ConfigError(f"Cannot write to the coordinator's home: {error}.", "Repair the disk; then start again.")
