"""Does a sweep show what beta and temperature do, and does it repeat nothing when it is killed half-way?

Six points of beta and temperature on the demo's task, by `hivegrpo sweep`, which is killed with SIGKILL once half of
the runs have ended and the next have made some versions, and is then started again with the same command. From its
report.json: the KL divergence from the base, mean over the points of a beta, has to fall with beta; the standard
deviation of the rewards within groups, mean over the points of a temperature, has to rise with temperature. And from
what is on disk, and from what both processes told: no version was made twice, and nothing of a run that had ended was
touched. Exits with 0 if all of that holds, with 1 if not.

    python benchmarks/sweep.py                          # some minutes on two cores
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

BETAS = (0.0, 0.2, 1.0)
TEMPERATURES = (0.7, 1.3)
RUN_SECONDS = 3600.0
"""Far more than a sweep takes; then it is killed."""
ORPHAN_SECONDS = 60.0
"""How long the runs of a sweep that was killed may go on."""

Record = dict[str, Any]
Run = tuple[str, int]
"""A run's folder, and one of its versions."""


@dataclass
class Halves:
    """A sweep that was killed, and its second start."""

    folder: Path
    first: list[Record] = field(default_factory=list)
    """What the first process told."""
    second: list[Record] = field(default_factory=list)
    made: dict[str, int] = field(default_factory=dict)
    """Versions on disk after the first, by the run's folder."""
    ended: dict[str, str] = field(default_factory=dict)
    """Of the runs that had ended after the first: each file's content and time of writing, as a digest."""

    def repeated(self) -> list[str]:
        """What was done twice, or undone; empty if nothing was."""
        complaints = []
        now = file_digests(self.folder, ended_runs(self.folder))
        complaints += [f"{name} was touched" for name, digest in self.ended.items() if now.get(name) != digest]
        told = Counter(versions_of(self.first) + versions_of(self.second))
        complaints += [f"version {version} of {run} was made twice" for (run, version), n in told.items() if n > 1]
        again = [(run, version) for run, version in versions_of(self.second) if version <= self.made.get(run, 0)]
        complaints += [f"version {version} of {run} was there and was made again" for run, version in again]
        for path in sorted(self.folder.glob("runs/*/metrics.jsonl")):
            numbers = [version for _, version in versions_of(read_lines(path), path.parent.name)]
            if numbers != list(range(1, len(numbers) + 1)):
                complaints.append(f"{path} has versions {numbers}")
        total = sum(len(read_versions(path)) for path in self.folder.glob("runs/*/metrics.jsonl"))
        rest = total - sum(self.made.values())
        if len(versions_of(self.second)) != rest:
            complaints.append(f"the second start made {len(versions_of(self.second))} versions, not the rest, {rest}")
        return complaints


