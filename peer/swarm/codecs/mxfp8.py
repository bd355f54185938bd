"""8-bit floats under shared scales."""

from hivegrpo.peer.swarm.codecs.microscaling import block_count
from hivegrpo.peer.swarm.codecs.mxfloat import MxFloat


class MxFp8(MxFloat):
    """MXFP8 of the OCP Microscaling Formats (MX) Specification v1.0, elements E4M3: 8.25 bits a value.

    Elements have 3 bits of mantissa, 448 is the largest, 2^-6 the smallest normal one, 2^-9 the smallest. So
    |x_j - decoded| <= max(|x_j| / 16, 2^-18 max|x|, 2^-137), or |x_j| / 8 in the top eighth of a block's last binade,
    which saturates. Small values in a block keep their leading digits, which mxint8 loses; large ones have fewer.

    Layout: the scales of all blocks, one byte each, then all elements, one byte each; the last block may be shorter.
    """

    name = "mxfp8"
    version = 1
    exponent_bits = 4
    mantissa_bits = 3
    emax = 8
    emin = -6
    largest = 0x7E

    def encoded_size(self, values: int) -> int:
        return block_count(values) + values
