"""Small programs that stand in for daemons, and whether they are gone."""

import asyncio
import sys
from contextlib import suppress

import psutil

from hivegrpo.cli.output import Record


def python(code: str) -> list[str]:
    """A program that blocks SIGINT, says who it is, and goes on with `code`."""
    before = "import json, os, signal, subprocess, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
    return [sys.executable, "-c", f"{before}print(json.dumps({{'pid': os.getpid()}}), flush=True)\n{code}"]


WAIT = "signal.sigwait([signal.SIGINT])\n"
STUBBORN = (
    "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    "print(json.dumps({'pid': child.pid}), flush=True)\n"
    "while True:\n    signal.sigwait([signal.SIGINT])\n"
)


class Told:
    """Lines of children, as they come."""

    def __init__(self) -> None:
        self.records: asyncio.Queue[Record] = asyncio.Queue()

    async def pids(self, count: int) -> list[int]:
        async with asyncio.timeout(60):
            return [(await self.records.get())["pid"] for _ in range(count)]


def gone(pids: list[int], seconds: float = 0.0) -> bool:
    """Whether none of them runs any more, after at most that time."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, seconds)
    return not any(map(runs, alive))


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
