"""A command in a terminal: typed at, read from, and ended by its keys."""

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import psutil

IN_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
)
"""Makes the terminal the one whose keys signal this process, and becomes the command. As in any terminal SIGINT is not
ignored, though it is where tests are started in a shell's background."""
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What moves a cursor or sets a colour."""
CTRL_C, CTRL_D = "\x03", "\x04"
ROWS, COLUMNS = 50, 160
SETTLED_SECONDS = 0.5


class Terminal:
    """Runs `python -m hivegrpo.cli.main ...` with stdin, stdout and stderr on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        python = [sys.executable, "-m", "hivegrpo.cli.main", *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *python],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | environment,
        )
        os.close(slave)
        self._unread = ""
        self.raw = b""
        """All that it wrote."""

    def type(self, text: str) -> None:
        """As from the keyboard; read meanwhile, for what is typed is echoed."""
        data = text.encode()
        while data:
            self._read(0.0)
            _, writable, _ = select.select([], [self._master], [], 0.05)
            if writable:
                data = data[os.write(self._master, data[:512]) :]

    def settle(self, seconds: float = 90.0) -> None:
        """Wait until it has slept for half a second, and shown nothing: it waits for a key."""
        process, deadline = psutil.Process(self._process.pid), time.monotonic() + seconds
        since, used = time.monotonic(), None
        while time.monotonic() < since + SETTLED_SECONDS:
            assert time.monotonic() < deadline, f"still at work after {seconds} s"
            shown, before, used = self._read(0.02), used, process.cpu_times()[:2]
            if shown or used != before or process.status() != psutil.STATUS_SLEEPING:
                since = time.monotonic()

    def expect(self, text: str, seconds: float = 90.0) -> str:
        """What it shows up to and with `text`, from where the last call stopped; AssertionError if it does not come."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s: {self._unread[-2000:]!r}"
            assert self._read(0.1) or self._process.poll() is None, f"ended without {text!r}: {self._unread[-2000:]!r}"
        shown, found, self._unread = self._unread.partition(text)
        return shown + found

    def ended(self, seconds: float = 90.0) -> int:
        """Its exit code, once it has ended and all that it wrote is in `rest`."""
        deadline = time.monotonic() + seconds
        while self._read(0.1) or self._process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {seconds} s: {self._unread[-2000:]!r}"
        return self._process.wait()

    @property
    def rest(self) -> str:
        """What it has shown that no `expect` has taken."""
        return self._unread

    def close(self) -> None:
        """Kill it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Take what there is, after at most that time; whether there was something."""
        readable, _, _ = select.select([self._master], [], [], seconds)
        if not readable:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # Linux's way to say that nobody has the other end open any more
            return False
        self.raw += data
        self._unread += SEQUENCE.sub("", data.decode(errors="replace")).replace("\r\n", "\n")
        return bool(data)


@contextlib.contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """A `Terminal` whose process is gone at the end."""
    opened = Terminal(*arguments, **environment)
    try:
        yield opened
    finally:
        opened.close()
