"""What the formats of the OCP Microscaling Formats (MX) Specification v1.0 share: blocks of 32, and E8M0 scales."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hivegrpo.peer.floats import NonFiniteError
from hivegrpo.peer.swarm.codecs.bits import INFINITE, MAGNITUDE, MANTISSA_BITS

BLOCK = 32
"""Values that share a scale in a Microscaling format."""


def block_count(values: int) -> int:
    """Blocks of a chunk with so many values; the last may be shorter."""
    return -(-values // BLOCK)


def split_blocks(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's blocks, the bits of their magnitudes, int32, and the biased exponent of each one's largest.

    Shapes [blocks, 32] and [blocks, 1]; the last block is padded with zeros. NonFiniteError as `Codec.encode`.
    """
    missing = -chunk.numel() % BLOCK
    blocks = (pad(chunk, (0, missing)) if missing else chunk.contiguous()).view(-1, BLOCK)
    magnitude = blocks.view(torch.int32) & MAGNITUDE
    largest = magnitude.amax(1, keepdim=True) >> MANTISSA_BITS
    refuse_infinite(int(largest.amax()))
    return blocks, magnitude, largest


def refuse_infinite(largest: int) -> None:
    """NonFiniteError if this, the largest biased exponent of what is to be encoded, is that of a NaN or an infinity."""
    if largest == INFINITE:
        raise NonFiniteError("The vector to encode holds a NaN or an infinity.")


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^exponent in fp32 for integers of at most 127; those below -126 give 2^-126."""
    return (exponents.add(127).clamp_(min=1) << MANTISSA_BITS).view(torch.float32)


def scale_units(fraction_bits: int) -> Tensor:
    """fp32[255]: 2^(code - 127 - fraction_bits), what an element's lowest bit stands for under each E8M0 scale.

    The smallest are subnormal, so all are made of bits. 0 <= fraction_bits <= 22.
    """
    bits = [
        (code - fraction_bits) << MANTISSA_BITS if code > fraction_bits else 1 << (code + 22 - fraction_bits)
        for code in range(INFINITE)
    ]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)
