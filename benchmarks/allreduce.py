"""A whole round of averaging, hivegrpo's against hivemind's, and the data phase of each. See README.md beside this.

Exits with 0 if hivegrpo's round takes at most a fifth of stock DecentralizedAverager.step, with 1 if not.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from processes import Crew, Worker, WorkerError
from series import Series, table

BAR = 0.2
WARM_UP = 2
"""Rounds before those that count: connections are made, memory is touched."""

START_SECONDS = 60.0
"""For a worker to import what it needs, on a busy machine."""

ROUND_SECONDS = 15.0
"""For one round; a step of hivemind's gives up the search for a group after ten."""

PHASE_SECONDS = 120.0
"""No further round begins after so long."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    values: int
    peers: int
    rounds: int


def measure_hivemind(folder: Path, size: Size, script: str, title: str, *options: int) -> Series:
    """Rounds of a hivemind worker, all peers at the same moment, until as many as are wanted have succeeded.

    A step of hivemind's can hang. Then the round has failed, and new processes take the place of the old ones.
    """
    series = Series(title)
    end = time.monotonic() + PHASE_SECONDS
    while len(series.rounds) < size.rounds and time.monotonic() < end:
        with Crew(folder) as crew:
            group = _gather(crew, size, script, options)
            try:
                for _ in range(WARM_UP):
                    _together(crew.workers, group)
                while len(series.rounds) < size.rounds and time.monotonic() < end:
                    _count(series, _together(crew.workers, group))
            except WorkerError as error:
                series.failed += 1
                print(f"a round failed: {error}", file=sys.stderr)
    return series


def _gather(crew: Crew, size: Size, script: str, options: Sequence[int]) -> list[str]:
    """Start the workers and let them find each other; their peer ids."""
    for rank in range(size.peers):
        crew.start(script, f"hivemind-{rank}", rank, size.peers, size.values, *options)
    for worker in crew.workers:
        worker.hear("loaded", START_SECONDS)
    group: list[str] = []
    initial_peers: list[str] = []
    for worker in crew.workers:
        worker.tell("join", initial_peers=initial_peers)
        joined = worker.hear("joined", START_SECONDS)
        group.append(joined["peer"])
        initial_peers = initial_peers or joined["addresses"]
    return group


def _together(workers: list[Worker], group: list[str]) -> list[dict[str, Any]]:
    """One round: nobody begins before all are prepared."""
    for worker in workers:
        worker.tell("arm", group=group)
    for worker in workers:
        worker.hear("armed", ROUND_SECONDS)
    for worker in workers:
        worker.tell("go")
    return [worker.hear("stepped", ROUND_SECONDS) for worker in workers]


def _count(series: Series, answers: list[dict[str, Any]]) -> None:
    if all(answer["averaged"] for answer in answers):
        series.rounds.append([answer["seconds"] for answer in answers])
    else:
        series.failed += 1


def measure_hivegrpo(crew: Crew, size: Size, folder: Path) -> dict[str, Series]:
    """A run of the warm-up's versions and those that count: whole rounds, and what is before and inside of each."""
    versions = WARM_UP + size.rounds
    arguments = (size.peers, size.values)
    coordinator = crew.start("swarm_coordinator.py", "coordinator", folder / "coordinator", *arguments, versions)
    workers = [
        crew.start("swarm_peer.py", f"peer-{rank}", folder / f"peer-{rank}", rank, *arguments)
        for rank in range(size.peers)
    ]
    for worker in workers:
        worker.hear("loaded", START_SECONDS)
    address = coordinator.hear("serving", START_SECONDS)["address"]
    for worker in workers:
        worker.tell("join", address=address)
    answers = [worker.hear("finished", START_SECONDS + PHASE_SECONDS) for worker in workers]
    by_version: dict[int, list[dict[str, Any]]] = {number: [] for number in range(WARM_UP + 1, versions + 1)}
    for answer in answers:
        for figures in answer["rounds"]:
            by_version.get(figures["version"], []).append(figures)
    series = {
        "round": Series("hivegrpo  contribution reported to span decoded"),
        "exchange": Series("hivegrpo  plan known to all spans here, with the seal"),
        "encoding": Series("hivegrpo  encode the contribution, write it to disk"),
    }
    for rows in by_version.values():
        averaged = len(rows) == size.peers and all(row["averaged"] for row in rows)
        for name, measured in series.items():
            if averaged:
                measured.rounds.append([row[name] for row in rows])
            else:
                measured.failed += 1
    return series


def measure(size: Size) -> dict[str, Series]:
    """All series, one after the other, each with processes of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        with Crew(folder) as crew:
            series = measure_hivegrpo(crew, size, folder)
        series["step"] = measure_hivemind(folder, size, "averager_step.py", "hivemind  DecentralizedAverager.step", 0)
        title = f"hivemind  the same, target_group_size={size.peers}"
        series["closed_step"] = measure_hivemind(folder, size, "averager_step.py", title, size.peers)
        title = "hivemind  AllReduceRunner in a ready group"
        series["runner"] = measure_hivemind(folder, size, "runner_exchange.py", title)
    for measured in series.values():
        if not measured.rounds:
            raise WorkerError(f"no round of {measured.title!r} succeeded")
    return series


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "hivemind": version("hivemind"),
    }


def show(series: Mapping[str, Series]) -> bool:
    """Print the table and the verdict; whether the bar is met."""
    sections = (
        ("a whole round", [series["round"], series["step"], series["closed_step"]]),
        ("the data phase alone", [series["exchange"], series["runner"]]),
        ("before the round", [series["encoding"]]),
    )
    print(table(sections))
    ratio = series["round"].median / series["step"].median
    closed = series["round"].median / series["closed_step"].median
    met = ratio <= BAR
    print(f"\nto a hivemind group whose size is known beforehand: {closed:.3f}")
    print(f"ratio of the medians of a whole round: {ratio:.3f}")
    print(f"the bar is {BAR}: {'met' if met else 'NOT met'}")
    return met


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1_000_000, help="length of the averaged vector")
    parser.add_argument("--peers", type=int, default=3, help="processes that average")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each series")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    arguments = parser.parse_args()
    size = Size(arguments.values, arguments.peers, arguments.rounds)
    if size.values < 2 or size.peers < 2 or size.rounds < 1:
        parser.error("--values and --peers must be at least 2, --rounds at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    before = machine()
    print(f"{size.values:,} values, {size.peers} processes on loopback; {before['cpus']} CPUs,", end=" ")
    print(f"load {before['load_1min']}; seconds of each round's slowest peer", flush=True)
    try:
        series = measure(size)
    except WorkerError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    met = show(series)
    if arguments.json is not None:
        figures = {name: measured.to_json() for name, measured in series.items()}
        outcome = {"size": asdict(size), "machine": before, "series": figures, "bar": BAR, "met": met}
        arguments.json.write_text(json.dumps(outcome, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
