"""Reward functions that a package might offer: well behaved, careless and hostile ones."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GROUP = "hivegrpo.rewards"
KEPT: list[bytearray] = []


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **functions: str) -> None:
    """Make a distribution of that folder importable here and in child processes: name = module:function."""
    info = folder / "scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scorers\nVersion: 1.0\n")
    points = "\n".join(f"{name} = {target}" for name, target in functions.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
    monkeypatch.syspath_prepend(folder)


def obey(*, completions: list[str], **columns: Any) -> list[Any]:
    """Do what each completion says, and give 1.0 if that leaves anything to give."""
    return [_obey(completion, columns) for completion in completions]


def _obey(word: str, columns: dict[str, Any]) -> Any:
    match word:
        case "wait":
            signal.pause()
        case "compute":
            return 9**9**9  # in C, with the interpreter locked
        case "hog":
            return len(bytearray(1 << 40))
        case "take":
            return float(len(bytearray(columns["size"][0])) > 0)
        case "grow":
            held = []
            while True:
                held.append(bytearray(1 << 20))
        case "keep":
            KEPT.append(bytearray(columns["size"][0]))
        case "end":
            os._exit(0)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            sys.exit()
        case "interrupt":
            raise KeyboardInterrupt
        case "raise":
            raise ValueError("no \x1b[31m\nsuch thing")
        case "unspeakable":
            raise Unspeakable
        case "recurse":
            return _obey(word, columns)
        case "print":
            os.write(1, b"x" * 100_000)
            print("x" * 100_000, file=sys.stderr)
        case "forge":
            forge(b"\xff" * 64)
        case "lie":
            forge(b'\0\0\0\x0f{"scores":[7]}\n')
        case "write":
            Path("left").write_text("something")
        case "pid":
            return os.getpid()
        case "spawn":
            return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
        case "leave behind":
            Path(columns["told"][0], str(subprocess.Popen(["sleep", "1000"]).pid)).mkdir()  # it may write no file
            signal.pause()
        case "secret":
            return "HIVEGRPO_SECRET" in os.environ
        case "tell":
            with Path(columns["pipe"][0]).open("wb") as pipe:
                pipe.write(b"!")
            signal.pause()
    return ODD.get(word, 1.0)


ODD: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**400,
    "text": "1.0",
    "object": object(),
    "many": [1.0, 2.0],
    "deep": [[[[1]]]],
    "beyond": [(0, 1.0), (2, 1.0)],
    "before": [(-1, 1.0)],
    "backwards": [(1, 1.0), (0, 1.0)],
    "twice": [(1, 1.0), (1, 1.0)],
    "half": [(0.5, 1.0)],
    "empty step": [(0, None)],
    "steps": [(0, 0.25), (1, -1.0)],
    "no steps": [],
    "none": None,
    "true": True,
    "whole": 3,
}
"""What is given for a completion of two tokens; from "steps" on it means something."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def forge(data: bytes) -> None:
    """Write to every socket and pipe that there is."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, data)
        except OSError:
            continue


def count(*, completions: list[str], **_: Any) -> list[float]:
    """How many completions came in one call; none of them may be "raise"."""
    if "raise" in completions:
        raise ValueError(completions)
    return [float(len(completions)) for _ in completions]


def short(*, completions: list[str], **_: Any) -> list[float]:
    """One score too few."""
    return [1.0 for _ in completions[1:]]


async def together(*, completions: list[str], **_: Any) -> list[float]:
    """Done only if all of the batch run at the same time."""
    gate = asyncio.Event()
    missing = len(completions)

    async def one() -> float:
        nonlocal missing
        missing -= 1
        if missing == 0:
            gate.set()
        await gate.wait()
        return 0.5

    return await asyncio.gather(*(one() for _ in completions))


def scaled(*, completions: list[str], scale: float, extra: int = 0, weight: list[float], **_: Any) -> list[float]:
    """With two options, one of them required, and a column."""
    return [scale * number + extra for _, number in zip(completions, weight, strict=True)]


scaled.version = 7  # type: ignore[attr-defined]  # as a package sets it
