"""What a reducer tells of the contributions to its span: how far each points where the result does."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

_PART = 8192
"""OpenBLAS shares out longer inner products among threads, which takes longer than they do."""


class SpanDots:
    """Inner products over a span, added up chunk by chunk while it is reduced.

    `dots` has <x_i, y> of each sealed contribution x_i with the result y, before its encoding, in the seal's order, and
    at last <y, y>: parts in fp32, so that values below 1e-20 count as zero, and their sum in float64. Evidence for
    people: nothing that is hashed depends on it.
    """

    def __init__(self, contributors: int) -> None:
        self.dots = [0.0] * (contributors + 1)

    def add(self, chunks: Sequence[Tensor], reduced: Tensor) -> None:
        """One chunk: what the contributors have there, and what the rule makes of it."""
        result = reduced.numpy()
        for place, chunk in enumerate((*chunks, reduced)):
            values = chunk.numpy()
            for start in range(0, len(values), _PART):
                part = slice(start, start + _PART)
                self.dots[place] += float(np.dot(values[part], result[part]))
