"""A coordinator that is killed at every write of runs in memory, and (-9) at random ones of a run of real processes.

Exits with 0 if the chain and every contribution survived each kill, and if the next version was committed within ten
seconds of the next start, with 1 if not. See README.md beside this.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from support.crashes import MEMORY, play_all
from support.kills import Kill, kill_often

COMMIT_BAR = 10.0
"""Seconds from the launch of a process to its first commit."""

PEERS, VERSIONS, SNAPSHOT_EVERY = 3, 3, 9
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with overlap": {"averaging": {"audit_rate": 0.0, "overlap": True}},
    "with iterations": {"grpo": {"num_iterations": 2}},
}
"""Runs in memory, by what is in their run.toml."""


def simulate() -> None:
    """Print how many moments there were to die at; AssertionError if one is not survived."""
    for name, sections in RUNS.items():
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            moments = play_all(Path(folder), PEERS, VERSIONS, snapshot_every=SNAPSHOT_EVERY, **sections)
        print(f"in memory, {name}: survived all {moments.total()} moments: {dict(moments)}", flush=True)


def show(kills: list[Kill]) -> bool:
    """Print where it was killed, and the times; whether the bar is met."""
    for moment, count in sorted(Counter(kill.moment for kill in kills).items()):
        print(f"{count:4} times {moment}")
    seconds = [kill.seconds for kill in kills]
    longest = max(seconds)
    print(f"from the next start to a commit: median {median(seconds):.2f} s, longest {longest:.2f} s;", end=" ")
    print(f"the bar is {COMMIT_BAR:g} s: {'met' if longest <= COMMIT_BAR else 'NOT met'}")
    return longest <= COMMIT_BAR


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="how often the coordinator is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the writes at which it is")
    arguments = parser.parse_args()
    if arguments.points < 1:
        parser.error("--points must be at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"{arguments.points} kills, seed {arguments.seed}; load {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        try:
            simulate()
            kills = asyncio.run(
                kill_often(Path(name), arguments.seed, arguments.points, partial(print, file=sys.stderr, flush=True))
            )
        except AssertionError as error:
            print(f"it did not survive: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    return 0 if show(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
