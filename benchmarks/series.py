"""Figures of one measurement, and how they are shown."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Series:
    """Seconds that each peer took in each round that succeeded, and how many did not."""

    title: str
    rounds: list[list[float]] = field(default_factory=list)
    failed: int = 0

    @property
    def slowest(self) -> list[float]:
        """A round takes as long as its slowest peer."""
        return [max(peers) for peers in self.rounds]

    @property
    def median(self) -> float:
        """Over the rounds, of the slowest peer."""
        return median(self.slowest)

    def to_json(self) -> dict[str, Any]:
        """Raw figures with what is made of them."""
        return {"title": self.title, "median": self.median, "failed": self.failed, "seconds": self.rounds}


def table(sections: Iterable[tuple[str, Iterable[Series]]]) -> str:
    """A line for each series under the title of its section: medians, extremes, and counts."""
    head = f"{'':56}{'median':>8}{'min':>8}{'max':>8}{'rounds':>8}{'failed':>8}"
    lines = [head]
    for title, rows in sections:
        lines.append(title)
        lines.extend(_row(series) for series in rows)
    return "\n".join(lines)


def _row(series: Series) -> str:
    slowest = series.slowest
    times = "".join(f"{seconds:8.3f}" for seconds in (series.median, min(slowest), max(slowest)))
    return f"  {series.title:<54}{times}{len(slowest):8}{series.failed:8}"
