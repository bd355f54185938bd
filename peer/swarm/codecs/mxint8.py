"""The default: 8-bit integers under shared scales."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.bits import INFINITE, shifted_sum, split_bits
from hivegrpo.peer.swarm.codecs.microscaling import BLOCK, block_count, powers_of_two, scale_units, split_blocks
from hivegrpo.protocol.errors import CommitmentError

_UNITS = scale_units(6)


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
        # Integer operations, and float ones whose operands and results are normal and exact: no floating-point state
        # of the thread matters here.
        blocks, magnitude, scale = split_blocks(chunk)
        mantissa, exponent = split_bits(magnitude)
        # |x| is mantissa * 2^(exponent - 150), X is 2^(scale - 127): so 64 |x| / X is mantissa * 2^(exponent - scale
        # - 17). A factor below 2^-126 may as well be 2^-126, since a mantissa has 24 bits.
        factor = powers_of_two(exponent - scale - 17)
        elements = mantissa.float().mul_(factor).round_().clamp_(max=127.0).copysign_(blocks).to(torch.int8)
        return scale.to(torch.uint8).numpy().tobytes() + elements.view(-1)[: chunk.numel()].numpy().tobytes()

    def decode(self, data: bytes | memoryview, values: int) -> Tensor:
        keep_subnormals()
        scales, elements = self._parse(data, values)
        return (elements.float() * _UNITS[scales.int()].unsqueeze(1)).view(-1)[:values]

    def norm_squared(self, data: bytes | memoryview, values: int) -> int:
        scales, elements = self._parse(data, values)
        # An element is q * 2^(scale - 133), its square q^2 * 2^(2 scale + 32) units.
        return shifted_sum(elements.int().square_().sum(1), scales, factor=2, offset=32)

    def _parse(self, data: bytes | memoryview, values: int) -> tuple[Tensor, Tensor]:
        """Scales, uint8[blocks], and elements, int8[blocks, 32], the last block padded with zeros."""
        raw = self._bytes(data, values)
        blocks = block_count(values)
        scales, elements = raw[:blocks], raw[blocks:].view(torch.int8)
        if int(scales.amax()) == INFINITE:
            raise CommitmentError("a block's scale stands for NaN")
        if int(elements.amin()) == -128:
            raise CommitmentError("an element is -128, which no encoder makes")
        elements = pad(elements, (0, -values % BLOCK)).view(-1, BLOCK)
        if bool(((elements.abs().amax(1) < 64) & (scales > 0)).any()):
            raise CommitmentError("a block's scale is too large for its elements")
        return scales, elements
