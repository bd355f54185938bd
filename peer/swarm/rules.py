"""How a chunk's contributions become one: canonical functions of committed bytes.

Elementwise, separately rounded operations in roster order, and no reduction operator: whoever recomputes a span gets
the same bits. A chunk is below ATen's parallel grain of 32,768 values, so everything runs in the calling thread,
whose floating-point state `keep_subnormals` holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.protocol.errors import ConfigError


class Rule(ABC):
    """An aggregation rule, pinned by the run."""

    name: str

    @abstractmethod
    def reduce(self, chunks: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        """One chunk from the same chunk of every sealed contributor, in roster order, with the seal's coefficients.

        Chunks are fp32, 1-D, of one length, at most CHUNK_VALUES; a coefficient is exactly an fp32 value.
        """


class Mean(Rule):
    """x_1 c_1 + x_2 c_2 + ..., left to right, every product and every sum rounded to fp32."""

    name = "mean"

    def reduce(self, chunks: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
        assert len(chunks) == len(coefficients) > 0
        keep_subnormals()
        total = chunks[0] * coefficients[0]
        for chunk, coefficient in zip(chunks[1:], coefficients[1:], strict=True):
            total += chunk * coefficient
        return total


RULES: dict[str, Rule] = {rule.name: rule for rule in (Mean(),)}


def get_rule(name: str) -> Rule:
    """The rule of that name; ConfigError if there is none."""
    if name not in RULES:
        raise ConfigError(f"There is no aggregation rule {name!r}.", f"Choose one of: {', '.join(sorted(RULES))}.")
    return RULES[name]
