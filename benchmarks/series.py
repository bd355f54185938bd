"""Figures of one size, and how they are shown."""

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

TITLES = {
    "round": "hivegrpo  contribution reported to vector decoded",
    "step": "hivemind  DecentralizedAverager.step",
    "step_uniform8": "hivemind  the same, Uniform8BitQuantization",
    "step_quantile8": "hivemind  the same, Quantile8BitQuantization",
    "step_0.3": "hivemind  the same, min_matchmaking_time=0.3",
    "step_closed": "hivemind  the same, target_group_size = processes",
    "data": "hivegrpo  plan known to vector decoded, with the seal",
    "runner": "hivemind  AllReduceRunner in a ready group",
    "encoding": "hivegrpo  encode the contribution, write it to disk",
}
SECTIONS = {
    "a whole round": ("round", "step", "step_uniform8", "step_quantile8", "step_0.3", "step_closed"),
    "the data phase alone": ("data", "runner"),
    "before the round": ("encoding",),
}


@dataclass(frozen=True, slots=True)
class Size:
    """What is averaged: how many values, by how many processes."""

    values: int
    peers: int


@dataclass
class Figures:
    """Seconds of each peer in each round that succeeded, by series; how many did not; ratios, and differences."""

    size: Size
    seconds: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_over_least: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    differences: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, peers: list[float]) -> None:
        """A round that succeeded."""
        self.seconds[name].append(peers)

    def fail(self, *names: str) -> None:
        """A round that did not."""
        for name in names:
            self.failed[name] += 1

    def ratios(self, name: str, ratio: float) -> None:
        """Bytes of a round, over the least that its codec can do with."""
        self.bytes_over_least[name].append(ratio)

    def differ(self, name: str, largest: float) -> None:
        """How far apart the peers of a round ended up."""
        self.differences[name] = max(largest, self.differences.get(name, 0.0))

    def measured(self, name: str) -> bool:
        """Whether that series was tried, with or without success."""
        return bool(self.seconds.get(name) or self.failed.get(name))

    def slowest(self, name: str) -> list[float]:
        """A round takes as long as its slowest peer."""
        return [max(peers) for peers in self.seconds[name]]

    def ratio(self, name: str, other: str) -> float | None:
        """Of the medians of two series; None if one of them has no round."""
        if not self.seconds.get(name) or not self.seconds.get(other):
            return None
        return median(self.slowest(name)) / median(self.slowest(other))

    def to_json(self) -> dict[str, Any]:
        """Raw figures with what is made of them."""
        names = self.seconds.keys() | self.failed.keys()
        series = {
            name: {
                "median": median(self.slowest(name)) if self.seconds.get(name) else None,
                "failed": self.failed.get(name, 0),
                "seconds": self.seconds.get(name, []),
            }
            for name in sorted(names)
        }
        return {
            "values": self.size.values,
            "peers": self.size.peers,
            "series": series,
            "bytes_over_least": self.bytes_over_least,
            "differences": self.differences,
        }


def table(figures: Figures) -> str:
    """A line for each series under the title of its section: medians, extremes, and counts."""
    head = f"{figures.size.values:,} values, {figures.size.peers} processes"
    lines = [f"{head:58}{'median':>8}{'min':>8}{'max':>8}{'rounds':>8}{'failed':>8}"]
    for title, names in SECTIONS.items():
        rows = [_row(figures, name) for name in names if figures.measured(name)]
        lines += [title, *rows] if rows else []
    for name, ratios in figures.bytes_over_least.items():
        lines.append(f"{name} bytes per peer, over 2(n-1)/n x codec size: {median(ratios):.3f}")
    for name, largest in figures.differences.items():
        lines.append(f"largest difference between peers, {name}: {largest:.3g}")
    return "\n".join(lines)


def _row(figures: Figures, name: str) -> str:
    slowest = figures.slowest(name)
    times = (median(slowest), min(slowest), max(slowest)) if slowest else ()
    shown = "".join(f"{seconds:8.3f}" for seconds in times) or f"{'-':>8}" * 3
    return f"  {TITLES[name]:<56}{shown}{len(slowest):8}{figures.failed.get(name, 0):8}"
