"""What a reducer tells of the contributions to its span: how far each points where the result does."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_PART = 256
"""Values whose products are added up in fp32."""


class SpanDots:
    """Inner products over a span, added up chunk by chunk while it is reduced.

    `dots` has <x_i, y> of each sealed contribution x_i with the result y, before its encoding, in the seal's order, and
    at last <y, y>: parts in fp32, so that values below 1e-20 count as zero, and their sum in float64. Evidence for
    people: nothing that is hashed depends on it.
    """

    def __init__(self, contributors: int) -> None:
        self.dots = [0.0] * (contributors + 1)

    def add(self, parts: Sequence[Tensor], reduced: Tensor) -> None:
        """One part of the span: what the contributors have there, and what the rule makes of it."""
        result = reduced.numpy()
        whole = len(result) // _PART * _PART
        for place, part in enumerate((*parts, reduced)):
            values = part.numpy()
            # einsum, since OpenBLAS shares out long inner products among threads, which takes longer than they do.
            sums = np.einsum("ij,ij->i", values[:whole].reshape(-1, _PART), result[:whole].reshape(-1, _PART))
            rest = np.einsum("i,i->", values[whole:], result[whole:])
            self.dots[place] += float(sums.sum(dtype=np.float64)) + float(rest)
