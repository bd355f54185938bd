"""Integers in and out of fp32 bit patterns: exact, whatever the thread's floating-point state is."""

import torch
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF
MANTISSA_BITS = 23
INFINITE = 255
"""Biased exponent of infinities and NaNs in fp32, and the code of NaN in E8M0."""


def split_bits(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (m, e) for the bits of non-negative finite fp32 values m * 2^(e - 150): 0 <= m < 2^24, 1 <= e <= 254."""
    exponent = (magnitude >> MANTISSA_BITS).clamp_(min=1)
    return magnitude - ((exponent - 1) << MANTISSA_BITS), exponent


def shifted_sum(terms: Tensor, exponents: Tensor, *, factor: int, offset: int) -> int:
    """Exact sum of terms * 2^(factor * exponent + offset); a chunk of terms must add up to less than 2^63."""
    sums = torch.zeros(256, dtype=torch.int64).index_add_(0, exponents.long(), terms.long())
    return sum(total << (factor * exponent + offset) for exponent, total in enumerate(sums.tolist()) if total)


def norm_squared(values: Tensor) -> int:
    """Exact sum of the squares of a chunk of finite fp32 values, in units of 2^-298."""
    mantissa, exponent = split_bits(values.view(torch.int32) & MAGNITUDE)
    # A value is mantissa * 2^(exponent - 150). The squares, below 2^48, are summed for each exponent apart.
    return shifted_sum(mantissa.long().square_(), exponent, factor=2, offset=-2)
