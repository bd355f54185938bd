"""`hivegrpo simulate`: one simulated run, and the command that repeats it."""

import gc
import json
import secrets
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import typer

from hivegrpo.coordinator.simulation.faults import Faults
from hivegrpo.coordinator.simulation.outcome import Outcome
from hivegrpo.coordinator.simulation.setting import Setting, config_for
from hivegrpo.coordinator.simulation.world import World
from hivegrpo.protocol.config import RunConfig


def run_simulation(
    numbers: Mapping[str, float], *, seed: int | None, faults: str, config: Path | None, as_json: bool
) -> None:
    """Print what came of it; exit with 1 if an invariant was broken, and say how to see that again.

    `numbers`: the command's options that are numbers, by name.
    """
    peers, rounds = int(numbers["peers"]), int(numbers["rounds"])
    setting = Setting(
        config=config_for(peers, rounds, RunConfig.load(config) if config is not None else None),
        peers=peers,
        seed=secrets.randbelow(1 << 32) if seed is None else seed,
        faults=Faults.parse(faults),
        values=int(numbers["values"]),
        speed=numbers["speed"],
        upload_mbit=numbers["upload_mbit"],
    )
    replay = _command(numbers, setting, config)
    gc.disable()  # nothing cyclic goes before the end, and to look through what stays takes a tenth of the time
    try:
        outcome = _measured(setting)
    except BaseException:
        print(f"failed; again: {replay}", file=sys.stderr)
        raise
    finally:
        gc.freeze()  # nor is all that is left looked through, and taken apart, when the process ends
        gc.enable()
    if as_json:
        print(json.dumps({"command": replay, **outcome.as_json()}, separators=(",", ":")))
    else:
        print("\n".join(outcome.lines()))
    if outcome.violations:
        print(f"an invariant is broken; again: {replay}", file=sys.stderr)
        raise typer.Exit(1)
    if seed is None and not as_json:
        print(f"again           {replay}")


def _measured(setting: Setting) -> Outcome:
    """Run it, and measure the coordinator: on the wall, and then by what share of that was CPU time.

    To ask for CPU time itself is a call to the kernel, and there would be two for every report.
    """
    began, wall_began = time.process_time(), time.perf_counter()
    outcome = World(setting, time.perf_counter).run()
    share = (time.process_time() - began) / (time.perf_counter() - wall_began)
    return replace(outcome, cpu_seconds=share * outcome.cpu_seconds)


def _command(numbers: Mapping[str, float], setting: Setting, config: Path | None) -> str:
    """The command that does the same once more."""
    options = {**numbers, "seed": setting.seed, "faults": setting.faults, "config": config}
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items() if value is not None]
    return shlex.join(["hivegrpo", "simulate", *(word for pair in given for word in pair)])
