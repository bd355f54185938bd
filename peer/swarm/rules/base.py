"""What a rule is: a canonical function of committed bytes.

Elementwise, separately rounded operations in roster order, and no reduction operator: whoever recomputes a span gets
the same bits. A chunk is below ATen's parallel grain of 32,768 values, so everything runs in the calling thread,
whose floating-point state `keep_subnormals` holds. NumPy's operations always do: a rule that has no others takes
several chunks at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals

Decode = Callable[[int], list[Tensor]]
"""Part `index` of a span, one chunk or several, as every sealed contributor has it, in roster order: fp32, 1-D; they
stay as they are."""


class Rule(ABC):
    """An aggregation rule, pinned by the run. `version` changes whenever its bits do."""

    name: str
    version: int
    most_chunks: int = 1
    """How many chunks a part may have. The result does not depend on how many have."""
    elementwise: bool
    """Whether a chunk of the result depends on nothing but the same chunk of the contributions and the coefficients.

    If so, one chunk is enough to prove that a span is wrong.
    """

    @abstractmethod
    def reduce(self, parts: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        """The parts of the result, in order; a part is the last one that was decoded before it is yielded.

        `coefficients` are the seal's, in roster order, each exactly an fp32 value
        (`hivegrpo.protocol.coefficients`).
        """


class ElementwiseRule(Rule):
    """A rule that treats every value by itself."""

    elementwise = True

    def reduce(self, parts: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        for index in parts:
            keep_subnormals()
            decoded = decode(index)
            assert len(decoded) == len(coefficients) > 0
            yield self.reduce_part(decoded, coefficients)

    @abstractmethod
    def reduce_part(self, parts: list[Tensor], coefficients: Sequence[float]) -> Tensor:
        """One part, a new one, from the same part of every contributor; these stay as they are."""
