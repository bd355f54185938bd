"""Runs of a sweep as child processes, which end with it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hivegrpo.cli.children import Children
from hivegrpo.cli.output import Record
from hivegrpo.cli.sweep.folder import SWARM, Outcome, Task
from hivegrpo.cli.sweep.swarm import CONFIG_FILE, is_trained, train_swarm
from hivegrpo.cli.sweep.toml import write_run_toml
from hivegrpo.protocol.errors import BusyError, HiveError
from hivegrpo.protocol.files import remove_temporaries
from hivegrpo.protocol.homes import locked_home

VERSION_SECONDS = 3600.0
"""How long a run may take to finish its version once it is asked to stop."""
ORPHAN_SECONDS = 90.0
"""How long processes of a sweep that was killed may take to notice it, and to leave."""
POLL_SECONDS = 0.2

Take = Callable[[Record], None]


class Runner:
    """Starts the processes of runs, some side by side. For one event loop."""

    def __init__(self, threads: int, stop: asyncio.Event) -> None:
        """threads: of torch, for each run; `stop` lets every run finish the version that it is at."""
        self._threads, self._stop = threads, stop
        self._alive: list[Children] = []

    def kill(self) -> None:
        """End all processes at once, and do not wait."""
        for children in self._alive:
            children.kill()

    async def run(self, folder: Path, take: Take) -> None:
        """Bring the run in a folder to its end, or as far as `stop` lets it come; its versions go to `take`.

        HiveError if it cannot be brought to its end.
        """
        for home in (folder, *sorted((folder / SWARM).glob("*/"))):
            await _until_free(home)
        remove_temporaries(folder)
        task, stopping = Task.read(folder), asyncio.create_task(self._stop.wait())
        try:
            if task.peers and not is_trained(folder, task):
                threads = max(1, self._threads // task.peers)
                write_run_toml(folder / SWARM / CONFIG_FILE, task.config)
                async with self._children(folder / SWARM) as children:
                    await train_swarm(folder, task, threads, take, stopping, children)
            if not self._stop.is_set():
                async with self._children(folder) as children:
                    await self._work(folder, take, stopping, children)
        finally:
            stopping.cancel()
        if not self._stop.is_set() and Outcome.read(folder).state != "finished":
            raise HiveError("It ended before it was finished.", "Somebody must have stopped it: use --retry-failed.")

    async def _work(self, folder: Path, take: Take, stopping: asyncio.Task[bool], children: Children) -> None:
        """The process that trains on one machine, or measures what a swarm has trained."""
        errors: list[str] = []

        def listen(record: Record) -> None:
            if record["kind"] == "failed":
                errors.append(record["error"])
            else:
                take(record)

        done = await children.start("run", worker_command(folder, self._threads), listen)
        await asyncio.wait({done, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            children.ask()
            await asyncio.wait({done}, timeout=VERSION_SECONDS)
        if done.done():
            try:
                await done
            except HiveError:
                if errors:
                    raise HiveError(errors[-1]) from None  # it has said itself what was wrong
                if not self._stop.is_set():  # asked to stop, it may have been too young to do it gracefully
                    raise

    @asynccontextmanager
    async def _children(self, logs: Path) -> AsyncIterator[Children]:
        children = Children(logs)
        self._alive.append(children)
        try:
            async with children:
                yield children
        finally:
            self._alive.remove(children)


def worker_command(folder: Path, threads: int) -> list[str]:
    """Of the process that this one starts for a run."""
    return [sys.executable, "-m", "hivegrpo.cli.sweep.worker", str(folder), str(threads), str(os.getpid())]


async def _until_free(home: Path) -> None:
    """Wait for the processes of an earlier start, which end by themselves once that is gone; BusyError if they stay."""
    loop = asyncio.get_running_loop()
    end = loop.time() + ORPHAN_SECONDS
    while True:
        try:
            with locked_home(home):
                return
        except BusyError:
            if loop.time() > end:
                raise
            await asyncio.sleep(POLL_SECONDS)
