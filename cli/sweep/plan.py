"""A sweep as it is asked for: a base config, a grid, seeds and a budget; and the runs that these come to."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from hivegrpo.cli.sweep.grid import Axis, Settings, describe, span, text_of, with_settings
from hivegrpo.protocol.config import RunConfig, Section
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.homes import state_folder
from hivegrpo.protocol.strict import explain, read_toml

FORMAT = 1
MAX_RUNS = 10_000
MAX_NAME = 100
"""Characters of a folder's name that tell its settings."""
SWARM_ONLY = ("averaging", "timing", "admission", "distribution")
"""Sections that have no effect on one machine."""
REPEATED = {
    "run.seed": "Use --seeds for several seeds.",
    "run.versions": "A point's length is the budget: --versions.",
    "run.start_peers": "Use --peers, which holds for all points.",
}

Unit = Literal["versions", "seconds", "tokens"]


class SweepFile(Section):
    """A sweep.toml."""

    config: Path
    """The run.toml that the points are variations of; relative to the sweep.toml."""
    grid: dict[str, Any]
    """Values to try by key: "grpo.beta" = [0.0, 0.04], or beta = [0.0, 0.04] in a table [grid.grpo]."""
    seeds: int | None = Field(default=None, ge=1)
    """Runs of each point, with the seeds from the config's on."""
    versions: int | None = Field(default=None, ge=1)
    """Budget of a run, in policy versions."""
    seconds: float | None = Field(default=None, gt=0.0)
    """Budget of a run, in seconds of training."""
    tokens: int | None = Field(default=None, ge=1)
    """Budget of a run, in tokens sampled, prompts included."""
    peers: int | None = Field(default=None, ge=0)
    """Peers of a swarm on this machine; 0 trains without a network."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a sweep.toml; ConfigError if anything is wrong with it."""
        try:
            return cls.model_validate(read_toml(path))
        except ValidationError as error:
            raise explain(error, cls, str(path)) from None

    def axes(self, folder: Path) -> list[Axis]:
        """The grid; relative paths in it are from `folder`."""
        return [Axis.of(key, values, folder) for key, values in _flat(self.grid)]


@dataclass(frozen=True)
class Budget:
    """How long each run is."""

    unit: Unit
    amount: float

    @classmethod
    def of(cls, amounts: dict[Unit, float | None], base: RunConfig) -> Self:
        """The one that is given, or else the config's versions; ConfigError for more than one."""
        given = [(unit, amount) for unit, amount in amounts.items() if amount is not None]
        if len(given) > 1:
            raise ConfigError(
                f"The budget is given in {' and in '.join(unit for unit, _ in given)}.", "Choose one of them."
            )
        return cls(*given[0]) if given else cls("versions", base.run.versions)

    def spent(self, versions: int, seconds: float, tokens: float) -> bool:
        """Whether a run that has come so far is at its end."""
        return {"versions": versions, "seconds": seconds, "tokens": tokens}[self.unit] >= self.amount

    def __str__(self) -> str:
        return f"{self.amount:,.10g} {self.unit}"


@dataclass(frozen=True)
class Trial:
    """One run: a point with one seed."""

    settings: Settings
    config: RunConfig

    @cached_property
    def name(self) -> str:
        """Of its folder: its settings as far as they go, and a digest of the whole config."""
        told = [f"{key}={text_of(value)}" for key, value in self.settings.items()]
        safe = re.sub(r"[^\w.=+,-]", "_", ",".join([*told, f"seed={self.config.run.seed}"]))
        return f"{safe[:MAX_NAME]}-{_digest(self.config.canonical_json())[:8]}"

    @property
    def title(self) -> str:
        """For people."""
        return f"{describe(self.settings)}, seed {self.config.run.seed}"


