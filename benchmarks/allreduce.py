"""Averaging, hivegrpo's against hivemind's: whole rounds, the data phase of each, bytes, agreement. See README.md.

Exits with 0 if every bar is met, with 1 if not.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bars import verdicts
from hivemind_group import HivemindGroup
from processes import Crew, WorkerError
from series import Figures, Size, table
from swarm import SwarmRounds

WARM_UP = 2
"""Rounds before those that count: connections are made, memory is touched."""

SETTLE_SECONDS = 0.5
"""Before each round: what the one before it leaves to do (votes, the commit, files) is not to slow the other side's."""

PHASE_SECONDS = 25.0
"""No further round of a series begins after so long."""

STEPS = {
    "step": ("float16", 0, 2.0),
    "step_uniform8": ("uniform8", 0, 2.0),
    "step_quantile8": ("quantile8", 0, 2.0),
    "step_0.3": ("float16", 0, 0.3),
    "step_closed": ("float16", -1, 2.0),
}
"""Of hivemind's averager: compression, target_group_size (0: none, -1: all), min_matchmaking_time in seconds."""


def measure_data_phase(figures: Figures, rounds: int, folder: Path) -> None:
    """Rounds of hivegrpo and of hivemind's runner, in turns."""
    runner = "runner_exchange.py"
    with Crew(folder) as crew:
        swarm = SwarmRounds(crew, figures.size, WARM_UP + rounds + 1, folder)
        group = HivemindGroup(crew, figures.size, runner, folder)
        for warm_up in (True,) * WARM_UP + (False,) * rounds:
            counted = Figures(figures.size) if warm_up else figures
            time.sleep(SETTLE_SECONDS)
            swarm.together(counted)
            time.sleep(SETTLE_SECONDS)
            group.together(counted, "runner")


def measure_steps(figures: Figures, name: str, rounds: int, folder: Path) -> None:
    """Steps of hivemind's averager. One can hang: then it has failed, and new processes take the old ones' place."""
    compression, group_size, seconds = STEPS[name]
    options = (figures.size.peers if group_size < 0 else group_size, compression, seconds)
    end = time.monotonic() + PHASE_SECONDS
    while len(figures.seconds[name]) < rounds and time.monotonic() < end:
        with Crew(folder) as crew:
            try:
                group = HivemindGroup(crew, figures.size, "averager_step.py", folder, options)
                group.together(Figures(figures.size), name)
                while len(figures.seconds[name]) < rounds and time.monotonic() < end:
                    group.together(figures, name)
            except WorkerError as error:
                figures.fail(name)
                print(f"a round failed: {error}", file=sys.stderr)


def usable_steps(quick: bool) -> list[str]:
    """Which series of hivemind's averager there can be: its 8-bit codecs raise on NumPy 2.4 and newer."""
    if quick:
        return []
    names = list(STEPS)
    for name in ("step_uniform8", "step_quantile8"):
        probe = [sys.executable, str(Path(__file__).parent / "workers" / "averager_step.py"), "probe", STEPS[name][0]]
        if subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode:
            print(f"left out: hivemind's {STEPS[name][0]} raises with NumPy {version('numpy')}")
            names.remove(name)
    return names


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "hivemind": version("hivemind"),
    }


def measure(size: Size, rounds: int, steps: list[str]) -> Figures:
    """All series of one size, each with processes of its own."""
    figures = Figures(size)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        measure_data_phase(figures, rounds, Path(name))
        for step in steps:
            measure_steps(figures, step, rounds, Path(name))
    return figures


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, nargs="+", default=[1_000_000, 20_000_000], help="lengths of the vector")
    parser.add_argument("--peers", type=int, nargs="+", default=[3, 8], help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each series; a fifth above 10M values")
    parser.add_argument("--quick", action="store_true", help="1M values x 3, 3 rounds, without hivemind's averager")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.values, arguments.peers, arguments.rounds = [1_000_000], [3], 3
    if min(arguments.values) < 2 or min(arguments.peers) < 2 or arguments.rounds < 1:
        parser.error("--values and --peers must be at least 2, --rounds at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    before = machine()
    print(f"loopback; {before['cpus']} CPUs, load {before['load_1min']}; seconds of each round's slowest peer")
    steps = usable_steps(arguments.quick)
    outcome = []
    try:
        for size in [Size(values, peers) for values in arguments.values for peers in arguments.peers]:
            rounds = arguments.rounds if size.values <= 10_000_000 else max(1, arguments.rounds // 5)
            outcome.append(measure(size, rounds, steps))
            print(f"\n{table(outcome[-1])}", flush=True)
    except WorkerError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    given = verdicts(outcome)
    print("\n" + "\n".join(map(str, given)))
    if arguments.json is not None:
        bars = [{"what": one.what, "found": one.found, "bar": one.bar, "met": one.met} for one in given]
        found = {"machine": before, "sizes": [figures.to_json() for figures in outcome], "bars": bars}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(one.met for one in given) else 1


if __name__ == "__main__":
    sys.exit(main())
