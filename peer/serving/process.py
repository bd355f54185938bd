"""A child process of `hivegrpo serve`: an engine, or what gets releases. None is left behind."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

GRACEFUL_SECONDS = 10.0
"""How long it may take to leave when it is told to."""
KILL_SECONDS = 5.0
SAID_BYTES = 8192
"""Of what it wrote last."""
LAST_LINES = 12
MAX_LINE_BYTES = 1 << 16


class Process:
    """In a session of its own, so that Ctrl-C at the terminal does not reach it, and tied to this process's life."""

    def __init__(self, process: asyncio.subprocess.Process, records: bool) -> None:
        _alive.add(self)
        self._process = process
        self._said = b""
        self._swept = False
        noise = process.stderr if records else process.stdout
        assert noise is not None
        self._reading = asyncio.create_task(self._read(noise))

    @classmethod
    async def start(
        cls, command: Sequence[str], *, folder: Path, environment: Mapping[str, str], records: bool = False
    ) -> Self:
        """records: its stdout is read through `lines`; otherwise it is kept like stderr, as what it said last."""
        tether = [sys.executable, "-P", "-m", "hivegrpo.peer.serving.tether", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            *tether,
            *command,
            cwd=folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if records else asyncio.subprocess.STDOUT,
            limit=MAX_LINE_BYTES,
            start_new_session=True,
        )
        return cls(process, records)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def listens(self, port: int) -> bool:
        """Whether the one who listens at a TCP port is it, or one that it has started."""
        try:
            child = psutil.Process(self.pid)
            family = [child, *child.children(recursive=True)]
        except psutil.Error:
            return False
        return any(_listens(process, port) for process in family)

    async def lines(self) -> AsyncIterator[bytes]:
        """Its stdout, until it ends; ValueError for a line over `MAX_LINE_BYTES`."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            yield line

    async def ended(self) -> int:
        """Its exit code, once it has ended; what it started is ended then too."""
        code = await self._process.wait()
        self.kill()
        return code

    def said(self) -> str:
        """What it wrote last, for people."""
        lines = self._said.decode(errors="replace").strip().splitlines()
        return "\n".join(["It said last:", *lines[-LAST_LINES:]]) if lines else "It said nothing."

    async def stop(self) -> None:
        """Tell it to leave; then kill it, and what it started."""
        if self.running:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACEFUL_SECONDS):
                    await self._process.wait()
        self.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_SECONDS):
                await asyncio.gather(self._process.wait(), self._reading)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def kill(self) -> None:
        """End it and what it started at once, and do not wait.

        Its process group has its id, which no other process gets while it is not waited for, or one of them is left.
        """
        if not self._swept:
            self._swept = not self.running
            if self._swept:
                _alive.discard(self)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(SAID_BYTES):
            self._said = (self._said + chunk)[-SAID_BYTES:]


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return False
    return any(link.status == psutil.CONN_LISTEN and link.laddr.port == port for link in connections)


_alive: set[Process] = set()


def kill_all() -> None:
    """End all that this process has started at once: for the end of it that waits for nothing."""
    for process in list(_alive):
        process.kill()
