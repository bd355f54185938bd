"""The simulation's bars: how long large swarms take to simulate on one core, and a sweep of random seeds.

    make bench-simulate     # or: .venv/bin/python benchmarks/simulate.py [NAME ...]

Each bar runs in a process of its own, by the command that users have. Exits with 1 if one is missed.
"""

import argparse
import gc
import json
import os
import resource
import secrets
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from hivegrpo.coordinator.simulation.faults import Faults
from hivegrpo.coordinator.simulation.setting import Setting, config_for
from hivegrpo.coordinator.simulation.world import World

FAULTS = "churn=0.2,loss=0.05"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Bar:
    """One large simulation."""

    peers: int
    rounds: int
    seconds: float
    """At most."""
    memory: int = 2 * GIB
    """Bytes, at most."""


BARS = {"thousand": Bar(1_000, 200, 120.0), "ten-thousand": Bar(10_000, 20, 300.0)}

SWEEP = "sweep"
SEEDS, SWEEP_PEERS, SWEEP_ROUNDS, SWEEP_SECONDS = 500, 30, 50, 300.0


def main() -> int:
    """Run the bars that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BARS, SWEEP, []], help="all if none is named")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first-seed", type=int, help="of the sweep; random if left out")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    names = options.names or [*BARS, SWEEP]
    met = [large(name, BARS[name]) for name in names if name in BARS]
    if SWEEP in names:
        first = secrets.randbelow(1 << 31) if options.first_seed is None else options.first_seed
        met.append(sweep(first, options.seeds))
    return 0 if all(met) else 1


def large(name: str, bar: Bar) -> bool:
    """One large simulation, in a process of its own."""
    sizes = ["--peers", str(bar.peers), "--rounds", str(bar.rounds), "--seed", "7"]
    command = [sys.executable, "-m", "hivegrpo.cli.main", "simulate", *sizes, "--faults", FAULTS, "--json"]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1) or not done.stdout:
        print(done.stderr)
        return False
    outcome = json.loads(done.stdout)
    memory = after.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    met = seconds <= bar.seconds and memory <= bar.memory and not outcome["violations"]
    met = met and outcome["versions"] == bar.rounds
    print(
        f"{_verdict(met)}  {name}: {bar.peers} peers x {bar.rounds} rounds, {FAULTS}: {seconds:.1f} s "
        f"({cpu:.1f} s of CPU, the coordinator's {outcome['cpu_seconds']:.1f}), at most {bar.seconds:.0f}; "
        f"{memory / GIB:.2f} GiB; {sum(outcome['events'].values())} events; {len(outcome['violations'])} violations"
    )
    return met


def sweep(first: int, count: int) -> bool:
    """Small simulations with every kind of fault, one a seed, on all cores."""
    began, bad = time.monotonic(), 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for seed, violations in pool.map(violations_of, range(first, first + count)):
            for violation in violations:
                print(
                    f"seed {seed}: {violation}; again: hivegrpo simulate "
                    f"--peers {SWEEP_PEERS} --rounds {SWEEP_ROUNDS} --seed {seed} --faults all"
                )
            bad += bool(violations)
    seconds = time.monotonic() - began
    met = not bad and seconds <= SWEEP_SECONDS * count / SEEDS
    print(
        f"{_verdict(met)}  {SWEEP}: seeds {first} to {first + count - 1}, {SWEEP_PEERS} peers x "
        f"{SWEEP_ROUNDS} rounds, all faults: {seconds:.1f} s, at most {SWEEP_SECONDS * count / SEEDS:.0f}; {bad} broken"
    )
    return met


def violations_of(seed: int) -> tuple[int, list[str]]:
    """What one simulation of the sweep broke, with its seed."""
    gc.disable()  # as `hivegrpo simulate` does
    outcome = World(Setting(config_for(SWEEP_PEERS, SWEEP_ROUNDS), SWEEP_PEERS, seed, Faults.parse("all"))).run()
    gc.collect()  # the world and its peers refer to each other: a dozen megabytes, of hundreds of seeds
    return seed, [f"invariant {violation.invariant}: {violation.text}" for violation in outcome.violations]


def _verdict(met: bool) -> str:
    return "met    " if met else "NOT MET"


if __name__ == "__main__":
    sys.exit(main())
