"""Worker processes of a benchmark: started, spoken to by lines of JSON, and ended whatever happens.

Each worker leads a session of its own, so that Ctrl-C reaches the driver alone, and what a worker forks can be ended
with it. A worker that reads the end of its stdin stops by itself: nothing outlives a driver that was killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

WORKERS = Path(__file__).parent / "workers"
END_SECONDS = 10.0
"""How long workers get to stop by themselves."""

LAST_BYTES = 4000


class WorkerError(Exception):
    """A worker ended, said something else, or did not answer in time."""


class Worker:
    """One process that runs a script of `workers/`. Its stderr goes to a file in `folder`."""

    def __init__(
        self, script: str, name: str, arguments: Sequence[str], folder: Path, within: Sequence[str] = ()
    ) -> None:
        """`within`: a command that runs the one after it, somewhere else."""
        self.name = name
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*within, sys.executable, str(WORKERS / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, kind: str, **fields: Any) -> None:
        """Send one line; WorkerError if the process has ended."""
        try:
            _pipe(self._process.stdin).write(json.dumps({"kind": kind, **fields}) + "\n")
            _pipe(self._process.stdin).flush()
        except OSError:
            raise self._error("has ended") from None

    def hear(self, kind: str, timeout: float) -> dict[str, Any]:
        """The next line, which must be of that kind; WorkerError otherwise."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise self._error(f"did not say {kind!r} within {timeout:.0f} s") from None
        if not line:
            raise self._error(f"ended before it said {kind!r}")
        message: dict[str, Any] = json.loads(line)
        if message.pop("kind") != kind:
            raise self._error(f"said {line.strip()!r} where {kind!r} was due")
        return message

    def dismiss(self) -> None:
        """Ask it to stop."""
        with suppress(OSError):
            _pipe(self._process.stdin).close()

    def kill(self) -> None:
        """End it and what it forked in the middle of whatever they do."""
        os.killpg(self._process.pid, signal.SIGKILL)

    def end(self, timeout: float) -> None:
        """Wait until it and what it forked have closed their stdout; kill what is left of its session."""
        self._reader.join(timeout)
        # The leader has not been waited for, so its number still names its own process group and no other.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        for line in _pipe(self._process.stdout):
            self._lines.put(line)
        self._lines.put("")

    def _error(self, what: str) -> WorkerError:
        last = self._log.read_bytes()[-LAST_BYTES:].decode(errors="replace")
        return WorkerError(f"{self.name} {what}\n{last}".rstrip())


class Crew:
    """The workers of one measurement; all have ended when the `with` block has."""

    def __init__(self, folder: Path) -> None:
        self.workers: list[Worker] = []
        self._folder = folder

    def start(self, script: str, name: str, *arguments: object, within: Sequence[str] = ()) -> Worker:
        """Start a worker."""
        worker = Worker(script, name, [str(argument) for argument in arguments], self._folder, within)
        self.workers.append(worker)
        return worker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.dismiss()
        deadline = time.monotonic() + END_SECONDS
        for worker in self.workers:
            worker.end(max(0.0, deadline - time.monotonic()))


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
