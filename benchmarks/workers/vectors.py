"""What the workers average, and whether the outcome is its mean."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.05
"""Norm of the error over the norm of the mean. Eight bits, twice, are off by 0.02, a missing peer by 0.7 or more."""

STRIDE = 97
"""One value in so many is checked: enough to tell, and too few to disturb what is measured."""


def vector_of(rank: int, values: int) -> Tensor:
    """What peer `rank` puts in: Gaussian values, as gradients have them."""
    return torch.randn(values, generator=torch.Generator().manual_seed(rank))


class Mean:
    """The mean of the vectors of `peers` peers."""

    def __init__(self, peers: int, values: int) -> None:
        self._sample = torch.stack([vector_of(rank, values)[::STRIDE] for rank in range(peers)]).mean(0)

    def matches(self, vector: Tensor) -> bool:
        """Whether `vector` is that mean, but for the rounding on the wire."""
        error = torch.linalg.vector_norm(vector[::STRIDE] - self._sample)
        return bool(error <= TOLERANCE * torch.linalg.vector_norm(self._sample))


def save_sample(rank: int, vector: Tensor) -> str:
    """Leave the values that `Mean` looks at for the driver, in its folder; the file's name."""
    name = f"sample-{rank}.npy"
    np.save(Path(tempfile.gettempdir(), name), vector[::STRIDE].numpy())
    return name
