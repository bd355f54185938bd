"""What is reported of a run, of a point over its seeds, and of each value of a key over the points that have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from hivegrpo.cli.sweep.folder import EXCHANGE_FILE, MEASUREMENTS_FILE, Outcome, run_folder
from hivegrpo.cli.sweep.grid import Settings
from hivegrpo.cli.sweep.plan import Plan, Trial
from hivegrpo.cli.sweep.tally import Tally
from hivegrpo.protocol.history import read_history

LAST = 5
"""Versions at the end of a run over which what still changes is averaged."""

FIGURES = {
    "reward": f"mean reward of the completions that the last {LAST} versions were learnt from",
    "kl": "KL(last version || base) a token in nats, whatever beta is: mean of k3 = exp(b - p) - (b - p) - 1 with log-"
    "probabilities p of the policy and b of the base, over completions that the policy samples at temperature 1 to a "
    "fixed batch of prompts (held-out ones if there are any; http://joschu.net/blog/kl-approx.html)",
    "reward_std": "standard deviation of the rewards within a group, at the sampling temperature: unbiased, mean over "
    "the groups of the fixed batch, and over the versions that were measured",
    "reward_std_all": "metric reward_std: standard deviation over all completions that a version was learnt from, "
    "whatever their prompt; mean over the versions",
    "frac_reward_zero_std": "share of the groups whose rewards are all equal, so that they teach nothing; mean over "
    "the versions",
    "entropy": f"mean entropy of the sampled distributions in nats, last {LAST} versions",
    "length": f"mean completion length in tokens, last {LAST} versions",
    "accuracy_before": "share of the held-out rows that the base solves greedily",
    "accuracy_after": "share of the held-out rows that the last version solves greedily",
    "versions": "policy versions made",
    "tokens": "tokens sampled in training, prompts included",
    "seconds": "time of training: rollouts, gradients and steps, without evaluation and measurements",
    "exchanged_mb": "megabytes that the peers received from each other, if there was a swarm",
}

TRAINED_CURVES = ("reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length", "kl", "loss")
"""Metrics of training whose curves are reported; kl is there where beta is not 0."""

Figures = dict[str, float]
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """What is on disk of one run."""

    trial: Trial
    folder: Path
    outcome: Outcome
    tally: Tally
    measured: dict[int, Figures]
    """By version, what `hivegrpo.peer.learn.probe` found."""
    exchanged: float | None
    """Bytes."""

    @classmethod
    def read(cls, sweep: Path, trial: Trial) -> Self:
        """Of a trial, as far as it has come."""
        folder = run_folder(sweep, trial)
        measured = {record["version"]: record["figures"] for record in read_history(folder / MEASUREMENTS_FILE)}
        votes = {(r["version"], r["peer"]): r["metrics"] for r in read_history(folder / EXCHANGE_FILE)}
        exchanged = sum(vote.get("bytes_received", 0.0) for vote in votes.values()) if votes else None
        return cls(trial, folder, Outcome.read(folder), Tally.read(folder), measured, exchanged)

    @property
    def figures(self) -> Figures:
        """Those of `FIGURES` that there are."""
        tally, measured = self.tally, [self.measured[version] for version in sorted(self.measured)]
        accuracy = dict(tally.curve("eval/accuracy"))
        found: dict[str, float | None] = {
            "reward": _mean([value for _, value in tally.curve("reward")][-LAST:]),
            "kl": measured[-1].get("kl") if measured else None,
            "reward_std": _mean([figures["reward_std"] for figures in measured if "reward_std" in figures]),
            "reward_std_all": _mean([value for _, value in tally.curve("reward_std")]),
            "frac_reward_zero_std": _mean([value for _, value in tally.curve("frac_reward_zero_std")]),
            "entropy": _mean([value for _, value in tally.curve("entropy")][-LAST:]),
            "length": _mean([value for _, value in tally.curve("completions/mean_length")][-LAST:]),
            "accuracy_before": accuracy.get(0),
            "accuracy_after": tally.accuracy,
            "versions": float(tally.versions),
            "tokens": tally.tokens,
            "seconds": tally.seconds,
            "exchanged_mb": self.exchanged / 1e6 if self.exchanged is not None else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def curves(self) -> dict[str, Curve]:
        """Over versions: metrics of training, and as "measured/..." the figures of the fixed batch."""
        trained = {name: curve for name in TRAINED_CURVES if (curve := self.tally.curve(name))}
        names = sorted({name for figures in self.measured.values() for name in figures})
        measured = {
            f"measured/{name}": [(v, figures[name]) for v, figures in sorted(self.measured.items()) if name in figures]
            for name in names
        }
        return trained | measured


@dataclass(frozen=True)
class Mean:
    """Figures over several runs or points."""

    count: int
    figures: Figures
    spread: Figures
    """Sample standard deviation of each figure; nothing for a single one."""

    @classmethod
    def of(cls, parts: Sequence[Figures]) -> Self:
        """Over those that have a figure."""
        names = [name for name in FIGURES if any(name in part for part in parts)]
        values = {name: [part[name] for part in parts if name in part] for name in names}
        spread = {name: stdev(found) for name, found in values.items() if len(found) > 1}
        return cls(len(parts), {name: fmean(found) for name, found in values.items()}, spread)


def point_means(plan: Plan, results: Sequence[Result]) -> list[tuple[Settings, Mean]]:
    """Of every point, over its runs that are finished."""
    return [
        (point, Mean.of([r.figures for r in results if r.trial.settings == point and r.outcome.state == "finished"]))
        for point in plan.points
    ]


def marginal_means(plan: Plan, means: Sequence[tuple[Settings, Mean]]) -> dict[str, list[tuple[Any, Mean]]]:
    """Of every key with several values: for each value, over all points that have it, each point counting once.

    A value is compared with another over the same values of all other keys, as long as no point is missing: points
    whose counterparts at some other value did not finish are left out.
    """
    done: Mapping[str, Figures] = {_text(point): mean.figures for point, mean in means if mean.count}
    found: dict[str, list[tuple[Any, Mean]]] = {}
    for axis in plan.axes:
        if len(axis.values) < 2:
            continue
        complete = [
            point for point, _ in means if all(_text({**point, axis.key: value}) in done for value in axis.values)
        ]
        found[axis.key] = [
            (value, Mean.of([done[_text(point)] for point in complete if point[axis.key] == value]))
            for value in axis.values
        ]
    return found


def _text(point: Settings) -> str:
    return repr(sorted(point.items()))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
