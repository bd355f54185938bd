"""A worker process as its parent sees it: started, called, listened to, and killed."""

import math
import os
import secrets
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hivegrpo.peer.rewards.frames import Channel, encode

START_SECONDS = 60.0
"""A worker may take that long to start, and then for each function that it loads, with all that it imports."""
MARGIN_SECONDS = 0.5
"""What its parent waits longer than the worker gives itself."""
REAP_SECONDS = 5.0
"""For a killed process to be gone; one that hangs in the kernel is left to it."""

WORKER = "hivegrpo.peer.rewards.worker"

_HELLO_BYTES = 4096
_BUFFER_BYTES = 1 << 17

_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class WorkerLost(Exception):
    """The process is of no more use; the message says why."""


@dataclass(frozen=True)
class Call:
    """A function, by its place among those of the run, to be called with some completions of a batch."""

    place: int
    indices: Sequence[int]
    seconds: float
    """It may take."""
    answer_bytes: int
    """The longest answer that makes sense."""
    key: int = field(default_factory=lambda: secrets.randbits(48))
    """Stands in the answer too: what was written by something else than the worker's own loop has another."""


class WorkerProcess:
    """One process: it loads its functions, says so, and then answers one call after another."""

    def __init__(self, functions: Sequence[str], memory: int) -> None:
        """Start it, to load the functions of these names; memory in bytes, above what it takes then."""
        self.loaded = False
        """Whether it has said that it has loaded its functions."""
        self.calls: deque[Call] = deque()
        """Those that it has yet to answer, in their order."""
        self._fault = ""
        self._folder = Path(tempfile.mkdtemp(prefix="hivegrpo-rewards-"))
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)  # some systems have 8 KiB
        self._channel = Channel(ours)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", WORKER, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=self._folder,
                    env=_environment(self._folder),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                self._folder.rmdir()
                raise
        self._allow(START_SECONDS * (1 + len(functions)))
        with suppress(OSError):  # then it has ended, and `receive` says so
            self._channel.send(encode({"functions": list(functions), "memory": memory, "seconds": START_SECONDS}))

    def fileno(self) -> int:
        """For a selector: readable when there is something to receive."""
        return self._channel.socket.fileno()

    def make(self, calls: Sequence[Call], frames: bytes) -> None:
        """Send calls, when it has none to answer; WorkerLost if it does not take them."""
        assert self.loaded
        assert not self.calls
        self.calls.extend(calls)
        self._allow(calls[0].seconds)
        self._channel.socket.settimeout(calls[0].seconds)
        try:
            self._channel.send(frames)
        except OSError as error:
            raise WorkerLost("its process takes no calls") from error

    def receive(self) -> list[tuple[Call, dict[str, Any]]]:
        """The answers that have come, for a process that a selector calls readable."""
        answers: list[tuple[Call, dict[str, Any]]] = []
        if not self._channel.receive():
            self._fault = self._slow() if self._was_timed_out() else "its process died"
        try:
            while not self._fault and (message := self._channel.next(self._limit())) is not None:
                if self.loaded:
                    if message.get("key") != self.calls[0].key:
                        raise ValueError("an answer that nobody has asked for")
                    answers.append((self.calls.popleft(), message))
                elif "error" in message:
                    self._fault = str(message["error"])
                else:
                    self.loaded = True
                self._allow(self.calls[0].seconds if self.calls else math.inf)
        except ValueError as error:
            self._fault = f"its process sent {error}"
        return answers

    def require_use(self) -> None:
        """WorkerLost if it has ended, could not load its functions, said what it should not, or its time is over."""
        if not self._fault and time.monotonic() >= self._deadline:
            self._fault = self._slow()
        if self._fault:
            raise WorkerLost(self._fault)

    def kill(self) -> None:
        """End it and all that it started, without waiting."""
        if self._process.returncode is not None:
            return  # it was waited for: its number may be somebody else's
        with suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it, and leave nothing of it behind."""
        self.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_SECONDS)
        self._channel.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _was_timed_out(self) -> bool:
        """Whether its own timer has ended it, for a process that has hung up."""
        self.kill()  # with all that it started, while its number is its own; of what ended it before, nothing changes
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(MARGIN_SECONDS) == -signal.SIGALRM
        return time.monotonic() >= self._deadline

    def _limit(self) -> int:
        """Bytes of its next message: none if it has nothing to say."""
        if not self.loaded:
            return _HELLO_BYTES
        return self.calls[0].answer_bytes if self.calls else 0

    def _allow(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds + MARGIN_SECONDS

    def _slow(self) -> str:
        return f"it took more than {self._seconds:g} s"


def _environment(folder: Path) -> dict[str, str]:
    """As little as it takes to import what the parent can import."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    own = {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": path, "PYTHONUSERBASE": site.getuserbase()}
    return kept | own | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
