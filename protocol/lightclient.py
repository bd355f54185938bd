"""Following a run without taking part: its signed chain, verified, kept, and compared with what was seen before.

Nothing here depends on an event loop: the light client's transport runs on trio, the others on asyncio.
"""

import json
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import find_chain, follow_chain
from hivegrpo.protocol.errors import UnreachableError, WireError
from hivegrpo.protocol.homes import locked_home, state_folder
from hivegrpo.protocol.transport.base import Dials

POLL_SECONDS = 2.0
"""Between questions for newer versions."""

FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0
GIVE_UP_SECONDS = 600.0
"""A run of which nobody has answered for so long is given up."""


def watch_folder(run_id: str) -> Path:
    """Where the chain of a run that is watched is kept: beside the runs, since nobody works there."""
    return state_folder() / "watch" / run_id[:16]


class LightClient:
    """One run's chain through one address. A context manager: it holds its home while it is open."""

    def __init__(
        self,
        transport: Dials,
        address: str,
        *,
        run_id: str | None = None,
        home: Path | None = None,
        sleep: Callable[[float], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Trust comes from the peer id in `address`, or from `run_id` where one is given: then anybody may serve it."""
        self._transport = transport
        self._address = address
        self._run_id = run_id
        self._home = home
        self._sleep = sleep
        self._clock = clock
        self._stack = ExitStack()
        self._file: ChainFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def chain(self) -> Chain:
        """What is verified and on disk, once `follow` has found the run."""
        assert self._file is not None
        return self._file.chain

    async def follow(self, on_news: Callable[[Chain], None], *, once: bool = False) -> None:
        """Call `on_news` once the run is found, and whenever there are newer versions, until its last one is there.

        With `once`, until what is there now has been fetched. Every version is verified and on disk before `on_news` is
        called. ChainError (its kinds say what) if something does not verify, or contradicts what was verified before,
        also in an earlier process; UnreachableError if nobody answers: at once with `once`, else after ten minutes.
        """
        heard, pause = self._clock(), FIRST_PAUSE
        while True:
            try:
                holder = await self._transport.connect([self._address])
                while True:
                    await self._poll(holder, on_news)
                    heard, pause = self._clock(), FIRST_PAUSE
                    if once or is_finished(self.chain):
                        return
                    await self._sleep(POLL_SECONDS)
            except (WireError, UnreachableError) as error:
                if once or self._clock() - heard > GIVE_UP_SECONDS:
                    raise UnreachableError(
                        f"The run at {self._address} cannot be read: {error.message}.",
                        "Check that the node there is running; what was verified so far is kept.",
                    ) from error
            await self._sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)

    async def _poll(self, holder: str, on_news: Callable[[Chain], None]) -> None:
        told = self.chain.height if self._file is not None else None
        if self._file is None:
            self._file = self._open(await find_chain(self._transport, holder, self._run_id))
        try:
            await follow_chain(self._transport, holder, self._file)
        finally:
            self._file.flush()
            if self.chain.height != told:
                on_news(self.chain)

    def _open(self, found: Chain) -> ChainFile:
        home = self._stack.enter_context(locked_home(self._home or watch_folder(found.run_id)))
        pinned = found.coordinator if self._run_id is None else None
        return ChainFile.create(home, found.run, pinned, found.successions)


def planned_versions(chain: Chain) -> int | None:
    """Versions that the run is to have, by its manifest; None if that does not say so."""
    try:
        versions = json.loads(chain.manifest.message.config)["run"]["versions"]
    except (ValueError, LookupError, TypeError):
        return None
    return versions if isinstance(versions, int) else None


def is_finished(chain: Chain) -> bool:
    """Whether the chain has the run's last version."""
    versions = planned_versions(chain)
    return versions is not None and chain.height >= versions
