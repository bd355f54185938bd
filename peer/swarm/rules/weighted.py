"""Weighted sums: the mean, and the mean of contributions that were clipped to a common norm."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hivegrpo.peer.swarm.rules.base import ElementwiseRule
from hivegrpo.protocol.chunks import RUN_CHUNKS


class Mean(ElementwiseRule):
    """x_1 c_1 + x_2 c_2 + ..., left to right, every product and every sum rounded to fp32; c_i is i's weight share.

    The gradient of one machine that holds everybody's groups. Promises nothing against a single contributor: it can
    move the result anywhere.
    """

    name = "mean"
    version = 1

    most_chunks = RUN_CHUNKS

    def reduce_part(self, parts: list[Tensor], coefficients: Sequence[float]) -> Tensor:
        # In NumPy, so that no part is too long. The coefficients are fp32 values.
        total = parts[0].numpy() * np.float32(coefficients[0])
        for part, coefficient in zip(parts[1:], coefficients[1:], strict=True):
            total += part.numpy() * np.float32(coefficient)
        return torch.from_numpy(total)


class Clip(Mean):
    """The same sum; c_i is i's weight share times min(1, 3 m / |x_i|), m the median norm of the sealed contributions.

    The factor is in the seal, since no reducer sees a whole vector. Nobody moves the result further than its share
    times 3 m, whatever it sends; below that norm a contribution counts in full, so honest ones are hardly ever
    touched. It does not see direction: colluders within the norm pull as hard as their shares allow.
    """

    name = "clip"
