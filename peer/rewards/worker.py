"""The process in which isolated reward functions run: `python -m hivegrpo.peer.rewards.worker SOCKET PARENT`.

It can be killed at any time. By itself it ends when its parent does, when a function runs over its time even in C code,
and when it is told nothing more. It writes no file, and has a bounded amount of memory above what the functions have
taken when they were loaded. Its parent looks at all that it answers: after a hostile completion it may be anything.
"""

import asyncio
import ctypes
import inspect
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable
from typing import Any

from hivegrpo.peer.rewards.base import RewardFunction
from hivegrpo.peer.rewards.frames import Channel, encode
from hivegrpo.peer.rewards.registry import load_function

_MAX_WORDS = 300
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Say that the functions are loaded, then answer calls until the parent hangs up."""
    descriptor, parent = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=descriptor))
    _end_with(parent)
    hello = _next(channel)
    if hello is None:
        return
    functions: list[RewardFunction] = []
    for name in hello["functions"]:
        _be_killed_after(hello["seconds"])
        try:
            functions.append(load_function(name))
        except BaseException as error:  # noqa: BLE001 - the parent is the one who can tell somebody
            channel.send(encode({"error": f"{name}: {_words(error)}"}))
            return
    _be_killed_after(0.0)
    memory = Memory(hello["memory"])
    channel.send(encode({"ready": True}))
    last = False
    while not last and (call := _next(channel)) is not None:
        frame, last = _answer(functions[call["function"]], call, memory)
        channel.send(frame)


def _next(channel: Channel) -> dict[str, Any] | None:
    while (message := channel.next()) is None:
        if not channel.receive():
            return None
    return message


def _answer(function: RewardFunction, call: dict[str, Any], memory: "Memory") -> tuple[bytes, bool]:
    """The frame with the scores, or with what went wrong, and whether it is the last one of this process.

    The process ends if that takes too long.
    """
    _be_killed_after(call["seconds"])
    try:
        scores = function(**call["arguments"])
        if inspect.isawaitable(scores):
            scores = asyncio.run(_awaited(scores))
        return _frame(call, memory, scores=_plain(list(scores)))
    except BaseException as error:  # noqa: BLE001 - SystemExit as well: the batch goes on
        return _frame(call, memory, error=_words(error))
    finally:
        _be_killed_after(0.0)


def _frame(call: dict[str, Any], memory: "Memory", **result: Any) -> tuple[bytes, bool]:
    last = memory.is_half_used()
    return encode({"key": call["key"], "last": last, **result}), last


async def _awaited(scores: Awaitable[Any]) -> Any:
    return await scores


def _plain(value: Any) -> Any:
    """Lists and numbers in place of tensors and arrays."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (int, float)) or not hasattr(value, "tolist") else value.tolist()


def _words(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its own words may fail too
        text = type(error).__name__
    return text[:_MAX_WORDS]


def _be_killed_after(seconds: float) -> None:
    """By the kernel, so that not even C code can outlast it; 0 calls it off."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a function may have used it for a limit of its own
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_with(parent: int) -> None:
    """Be killed when the parent ends, or its thread that started this (Linux); elsewhere the socket's end does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit()


class Memory:
    """The limits of this process, and how much of its memory is taken."""

    def __init__(self, size: int) -> None:
        """Allow so many bytes of memory above what is taken now, where the system can tell and enforce it (Linux)."""
        self._half = math.inf
        for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(limit, (0, 0))
        if sys.platform == "linux":
            self._pages = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
            taken = self._taken()
            _, most = resource.getrlimit(resource.RLIMIT_AS)
            limit = taken + size if most == resource.RLIM_INFINITY else min(taken + size, most)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            self._half = taken + size // 2

    def is_half_used(self) -> bool:
        """Whether what was left behind by earlier calls leaves too little for the next one."""
        return self._half < math.inf and self._taken() > self._half

    def _taken(self) -> int:
        return int(os.pread(self._pages, 32, 0).split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
