"""The releases of a run as they come, from the process that exports them; and an endpoint that follows them."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from hivegrpo.peer.serving.engines import Engines, Tell
from hivegrpo.peer.serving.process import Process
from hivegrpo.peer.serving.releases import Release
from hivegrpo.protocol.errors import HiveError

FIRST_SECONDS = 3600.0
"""How long the first release may take: a model may have to be fetched."""
MAX_TRIES = 5
"""Starts of an engine on one release."""
RETRY_SECONDS = 30.0
"""After the first start that failed; each further one waits twice as long."""
KEY = "HIVEGRPO_SERVE_API_KEY"
"""The variable with the clients' key, in any case: it is no business of a child's."""
MAX_STARTS = 5
"""Of the exporting process, when it ends by itself."""


class Source:
    """RUN's releases at `revision`; the newest one told so far is kept."""

    def __init__(self, run: str | None, revision: str, follow: float | None, tell: Tell) -> None:
        """follow: seconds between two looks for a newer version; one look if None."""
        words = [run or "", revision, str(follow) if follow is not None else ""]
        self._command = [sys.executable, "-P", "-m", "hivegrpo.peer.serving.releases", *words]
        self._follow = follow
        self._tell = tell
        self._newest: Release | None = None
        self._news = asyncio.Condition()
        self._process: Process | None = None

    async def first(self) -> Release:
        """The first release; HiveError, with its exit code, if there is none."""
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                error = await self._listen(once=True)
        except TimeoutError:
            raise HiveError(f"The model was not there after {FIRST_SECONDS:.0f} seconds.") from None
        if self._newest is None:
            raise error
        return self._newest

    async def follow(self, engines: Engines) -> None:
        """Switch to every newer release; that releases can no longer be got is told. Ends only by failing."""
        looking = asyncio.create_task(self._look())
        switching = asyncio.create_task(self._switch(engines, self._newest))
        try:
            await asyncio.gather(looking, switching)
        finally:
            looking.cancel()
            switching.cancel()
            await asyncio.gather(looking, switching, return_exceptions=True)

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            await self._process.stop()

    async def _look(self) -> None:
        """Take what the process tells, and start it again when it ends, `MAX_STARTS` times at most."""
        for start in range(MAX_STARTS):
            try:
                error = await self._listen(once=False)
            except (OSError, ValueError, TypeError, LookupError) as broken:
                error = HiveError(f"The export failed: {type(broken).__name__}: {broken}.")
            self._tell({"kind": "trouble", "message": str(error)})
            await asyncio.sleep(RETRY_SECONDS * 2.0**start)
        self._tell({"kind": "trouble", "message": "Newer versions are no longer looked for."})

    async def _listen(self, once: bool) -> HiveError:
        """Take what the process tells, until it ends (or, if `once`, to its first release); why it ended."""
        if self._process is None or not self._process.running:
            self._process = await Process.start(
                self._command, folder=Path.cwd(), environment=_environment(), records=True
            )
        ended = HiveError(f"The export ended. {self._process.said()}")
        async for line in self._process.lines():
            record = _parse(line)
            if "error" in record:
                ended = HiveError(str(record["error"]), str(record.get("hint", "")))
                ended.exit_code = int(record.get("exit_code", 1))
                if not once:
                    self._tell({"kind": "trouble", "message": str(ended)})
            elif "folder" in record:
                async with self._news:
                    self._newest = Release(Path(record["folder"]), str(record["name"]), str(record["version"]))
                    self._news.notify_all()
                if once:
                    return ended
        await self._process.ended()
        if not ended.hint:
            ended = HiveError(f"The export ended. {self._process.said()}")
        return ended

    async def _switch(self, engines: Engines, served: Release | None) -> None:
        while True:
            served = await self._newer_than(served)
            await self._try(engines, served)

    async def _newer_than(self, served: Release | None) -> Release:
        async with self._news:
            await self._news.wait_for(lambda: self._newest != served)
        assert self._newest is not None
        return self._newest

    async def _try(self, engines: Engines, release: Release) -> None:
        """Start an engine on the release; give up after `MAX_TRIES`, or when there is a newer one."""
        for number in range(MAX_TRIES):
            try:
                await engines.switch(release)
                return
            except HiveError as error:
                kept = f"Version {release.version} is not served, the one before it still is: {error}"
                self._tell({"kind": "trouble", "message": kept})
            try:
                async with asyncio.timeout(RETRY_SECONDS * 2.0**number):
                    await self._newer_than(release)
                    return
            except TimeoutError:
                continue


def _parse(line: bytes) -> dict[str, Any]:
    """What a line tells; nothing if it is a library's own."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.upper() != KEY}
