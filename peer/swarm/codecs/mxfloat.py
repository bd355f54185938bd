"""What the Microscaling formats with floating-point elements share."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.base import ChunkwiseCodec, as_tensor
from hivegrpo.peer.swarm.codecs.bits import MANTISSA_BITS, shifted_sum, split_bits
from hivegrpo.peer.swarm.codecs.microscaling import BLOCK, block_count, powers_of_two, scale_units, split_blocks
from hivegrpo.protocol.errors import CommitmentError


class MxFloat(ChunkwiseCodec):
    """Blocks of 32 values under an E8M0 scale, elements of sign, exponent and mantissa, with subnormals.

    A block of values x_j has the scale X = 2^(floor(log2(max |x_j|)) - emax), at least 2^-127; an element is x_j / X,
    rounded to the nearest that the format has, ties to even, and at most the largest normal one. Signs are kept, those
    of zeros too. A decoded value, element times X, is exact in fp32.

    Refused, since no encoder makes it: codes that stand for NaN, and a block whose largest element lies below 2^emax,
    unless its scale is the smallest.
    """

    exponent_bits: int
    mantissa_bits: int
    emax: int
    """Exponent of the largest normal element."""
    emin: int
    """Exponent of the smallest normal element."""
    largest: int
    """Code of the largest normal element."""

    def __init__(self) -> None:
        self._sign = 1 << self.exponent_bits + self.mantissa_bits
        self._fraction_bits = self.mantissa_bits - self.emin
        """An element is an integer times 2^-fraction_bits."""
        self._units = scale_units(self._fraction_bits)
        integers = torch.tensor([self._integer(code) for code in range(2 * self._sign)], dtype=torch.int32)
        self._squares = integers.long().square()
        self._elements = integers.float()
        self._elements[self._sign :] *= -1.0  # zero has a sign, too

    def encode_chunk(self, chunk: Tensor) -> bytes:
        # Integer operations, and float ones whose operands and results are normal and exact, or zero: no
        # floating-point state of the thread matters here.
        blocks, magnitude, largest = split_blocks(chunk)
        scale = (largest - self.emax).clamp_(min=0)
        mantissa, exponent = split_bits(magnitude)
        # |x| is mantissa * 2^(exponent - 150), X is 2^(scale - 127): so |x| / X is mantissa * 2^shift.
        shift = exponent - scale - MANTISSA_BITS
        numbers = mantissa.float()
        top = ((numbers.view(torch.int32) >> MANTISSA_BITS) - 127 + shift).clamp_(min=self.emin)
        # In units of the last bit that an element with this exponent has. Where that exponent is emin, the factor may
        # be too small to be normal; then 2^-126 does as well, since a mantissa has 24 bits.
        rounded = numbers.mul_(powers_of_two(shift - top + self.mantissa_bits)).round_().int()
        # The mantissa's leading bit counts as one of the exponent, and a carry out of it as another.
        codes = ((top - self.emin) << self.mantissa_bits).add_(rounded).clamp_(max=self.largest)
        codes |= (blocks.view(torch.int32) >> 31) & self._sign
        elements = codes.to(torch.uint8).view(-1)[: chunk.numel()]
        return scale.to(torch.uint8).numpy().tobytes() + self._pack(elements).numpy().tobytes()

    def decode_chunk(self, data: bytes | memoryview, values: int) -> Tensor:
        keep_subnormals()
        scales, codes = self._parse(data, values)
        elements = self._elements.index_select(0, codes.view(-1).int()).view(-1, BLOCK)
        return (elements * self._units[scales.int()].unsqueeze(1)).view(-1)[:values]

    def chunk_norm_squared(self, data: bytes | memoryview, values: int) -> int:
        scales, codes = self._parse(data, values)
        squares = self._squares.index_select(0, codes.view(-1).int()).view(-1, BLOCK)
        # An element's lowest bit is 2^(scale - 127 - fraction_bits), its square 2^(2 scale + 44 - 2 fraction_bits)
        # units. Squares are below 2^36.
        return shifted_sum(squares.sum(1), scales, factor=2, offset=44 - 2 * self._fraction_bits)

    def _pack(self, codes: Tensor) -> Tensor:
        """The bytes of a chunk's elements, uint8[values]."""
        return codes

    def _unpack(self, packed: Tensor, values: int) -> Tensor:
        """The elements, uint8[values], of their bytes. CommitmentError if `_pack` does not make these."""
        return packed

    def _parse(self, data: bytes | memoryview, values: int) -> tuple[Tensor, Tensor]:
        """Scales, uint8[blocks], and elements' codes, uint8[blocks, 32], the last block padded with zeros."""
        raw = as_tensor(data)
        count = block_count(values)
        scales = raw[:count]
        codes = pad(self._unpack(raw[count:], values), (0, -values % BLOCK)).view(-1, BLOCK)
        largest = (codes & (self._sign - 1)).amax(1)
        if int(scales.amax()) > 254 - self.emax:
            raise CommitmentError("a block's scale stands for NaN, or for more than fp32 has")
        if int(largest.amax()) > self.largest:
            raise CommitmentError("an element stands for NaN")
        if bool(((largest < self._code(self.emax)) & (scales > 0)).any()):
            raise CommitmentError("a block's scale is too large for its elements")
        return scales, codes

    def _code(self, exponent: int) -> int:
        """The code of 2^exponent."""
        return exponent - self.emin + 1 << self.mantissa_bits

    def _integer(self, code: int) -> int:
        """The magnitude of an element, in units of 2^-fraction_bits."""
        magnitude = code & (self._sign - 1)
        exponent = magnitude >> self.mantissa_bits
        mantissa = magnitude & (1 << self.mantissa_bits) - 1
        return mantissa if exponent == 0 else mantissa + (1 << self.mantissa_bits) << exponent - 1
