"""A mean without the extremes of every coordinate."""

from collections.abc import Sequence

from torch import Tensor

from hivegrpo.peer.swarm.rules.base import ElementwiseRule
from hivegrpo.peer.swarm.rules.order import trimmed

SHARE = (1, 4)
"""Of the contributors, how many are left out at either end: the most that this rule is to withstand."""


class TrimmedMean(ElementwiseRule):
    """In every coordinate, the weighted mean of the contributions without the floor(n / 4) smallest and largest.

    Yin et al., "Byzantine-robust distributed learning", arXiv:1803.01498, with weights: c_i is i's weight share, and
    the shares of what remains are divided by their sum (`order.trimmed`).

    Promises that up to floor(n / 4) of n contributors, whatever they send, move no coordinate out of the range of what
    the others sent there. With fewer than four it is the mean, and promises nothing.

    Costs precision: what remains has fewer samples (for Gaussian noise a variance of about 1.2 of the mean's), and
    where noise is skewed its middle is not its mean, so the result is not the gradient of one machine. A minority that
    agrees on values within the honest range still pulls each coordinate to the range's edge. Trimming counts heads and
    not weights, and takes a sort of n values in every coordinate.
    """

    name = "trimmed_mean"
    version = 1

    def reduce_part(self, parts: list[Tensor], coefficients: Sequence[float]) -> Tensor:
        return trimmed(parts, len(parts) * SHARE[0] // SHARE[1], coefficients)
