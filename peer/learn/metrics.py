"""Metrics of work that is done in parts: what is needed to put means and extremes of the parts together."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hivegrpo.protocol.checks import MAX_METRIC


@dataclass
class Tally:
    """Sums with their counts, minima and maxima, by name. Tensors stay on their device until `values`."""

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sum and count."""
    minima: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Note the mean of (B, T) values over the True ones of the mask; of (B, 1) values, over the B sequences."""
        values = values.detach()
        if values.shape[1] == 1:
            self.means[name] = values.sum(), values.new_tensor(values.shape[0])
        else:
            self.means[name] = values.masked_fill(~mask, 0.0).sum(), mask.sum()

    def add(self, other: "Tally") -> None:
        """Take in another part."""
        for name, (total, count) in other.means.items():
            before = self.means.get(name)
            self.means[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
        for name, value in other.minima.items():
            self.minima[name] = torch.fmin(self.minima.get(name, value), value)
        for name, value in other.maxima.items():
            self.maxima[name] = torch.fmax(self.maxima.get(name, value), value)

    def values(self) -> dict[str, float]:
        """Plain numbers; nothing for what was counted over nothing."""
        means = {name: (total / count).item() for name, (total, count) in self.means.items() if count.item() > 0}
        return finite(means | {name: value.item() for name, value in (self.minima | self.maxima).items()})


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers which a coordinator takes: it refuses a contribution with others."""
    return {name: value for name, value in metrics.items() if abs(value) <= MAX_METRIC}
