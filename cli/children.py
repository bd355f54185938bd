"""Child processes that tell JSON lines, and none of which is left behind."""

import asyncio
import json
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from hivegrpo.cli.output import Record
from hivegrpo.protocol.errors import HiveError

MAX_LINE_BYTES = 1 << 20
GRACEFUL_SECONDS = 20.0
"""How long a child may take to leave."""
SHORT = 3.0
"""How long it may take to stop at once, seconds."""
LAST_LINES = 12

Take = Callable[[Record], None]


class Child:
    """One daemon, in a session of its own: Ctrl-C at the terminal reaches only its parent."""

    def __init__(self, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(cls, name: str, command: Sequence[str], log: Path) -> Self:
        """Run a command; what it writes to stderr goes to `log`."""
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=MAX_LINE_BYTES,
                start_new_session=True,
            )
        return cls(name, log, process)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def listen(self, take: Take) -> None:
        """Give what it tells to `take`, until it has ended; HiveError if that was not by its own decision."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.endswith(b"\n"):  # one that a kill cut short says nothing
                take(json.loads(line))
        code = await self._process.wait()
        if code != 0:
            raise HiveError(f"{self.name} {_ending(code)}. {self.last_words()}", f"Its whole log is {self.log}.")

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(["It said last:", *lines[-LAST_LINES:], ""]) if lines else "It said nothing."

    def signal(self, number: int) -> None:
        """Send a signal to the process itself."""
        if self.running:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def descendants(self) -> list[psutil.Process]:
        """What it started, and what those did."""
        try:
            return list(psutil.Process(self._process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    async def ended(self, seconds: float) -> None:
        """Wait until it has ended, at most so long. Somebody has to listen meanwhile, or it may block on its output."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._process.wait()


class Children:
    """All of them; leaving the context ends those that still run: the first one last, for the others report to it."""

    def __init__(self, logs: Path) -> None:
        """`logs` is a folder for what they write to stderr."""
        self._logs = logs
        self._children: list[Child] = []
        self._listening: list[asyncio.Task[None]] = []

    async def start(self, name: str, command: Sequence[str], take: Take) -> asyncio.Task[None]:
        """Start one, whose lines go to `take`; the task ends with it, and raises HiveError if it failed."""
        child = await Child.start(name, command, self._logs / f"{name}.log")
        self._children.append(child)
        self._listening.append(asyncio.create_task(child.listen(take), name=name))
        return self._listening[-1]

    def move_logs(self, folder: Path) -> None:
        """Rename the folder of the logs; who writes to them goes on."""
        self._logs = self._logs.rename(folder)
        folder.chmod(0o755)
        for child in self._children:
            child.log = folder / child.log.name

    def ask(self) -> None:
        """Ask all to leave, and do not wait."""
        for child in self._children:
            child.signal(signal.SIGINT)

    def kill(self) -> None:
        """End all at once, and do not wait."""
        for child in self._children:
            descendants = child.descendants()
            child.signal(signal.SIGKILL)
            _kill(descendants)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _stop(self._children[1:])
        await _stop(self._children[:1])
        await asyncio.gather(*self._listening, return_exceptions=True)


async def _stop(children: Sequence[Child]) -> None:
    """Ask them to leave, then to stop at once, then kill them; and see that what they started is gone too."""
    descendants = [process for child in children for process in child.descendants()]
    for number, seconds in ((signal.SIGINT, GRACEFUL_SECONDS), (signal.SIGINT, SHORT), (signal.SIGKILL, SHORT)):
        running = [child for child in children if child.running]
        for child in running:
            child.signal(number)
        await asyncio.gather(*(child.ended(seconds) for child in running))
    _, alive = await asyncio.to_thread(psutil.wait_procs, descendants, SHORT)
    _kill(alive)
    await asyncio.to_thread(psutil.wait_procs, alive, SHORT)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
