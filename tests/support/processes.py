"""Coordinators and peers as real processes on loopback, started and ended by the tests."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import psutil

from support.runs import KEPT_VERSIONS

Record = dict[str, Any]
T = TypeVar("T")
ADDITION = Path(str(files("hivegrpo.cli"))) / "addition"


@dataclass
class Process:
    """A command with what it has written so far: JSON lines on stdout, anything on stderr."""

    process: asyncio.subprocess.Process
    records: list[Record] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    reader: asyncio.Task[None] | None = None
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait_for(self, condition: Callable[[Record], bool], seconds: float = 90.0) -> Record:
        """The first record, from the beginning, for which `condition` holds."""
        return await self._first(lambda: next(filter(condition, self.records), None), seconds)

    async def wait_for_stderr(self, text: str, seconds: float = 30.0) -> str:
        """The first line of stderr with `text` in it."""
        return await self._first(lambda: next((line for line in self.lines if text in line), None), seconds)

    async def ended(self, seconds: float = 90.0) -> int:
        """Its exit code, once all that it wrote is here."""
        assert self.reader is not None
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(self.reader)
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"still running after {seconds} s; {self.tail()}") from None

    def send(self, number: signal.Signals) -> None:
        """Signal it."""
        self.process.send_signal(number)

    def tail(self) -> str:
        """The last lines of its stderr and its last records."""
        return "\n".join([*self.lines[-25:], *(json.dumps(record)[:300] for record in self.records[-3:])])

    async def read(self) -> None:
        """Collect what it writes until it ends."""
        await asyncio.gather(
            self._read(self.process.stdout, lambda line: self.records.append(json.loads(line))),
            self._read(self.process.stderr, lambda line: self.lines.append(line.rstrip())),
        )
        await self.process.wait()
        async with self._news:
            self._news.notify_all()

    async def _read(self, stream: asyncio.StreamReader | None, take: Callable[[str], None]) -> None:
        assert stream is not None
        while line := await stream.readline():
            async with self._news:
                take(line.decode(errors="replace"))
                self._news.notify_all()

    async def _first(self, find: Callable[[], T | None], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds), self._news:
                while (found := find()) is None:
                    if self.reader is not None and self.process.returncode is not None:
                        raise AssertionError(f"ended with {self.process.returncode}: {self.tail()}")
                    await self._news.wait()
                return found
        except TimeoutError:
            raise AssertionError(f"nothing of the kind within {seconds} s; {self.tail()}") from None


class Machine:
    """Starts processes with a state folder of their own; whatever still runs at the end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Process] = []
        self._environment = os.environ | {"HIVEGRPO_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}

    async def coordinator(self, config: Path, *flags: str) -> Process:
        """`hivegrpo coordinator run`."""
        command = ["coordinator", "run", "--config", str(config), "--host", "127.0.0.1", "--json", *flags]
        return await self.hivegrpo(*command)

    async def peer(self, address: str, name: str, *flags: str) -> Process:
        """`hivegrpo peer run` with a home of its own."""
        home = self.folder / name
        command = ["peer", "run", address, "--home", str(home), "--host", "127.0.0.1", "--threads", "1", "--json"]
        return await self.hivegrpo(*command, *flags)

    async def hivegrpo(self, *arguments: str) -> Process:
        """Any command of ours."""
        return await self.python("-m", "hivegrpo.cli.main", *arguments)

    async def python(self, *arguments: str) -> Process:
        """Any Python program."""
        self.folder.mkdir(parents=True, exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
            cwd=self.folder,
            limit=1 << 22,
        )
        started = Process(process)
        started.reader = asyncio.create_task(started.read())
        self.started.append(started)
        return started


@asynccontextmanager
async def machine(folder: Path) -> AsyncIterator[Machine]:
    """A `Machine` that leaves no process behind: children of ours that outlive it by five seconds are an error."""
    host = Machine(folder)
    children: list[psutil.Process] = []
    try:
        yield host
        for process in host.started:
            children += _descendants(process.pid)
    finally:
        for process in host.started:
            if process.process.returncode is None:
                children += _descendants(process.pid)
                process.process.kill()
                await process.process.wait()
            if process.reader is not None:
                await process.reader
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, 5.0)
    for child in alive:
        child.kill()
    assert not alive, f"left behind: {[child.pid for child in alive]}"


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def addition_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """A run.toml for the packaged addition task with small rounds; sections override theirs key by key."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "versions": 3, "start_peers": 2, "seed": 1},
        "model": {"path": str(ADDITION / "starter")},
        "dataset": {"path": str(ADDITION / "train.jsonl")},
        "rewards": {"functions": ["exact_match"]},
        "grpo": {"prompts_per_round": 6, "num_generations": 4, "max_completion_length": 5},
        "lora": {"r": 4, "alpha": 8},
        "timing": {"lease": 30.0, "exchange": 5.0, "step": 10.0, "grace": 2.0},
        "distribution": {"anchor_every": 2, "keep_versions": KEPT_VERSIONS},
        "admission": {"mode": "open"},
        "optimizer": {"learning_rate": 1e-3, "lr_scheduler_type": "constant"},
    }
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    lines = []
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text("\n".join(lines))
    return path
