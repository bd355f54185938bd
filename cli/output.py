"""What a daemon tells: JSON lines on stdout for programs, short lines on stderr for people."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from hivegrpo.peer.evaluation.intervals import Estimate, wilson
from hivegrpo.protocol.text import visible

MAX_PROBLEMS = 1e9
"""That a peer may claim to have measured on, before nothing is made of it."""

Record = dict[str, Any]
Show = Callable[[Record], None]
Describe = Callable[[Record], tuple[str, str]]
"""What a record is about, and a line about it; a line is shown when what it is about has changed."""


def configure_logging(verbose: bool) -> None:
    """Logs of this process go to stderr."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # whatever it is by then
    )


def json_lines(stop: asyncio.Event) -> Show:
    """Writes each record as a line; sets `stop` once nobody reads them."""

    def show(record: Record) -> None:
        try:
            print(json.dumps(record, separators=(",", ":")), flush=True)
        except BrokenPipeError:
            # The interpreter flushes stdout when it exits, and would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            stop.set()

    return show


def short_lines(describe: Describe) -> Show:
    """Writes a line to stderr whenever there is something new to say; parts may come from strangers."""
    last = ""

    def show(record: Record) -> None:
        nonlocal last
        subject, line = describe(record)
        if line and subject != last:
            last = subject
            print(visible(line), file=sys.stderr, flush=True)

    return show


def describe_version(record: Record) -> str:
    """One line about a committed version."""
    metrics = record["metrics"]
    parts = [f"version {record['version']:>4} of {record['versions']}"]
    if "reward" in metrics:
        parts.append(f"reward {metrics['reward']:.3f}")
    if "eval/accuracy" in metrics:
        parts.append(f"{describe_accuracy(metrics)} (version {record['version'] - 1})")
    if "num_tokens" in metrics:
        parts.append(f"{metrics['num_tokens']:.0f} tokens")
    return "  ".join([*parts, f"root {record['state_root'][:16]}"])


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """The held-out accuracy that a version's metrics have, with its interval if they say of how many problems."""
    interval = accuracy_interval(metrics)
    share = f"accuracy {metrics['eval/accuracy']:.3f}"
    return share if interval is None else f"{share} [{interval.low:.3f}, {interval.high:.3f}]"


def accuracy_interval(metrics: Mapping[str, float]) -> Estimate | None:
    """Wilson's interval of it. None if the number of problems is missing, or the two do not go together: a peer
    reported them."""
    problems = metrics.get("eval/problems", 0.0)
    solved = metrics["eval/accuracy"] * problems
    if not 1.0 <= problems <= MAX_PROBLEMS or not 0.0 <= solved <= problems:
        return None
    return wilson(round(solved), round(problems))