def sweep_twice(arguments: Sequence[str], folder: Path, ended: int, versions: int) -> Halves:
    """Kill the sweep once `ended` runs have ended, when another makes version `versions`; start it again.

    RuntimeError if the second start does not end with 0.
    """
    halves = Halves(folder)
    command = [sys.executable, "-m", "hivegrpo.cli.main", "sweep", *arguments, "--to", str(folder), "--json"]

    def enough() -> bool:
        done = sum(record["kind"] == "finished" for record in halves.first)
        return done >= ended and halves.first[-1].get("version") == versions

    with started(command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            halves.first.append(json.loads(line))
            if enough():
                break
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        halves.first += [json.loads(line) for line in process.stdout if line.endswith("\n")]
    _, alive = psutil.wait_procs(children, ORPHAN_SECONDS)
    if alive:
        raise RuntimeError(f"the killed sweep left {alive} behind")
    halves.made = {path.parent.name: len(read_versions(path)) for path in folder.glob("runs/*/metrics.jsonl")}
    halves.ended = file_digests(folder, ended_runs(folder))
    with started(command) as process:
        assert process.stdout is not None
        halves.second = [json.loads(line) for line in process.stdout]
        if process.wait() != 0:
            raise RuntimeError(f"the second start ended with {process.returncode}")
    return halves


@contextmanager
def started(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process, which is killed if it takes too long, or still runs in the end."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(RUN_SECONDS, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def versions_of(records: Sequence[Record], run: str = "") -> list[Run]:
    """Which versions of which runs some records tell of."""
    return [(record.get("folder", run), record["version"]) for record in records if record["kind"] == "version"]


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_versions(path: Path) -> list[Run]:
    """Those that are in a run's metrics."""
    return versions_of(read_lines(path), path.parent.name)


def ended_runs(sweep: Path) -> list[Path]:
    """Folders of the runs that have an outcome."""
    return [path.parent for path in sorted(sweep.glob("runs/*/outcome.json"))]


def file_digests(sweep: Path, runs: Sequence[Path]) -> dict[str, str]:
    """By name: what is in each file of some runs, and when it was written."""
    files = [path for run in runs for path in sorted(run.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(sweep)): hashlib.sha256(path.read_bytes()).hexdigest() + f" {path.stat().st_mtime_ns}"
        for path in files
    }


def marginal(report: Record, key: str, figure: str) -> dict[float, float]:
    """By a key's value: a figure's mean over all points that have it."""
    return {row["value"]: row["mean"][figure] for row in report["marginals"][key]}


def rises(values: Sequence[float]) -> bool:
    """Whether each is above the one before."""
    return all(low < high for low, high in pairwise(values))


def check(report: Record) -> bool:
    """Print both bars; whether they are met."""
    kl = marginal(report, "grpo.beta", "kl")
    spread = marginal(report, "grpo.temperature", "reward_std")
    falls, grows = rises(list(kl.values())[::-1]), rises(list(spread.values()))
    print("KL(policy || base) a token, mean over the temperatures, by beta:")
    print(line(kl), "falls" if falls else "does NOT fall")
    print("standard deviation of the rewards within groups, mean over the betas, by temperature:")
    print(line(spread), "rises" if grows else "does NOT rise")
    return falls and grows


def line(values: dict[float, float]) -> str:
    """Figures by value."""
    return "  " + "   ".join(f"{key:g}: {value:.4f}" for key, value in values.items()) + "  "


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=list(BETAS))
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--versions", type=int, default=12, help="of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each point")
    parser.add_argument("--parallel", type=int, default=2, help="runs side by side")
    parser.add_argument("--to", type=Path, help="folder of the sweep, which must not be there; a temporary one if not")
    options = parser.parse_args()
    arguments = []
    for key, values in (("grpo.beta", options.betas), ("grpo.temperature", options.temperatures)):
        arguments += ["--grid", f"{key}={','.join(map(str, values))}"]
    arguments += [f"--{name}={getattr(options, name)}" for name in ("versions", "seeds", "parallel")]
    runs = len(options.betas) * len(options.temperatures) * options.seeds
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hivegrpo-sweep-") as temporary:
        folder = options.to or Path(temporary) / "sweep"
        halves = sweep_twice(arguments, folder, ended=runs // 2, versions=options.versions // 2)
        report = json.loads((folder / "report.json").read_text())
        complaints = halves.repeated()
    for point in report["points"]:
        told = ", ".join(f"{key} {value:g}" for key, value in point["settings"].items())
        figures = "  ".join(f"{name} {point['mean'][name]:.4f}" for name in ("kl", "reward_std", "reward", "entropy"))
        print(f"{told}: {figures}")
    met = check(report)
    made, rest = sum(halves.made.values()), len(versions_of(halves.second))
    ended = {name.split("/")[1] for name in halves.ended}
    print(f"killed after {made} versions, {len(ended)} of {runs} runs ended; the second start made the other {rest}")
    print("\n".join(complaints) if complaints else "nothing was repeated")
    print(f"{time.monotonic() - began:.0f} s: {'met' if met and not complaints else 'NOT met'}")
    return 0 if met and not complaints else 1


if __name__ == "__main__":
    sys.exit(main())
