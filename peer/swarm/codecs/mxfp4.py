"""4-bit floats under shared scales."""

from torch import Tensor
from torch.nn.functional import pad

from hivegrpo.peer.swarm.codecs.microscaling import block_count
from hivegrpo.peer.swarm.codecs.mxfloat import MxFloat
from hivegrpo.protocol.errors import CommitmentError


class MxFp4(MxFloat):
    """MXFP4 of the OCP Microscaling Formats (MX) Specification v1.0, elements E2M1: 4.25 bits a value.

    Magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6. So |x_j - decoded| <= max(|x_j| / 4, max|x| / 16, 2^-129).

    A gradient of Gaussian values loses 11 % of its norm, so that its losses are fed back.

    Layout: the scales of all blocks, one byte each, then all elements, two a byte, the first in the lower half. After
    an odd number of values the last upper half is 0.
    """

    name = "mxfp4"
    version = 1
    feedback = True
    exponent_bits = 2
    mantissa_bits = 1
    emax = 2
    emin = 0
    largest = 0x7

    def encoded_size(self, values: int) -> int:
        return block_count(values) + (values + 1) // 2

    def _pack(self, codes: Tensor) -> Tensor:
        pairs = pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        return pairs[:, 0] | pairs[:, 1] << 4

    def _unpack(self, packed: Tensor, values: int) -> Tensor:
        if values % 2 and int(packed[-1]) > 0xF:
            raise CommitmentError("the half byte after the last element is not 0")
        codes = packed.new_empty(packed.numel(), 2)
        codes[:, 0], codes[:, 1] = packed & 0xF, packed >> 4
        return codes.view(-1)[:values]
