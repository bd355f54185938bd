"""What is asked of the figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from series import Figures

ROUND_BAR = 0.1
DATA_BAR = 1.0
APPLICATION_BAR = 1.03
INTERFACE_BAR = 1.08
DIFFERENCE_BAR = 0.0
SMALL, LARGE, FEW = 1_000_000, 20_000_000, 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar, and what came out."""

    what: str
    found: float | None
    bar: float

    @property
    def met(self) -> bool:
        """A figure that there is, and that is not above the bar."""
        return self.found is not None and self.found <= self.bar

    def __str__(self) -> str:
        found = "no figure" if self.found is None else f"{self.found:.3f}"
        return f"{'met    ' if self.met else 'NOT MET'}  {self.what}: {found}, at most {self.bar:g}"


def verdicts(all_figures: Iterable[Figures]) -> list[Verdict]:
    """On the times where a bar is set for that size and they were measured; on bytes and differences everywhere."""
    given = []
    for figures in all_figures:
        values, peers = figures.size.values, figures.size.peers
        place = f"{values:,} values x {peers}"
        if (values, peers) == (SMALL, FEW) and figures.measured("step"):
            ratio = figures.ratio("round", "step")
            given.append(Verdict(f"{place}, whole round / hivemind's step", ratio, ROUND_BAR))
        if values in (SMALL, LARGE):
            ratio = figures.ratio("data", "runner")
            given.append(Verdict(f"{place}, data phase / hivemind's runner", ratio, DATA_BAR))
        for name, bar in (("application", APPLICATION_BAR), ("interface", INTERFACE_BAR)):
            ratios = figures.bytes_over_least.get(name)
            given.append(Verdict(f"{place}, {name} bytes / least", median(ratios) if ratios else None, bar))
        found = figures.differences.get("hivegrpo")
        given.append(Verdict(f"{place}, largest difference between peers", found, DIFFERENCE_BAR))
    return given
