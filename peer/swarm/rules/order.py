"""Order statistics of a chunk, coordinate by coordinate, decided on integers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_INDEX_BITS = 16
"""More than a roster's length takes."""


def order_keys(values: Tensor) -> Tensor:
    """int32 keys that are ordered as the finite fp32 values are, -0 before 0. Its own inverse, on the keys' bits."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def trimmed(chunks: Sequence[Tensor], drop: int, coefficients: Sequence[float]) -> Tensor:
    """In every coordinate, the weighted mean of what remains without the `drop` smallest and largest values.

    Each of `chunks` has the coefficient at its place, positive, an fp32 value. With x_(j) the j-th smallest value and
    c_(j) its coefficient, (sum of c_(j) x_(j)) / (sum of c_(j)), both from the smallest up, every operation rounded to
    fp32; then no less than the smallest that remains, and no more than the largest, whatever was rounded. Of equal
    values, the one earlier in `chunks` is the smaller. Call `keep_subnormals` before.
    """
    assert 0 <= 2 * drop < len(chunks) < 1 << _INDEX_BITS
    # Keys that also hold the place are distinct: every way to sort them gives the same.
    packed = torch.stack([(order_keys(chunk).long() << _INDEX_BITS) | place for place, chunk in enumerate(chunks)], 1)
    ordered = torch.from_numpy(np.sort(packed.numpy(), axis=1))[:, drop : len(chunks) - drop].t().contiguous()
    keys = (ordered >> _INDEX_BITS).int()
    values = order_keys(keys).view(torch.float32)
    shares = torch.tensor(coefficients, dtype=torch.float32)[ordered & ((1 << _INDEX_BITS) - 1)]
    total, weight = values[0] * shares[0], shares[0].clone()
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += value * share
        weight += share
    return order_keys(order_keys(total.div_(weight)).clamp_(keys[0], keys[-1])).view(torch.float32)


def median(chunks: Sequence[Tensor]) -> Tensor:
    """In every coordinate, the median of the values; of an even number, the mean of the two in the middle."""
    return trimmed(chunks, (len(chunks) - 1) // 2, [0.5] * len(chunks))
