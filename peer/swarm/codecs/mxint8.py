"""The default: 8-bit integers under shared scales.

In NumPy, whose operations always run in the calling thread, and which starts them several times as fast as torch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.base import Codec, check_chunks
from hivegrpo.peer.swarm.codecs.bits import INFINITE, MAGNITUDE, MANTISSA_BITS
from hivegrpo.peer.swarm.codecs.microscaling import BLOCK, block_count, refuse_infinite, scale_units
from hivegrpo.protocol.errors import CommitmentError

Scales = npt.NDArray[np.uint8]
Elements = npt.NDArray[np.int8]

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

    def encode(self, chunks: Tensor, count: int = 1) -> bytes:
        check_chunks(chunks, count)
        keep_subnormals()
        rows = chunks.numpy().reshape(count, -1)
        if missing := -rows.shape[1] % BLOCK:
            rows = np.pad(rows, ((0, 0), (0, missing)))
        values, blocks = chunks.numel() // count, rows.shape[1] // BLOCK
        magnitudes = np.ascontiguousarray(rows).view(np.int32).reshape(-1) & MAGNITUDE
        scales = np.maximum.reduceat(magnitudes, np.arange(0, len(magnitudes), BLOCK)) >> MANTISSA_BITS
        refuse_infinite(int(scales.max()))
        # The first product is exact, or so small that 0 is what it and its rounding come to. The second is exact, and
        # by 1 for all but the smallest scales.
        scaled = np.multiply(rows.reshape(-1, BLOCK), _UP.take(scales)[:, np.newaxis])
        if scales.min() < _FIRST_WITH_ONE_FACTOR:
            scaled *= _UP_MORE.take(scales)[:, np.newaxis]
        np.rint(scaled, out=scaled).clip(-127.0, 127.0, out=scaled)
        encoded = np.empty((count, self.encoded_size(values)), np.uint8)
        encoded[:, :blocks] = scales.reshape(count, blocks)
        encoded[:, blocks:].view(np.int8)[:] = scaled.reshape(count, -1)[:, :values]
        return encoded.tobytes()

    def decode(self, data: bytes | memoryview, values: int, count: int = 1) -> Tensor:
        scales, elements = self._split(data, values, count)
        self._check(scales, elements)
        return self._decode(scales, elements, values)

    def decode_again(self, data: bytes | memoryview, values: int, count: int = 1) -> Tensor:
        return self._decode(*self._split(data, values, count), values)

    def norm_squared(self, data: bytes | memoryview, values: int, count: int = 1) -> int:
        scales, elements = self._split(data, values, count)
        self._check(scales, elements)
        # Integers below 2^24 in fp32 and below 2^53 in fp64: exact in any order, in any floating-point state.
        numbers = elements.astype(np.float32).reshape(-1, BLOCK)
        sums = np.bincount(scales.reshape(-1), np.einsum("ij,ij->i", numbers, numbers))
        # An element is q * 2^(scale - 133), its square q^2 * 2^(2 scale + 32) units.
        return sum(int(sums[scale]) << (2 * scale + 32) for scale in np.flatnonzero(sums).tolist())

    def _split(self, data: bytes | memoryview, values: int, count: int) -> tuple[Scales, Elements]:
        """Scales, uint8[count, blocks], and elements, int8[count, 32 blocks], the last ones padded with zeros."""
        size, blocks = self.check_size(data, values, count), block_count(values)
        rows = np.frombuffer(data, np.uint8).reshape(count, size)
        elements = rows[:, blocks:].view(np.int8)
        if values % BLOCK:
            elements = np.pad(elements, ((0, 0), (0, -values % BLOCK)))
        return rows[:, :blocks], elements

    def _check(self, scales: Scales, elements: Elements) -> None:
        """CommitmentError if no encoder makes them."""
        eights = np.abs(elements).view(np.uint64).reshape(*scales.shape, BLOCK // 8)
        seen = eights[..., 0] | eights[..., 1] | eights[..., 2] | eights[..., 3]
        if scales.max() == INFINITE:
            raise CommitmentError("a block's scale stands for NaN")
        if (seen & _TOP_BITS).any():
            raise CommitmentError("an element is -128, which no encoder makes")
        if scales[(seen & _BITS_OF_64) == 0].any():
            raise CommitmentError("a block's scale is too large for its elements")

    def _decode(self, scales: Scales, elements: Elements, values: int) -> Tensor:
        keep_subnormals()
        decoded = elements.astype(np.float32)
        blocks = decoded.reshape(-1, BLOCK)
        blocks *= _UNITS.take(scales).reshape(-1, 1)
        return torch.from_numpy(np.ascontiguousarray(decoded[:, :values]).reshape(-1))
