"""A coordinator that kills itself, as `kill -9` would, at one of its writes. An entry point for tests only.

python faulty_coordinator.py start|commit N ARGUMENTS: at the N-th moment after its start, or after its first commit;
ARGUMENTS are those of `hivegrpo`. The moments are those of `support.crashes`: before and after each append, snapshot,
entry of the chain, rename and frame.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from hivegrpo.coordinator.log import EventLog
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.transport.frames import FramedStream


class Countdown:
    """The moments that are left."""

    def __init__(self, count: int, *, armed: bool) -> None:
        self._left = count
        self.armed = armed

    def pass_moment(self, moment: str) -> None:
        self._left -= self.armed
        if self._left == 0:
            print(f"killed {moment}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def make_mortal(owner: type, name: str, what: str, countdown: Countdown) -> None:
    """Let there be a moment before and one after each call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def calling(*args: Any, **kwargs: Any) -> Any:
        countdown.pass_moment(f"before {what}")
        result = method(*args, **kwargs)
        countdown.pass_moment(f"after {what}")
        return result

    @functools.wraps(method)
    async def awaiting(*args: Any, **kwargs: Any) -> Any:
        countdown.pass_moment(f"before {what}")
        result = await method(*args, **kwargs)
        countdown.pass_moment(f"after {what}")
        return result

    setattr(owner, name, awaiting if iscoroutinefunction(method) else calling)


def main(since: str, count: int) -> None:
    countdown = Countdown(count, armed=since == "start")
    append = ChainFile.append

    def arming(self: ChainFile, *args: Any) -> Any:
        entry = append(self, *args)
        countdown.armed = True
        return entry

    ChainFile.append = arming  # type: ignore[method-assign]  # the fault
    make_mortal(EventLog, "append", "an append", countdown)
    make_mortal(EventLog, "compact", "a snapshot", countdown)
    make_mortal(ChainFile, "append", "an entry of the chain", countdown)
    make_mortal(Path, "rename", "a rename", countdown)
    make_mortal(FramedStream, "send", "a frame", countdown)
    from hivegrpo.cli.main import main as hivegrpo

    hivegrpo()


if __name__ == "__main__":
    since, count, *arguments = sys.argv[1:]
    sys.argv = ["hivegrpo", *arguments]
    main(since, int(count))
