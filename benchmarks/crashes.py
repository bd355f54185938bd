"""Real processes on loopback, whose coordinator is killed (-9) at random writes. See README.md beside this.

Exits with 0 if the chain and every contribution survived each kill, and if the next version was committed within ten
seconds of the next start, with 1 if not.
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

from support.kills import Kill, kill_often

COMMIT_BAR = 10.0
"""Seconds from the launch of a process to its first commit."""


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
