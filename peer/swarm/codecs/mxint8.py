"""The default: 8-bit integers under shared scales.

In NumPy, whose operations always run in the calling thread, and which starts them several times as fast as torch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.bits import INFINITE
from hivegrpo.peer.swarm.codecs.microscaling import BLOCK, block_count, scale_units, split_blocks
from hivegrpo.protocol.errors import CommitmentError

_UNITS = scale_units(6).numpy()
"""2^(code - 133)."""

_UP = np.exp2(np.minimum(133 - np.arange(INFINITE), 100)).astype(np.float32)
_UP_MORE = np.exp2(np.maximum(33 - np.arange(INFINITE), 0)).astype(np.float32)
"""Two factors of 64 / X = 2^(133 - code), which alone may be more than fp32 has."""
_FIRST_WITH_ONE_FACTOR = 33
"""From this code on the second is 1."""

_TOP_BITS, _BITS_OF_64 = np.uint64(0x8080808080808080), np.uint64(0x4040404040404040)
"""Of eight elements' magnitudes: only -128 has the first, and all from 64 to 127 have the second."""


class MxInt8(Codec):
    """MXINT8 of the OCP Microscaling Formats (MX) Specification v1.0: 8.25 bits a value.

    A block of 32 values x_j shares a scale X = 2^floor(log2(max |x_j|)), at least 2^-127, kept as E8M0 (biased by
    127). An element is q_j = clamp(round_half_even(64 x_j / X), -127, 127), and decodes to q_j X / 64, exactly.
    So |x_j - decoded| <= max(2^-7 max|x|, 2^-134).

    Layout: the scales of all blocks, one byte each, then all elements, one byte each; the last block may be shorter.
    Refused, since no encoder makes it: a scale that stands for NaN; -128, which the format has, and which under the
    largest scale would decode to an infinity; a block without an element of at least 64, unless its scale is the
    smallest.
    """

    name = "mxint8"
    version = 1

    def encoded_size(self, values: int) -> int:
        return block_count(values) + values

    def encode(self, chunk: Tensor) -> bytes:
        keep_subnormals()
        blocks, _, largest = split_blocks(chunk)
        scales = largest.numpy()
        # The first product is exact, or so small that 0 is what it and its rounding come to. The second is exact, and
        # by 1 for all but the smallest scales.
        scaled = np.multiply(blocks.numpy(), _UP.take(scales))
        if scales.min() < _FIRST_WITH_ONE_FACTOR:
            scaled *= _UP_MORE.take(scales)
        np.clip(np.rint(scaled, out=scaled), -127.0, 127.0, out=scaled)
        elements = scaled.astype(np.int8).reshape(-1)[: chunk.numel()]
        return bytes(scales.astype(np.uint8)) + bytes(elements)

    def decode(self, data: bytes | memoryview, values: int) -> Tensor:
        keep_subnormals()
        scales, elements = self._parse(data, values)
        decoded = elements.astype(np.float32)
        decoded *= _UNITS.take(scales)[:, np.newaxis]
        return torch.from_numpy(decoded.reshape(-1)[:values])

    def norm_squared(self, data: bytes | memoryview, values: int) -> int:
        scales, elements = self._parse(data, values)
        # Integers below 2^24 in fp32 and below 2^53 in fp64: exact in any order, in any floating-point state.
        numbers = elements.astype(np.float32)
        sums = np.bincount(scales, np.einsum("ij,ij->i", numbers, numbers))
        # An element is q * 2^(scale - 133), its square q^2 * 2^(2 scale + 32) units.
        return sum(int(sums[scale]) << (2 * scale + 32) for scale in np.flatnonzero(sums).tolist())

    def _parse(self, data: bytes | memoryview, values: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]:
        """Scales, uint8[blocks], and elements, int8[blocks, 32], the last block padded with zeros; views of `data`."""
        self.check_size(data, values)
        blocks = block_count(values)
        scales = np.frombuffer(data, np.uint8, blocks)
        elements = np.frombuffer(data, np.int8, values, blocks)
        if values % BLOCK:
            elements = np.concatenate([elements, np.zeros(-values % BLOCK, np.int8)])
        eights = np.abs(elements).view(np.uint64).reshape(-1, BLOCK // 8)
        seen = eights[:, 0] | eights[:, 1] | eights[:, 2] | eights[:, 3]
        if scales.max() == INFINITE:
            raise CommitmentError("a block's scale stands for NaN")
        if (seen & _TOP_BITS).any():
            raise CommitmentError("an element is -128, which no encoder makes")
        if scales[(seen & _BITS_OF_64) == 0].any():
            raise CommitmentError("a block's scale is too large for its elements")
        return scales, elements.reshape(-1, BLOCK)
