"""What a sweep keeps on disk: what it is, and of each run its config, metrics, measurements and outcome.

sweep.json  lock  report.json  report.png
runs/<settings, seed, digest>/
    trial.json  metrics.jsonl  measurements.jsonl  outcome.json  log.txt
    state.bin, origin.json, lock     of a run on one machine, as in the home of `hivegrpo solo`
    swarm/  exchange.jsonl           of a run over peers: their homes, and what the rounds cost
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from hivegrpo.cli.sweep.plan import Budget, Plan, Trial, Unit
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import BusyError, ConfigError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.homes import locked_home

SWEEP_FILE = "sweep.json"
TRIAL_FILE = "trial.json"
OUTCOME_FILE = "outcome.json"
MEASUREMENTS_FILE = "measurements.jsonl"
EXCHANGE_FILE = "exchange.jsonl"
LOG_FILE = "log.txt"
RUNS = "runs"
SWARM = "swarm"
LOCK = "lock"

State = Literal["finished", "failed", "unfinished"]


@dataclass(frozen=True)
class Outcome:
    """How a run has ended, or that it has not."""

    state: State
    error: str | None = None
    """Why it failed, and what to do about it."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the run in a folder; "unfinished" if it has not ended."""
        path = folder / OUTCOME_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls("unfinished")

    def write(self, folder: Path) -> None:
        """Whole, or not at all."""
        write_whole(folder / OUTCOME_FILE, json.dumps({"state": self.state, "error": self.error}).encode())


@dataclass(frozen=True)
class Task:
    """What a run's process is told, through a file."""

    config: RunConfig
    budget: Budget
    peers: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the run in a folder."""
        content = json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8"))
        [(unit, amount)] = content["budget"].items()
        assert unit in get_args(Unit)
        return cls(RunConfig.from_json(json.dumps(content["config"])), Budget(unit, amount), content["peers"])


@contextmanager
def open_sweep(folder: Path, plan: Plan) -> Iterator[None]:
    """Hold a folder for this sweep, which inside is there with a folder of each run.

    ConfigError if it holds something else, or other settings of a run than the plan; BusyError if another process
    works on the sweep.
    """
    _require_same(folder, plan)
    try:
        with locked_home(folder):
            _require_same(folder, plan)
            write_whole(folder / SWEEP_FILE, _json(plan.identity))
            for trial in plan.trials:
                _write_trial(run_folder(folder, trial), trial, plan)
            yield
    except BusyError:
        raise BusyError(
            f"Another process works on the sweep in {folder}.", "Wait for it, or give this one a folder with --to."
        ) from None


def run_folder(sweep: Path, trial: Trial) -> Path:
    """The folder of one run."""
    return sweep / RUNS / trial.name


def _write_trial(folder: Path, trial: Trial, plan: Plan) -> None:
    path = folder / TRIAL_FILE
    content = _json(
        {
            "settings": trial.settings,
            "seed": trial.config.run.seed,
            "budget": {plan.budget.unit: plan.budget.amount},
            "peers": plan.peers,
            "config": json.loads(trial.config.canonical_json()),
        }
    )
    if not path.exists():
        write_whole(path, content)
    elif not _says(path, content):
        raise ConfigError(
            f"{path} is not what this sweep wrote there: the run would have other settings than the report says.",
            "Remove that run's folder to have it again, or name another folder with --to.",
        )


def _says(path: Path, content: bytes) -> bool:
    """Whether a file holds the same JSON."""
    try:
        return bool(json.loads(path.read_bytes()) == json.loads(content))
    except (OSError, ValueError, RecursionError):
        return False


def _require_same(folder: Path, plan: Plan) -> None:
    path = folder / SWEEP_FILE
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {LOCK}):
            raise ConfigError(f"{folder} is not empty, and holds no sweep.", "Name another folder with --to.")
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(_json(plan.identity))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = [f"{name} is {before.get(name)} there and {now[name]} here" for name in changed if name != "configs"]
        raise ConfigError(
            f"The folder {folder} holds another sweep: {'; '.join(told) or 'its base config differs'}.",
            "Ask for the same sweep to go on with it, or name another folder with --to.",
        )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
