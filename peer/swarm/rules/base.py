"""What a rule is: a canonical function of committed bytes.

Elementwise, separately rounded operations in roster order, and no reduction operator: whoever recomputes a span gets
the same bits. A chunk is below ATen's parallel grain of 32,768 values, so everything runs in the calling thread,
whose floating-point state `keep_subnormals` holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals

Decode = Callable[[int], list[Tensor]]
"""Chunk `index` of a span, as every sealed contributor has it, in roster order: fp32, 1-D; they stay as they are."""


class Rule(ABC):
    """An aggregation rule, pinned by the run. `version` changes whenever its bits do."""

    name: str
    version: int
    elementwise: bool
    """Whether a chunk of the result depends on nothing but the same chunk of the contributions and the coefficients.

    If so, one chunk is enough to prove that a span is wrong.
    """

    @abstractmethod
    def reduce(self, chunks: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        """The chunks of the result, in order; a chunk is the last one that was decoded before it is yielded.

        `coefficients` are the seal's, in roster order, each exactly an fp32 value
        (`hivegrpo.protocol.coefficients`).
        """


class ElementwiseRule(Rule):
    """A rule that treats every chunk by itself."""

    elementwise = True

    def reduce(self, chunks: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        for index in chunks:
            keep_subnormals()
            decoded = decode(index)
            assert len(decoded) == len(coefficients) > 0
            yield self.reduce_chunk(decoded, coefficients)

    @abstractmethod
    def reduce_chunk(self, chunks: list[Tensor], coefficients: Sequence[float]) -> Tensor:
        """One chunk, a new one, from the same chunk of every contributor; these stay as they are."""