@dataclass(frozen=True)
class Plan:
    """Everything that a sweep's results depend on."""

    name: str
    axes: tuple[Axis, ...]
    points: tuple[Settings, ...]
    seeds: tuple[int, ...]
    budget: Budget
    peers: int
    """0 trains without a network."""
    trials: tuple[Trial, ...]
    """In the order in which they are run: all points with the first seed, then with the next."""
    merged: int
    """Points that are left out because another one has the same config."""

    @classmethod
    def make(cls, base: RunConfig, axes: Sequence[Axis], seeds: int, budget: Budget, peers: int) -> Self:
        """Validate every point. ConfigError names the first that cannot be, and says why."""
        _require_sense(axes, budget, peers)
        # What the file leaves out stays out, so that defaults which follow from other settings still do.
        tables = base.model_dump(mode="json", exclude_unset=True)
        tables["run"] |= {"start_peers": max(1, peers)}
        if budget.unit == "versions":
            tables["run"] |= {"versions": int(budget.amount)}
        if peers:
            # Everybody on this machine is who they seem to be; an invite would have to be handed over.
            tables.setdefault("admission", {"mode": "open"})
        points: dict[str, tuple[Settings, RunConfig]] = {}
        combinations = span(axes)
        if len(combinations) * seeds > MAX_RUNS:
            raise ConfigError(
                f"{len(combinations)} points with {seeds} seeds are {len(combinations) * seeds} runs.",
                f"At most {MAX_RUNS} are taken: leave some values out.",
            )
        for settings in combinations:
            config = _validate(tables, settings, peers)
            points.setdefault(config.canonical_json(), (settings, config))
        numbers = tuple(range(base.run.seed, base.run.seed + seeds))
        trials = [
            Trial(settings, config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})}))
            for seed in numbers
            for settings, config in points.values()
        ]
        settled = tuple(settings for settings, _ in points.values())
        merged = len(combinations) - len(settled)
        return cls(base.run.name, tuple(axes), settled, numbers, budget, peers, tuple(trials), merged)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes it another sweep, as JSON."""
        return {
            "format": FORMAT,
            "name": self.name,
            "axes": {axis.key: list(axis.values) for axis in self.axes},
            "seeds": list(self.seeds),
            "budget": {self.budget.unit: self.budget.amount},
            "peers": self.peers,
            "configs": _digest("\n".join(trial.config.canonical_json() for trial in self.trials)),
        }

    @property
    def folder(self) -> Path:
        """Where it is kept if nothing else is said: another folder for another sweep."""
        digest = _digest(json.dumps(self.identity, sort_keys=True))[:16]
        return state_folder() / "sweeps" / f"{self.name}-{digest}"

    def __str__(self) -> str:
        runs, points, seeds = len(self.trials), len(self.points), len(self.seeds)
        where = f"over {self.peers} peers each" if self.peers else "on this machine alone"
        merged = f" ({self.merged} more have the config of another, and are left out)" if self.merged else ""
        total = Budget(self.budget.unit, runs * self.budget.amount)
        size = f"{counted(points, 'point')}{merged} x {counted(seeds, 'seed')} x {self.budget}"
        return f"{size} = {total} in {counted(runs, 'run')}, {where}."


def counted(number: int, noun: str) -> str:
    """The number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _validate(tables: dict[str, Any], settings: Settings, peers: int) -> RunConfig:
    try:
        config = RunConfig.model_validate(with_settings(tables, settings))
    except ValidationError as error:
        raise explain(error, RunConfig, f"The point {describe(settings)}") from None
    for section in (config.model, config.dataset, config.evaluation):
        if section is not None and section.path is not None and not section.path.exists():
            raise ConfigError(f"The point {describe(settings)}: there is no {section.path}.", "Correct the path.")
    if peers:
        try:
            config.require_swarm()
        except ConfigError as error:
            raise ConfigError(f"The point {describe(settings)}: {error.message}", error.hint) from None
    return config


def _require_sense(axes: Sequence[Axis], budget: Budget, peers: int) -> None:
    """ConfigError for what would be swept without any effect, or against the budget."""
    for axis in axes:
        if axis.key in REPEATED:
            raise ConfigError(f"{axis.key} cannot be in the grid.", REPEATED[axis.key])
        if not peers and axis.key.partition(".")[0] in SWARM_ONLY:
            raise ConfigError(
                f"{axis.key} has no effect on one machine alone, and all its points would be the same.",
                "Train every point over a swarm on this machine: --peers 2.",
            )
    if peers and budget.unit != "versions":
        raise ConfigError(
            f"A swarm cannot be stopped after {budget}.", "With --peers, give the budget in versions: --versions 30."
        )


def _flat(grid: dict[str, Any], prefix: str = "") -> list[tuple[str, list[Any]]]:
    """Keys with their values, of tables within tables; ConfigError for a key with anything but a list."""
    found: list[tuple[str, list[Any]]] = []
    for key, value in grid.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found.append((f"{prefix}{key}", value))
        else:
            raise ConfigError(f"[grid] {prefix}{key} is no list of values.", f"Write {prefix}{key} = [{value!r}].")
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
