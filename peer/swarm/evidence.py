"""What a reducer tells of the contributions to its span: how far each points where the result does."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


class SpanDots:
    """Inner products over a span, added up chunk by chunk while it is reduced.

    `dots` has <x_i, y> of each sealed contribution x_i with the result y, before its encoding, in the seal's order, and
    at last <y, y>; in float64. Evidence for people: nothing that is hashed depends on it.
    """

    def __init__(self, contributors: int) -> None:
        self.dots = [0.0] * (contributors + 1)

    def add(self, chunks: Sequence[Tensor], reduced: Tensor) -> None:
        """One chunk: what the contributors have there, and what the rule makes of it."""
        result = reduced.numpy().astype(np.float64)
        for place, chunk in enumerate((*chunks, reduced)):
            self.dots[place] += float(np.dot(chunk.numpy().astype(np.float64), result))
