"""What the formats of the OCP Microscaling Formats (MX) Specification v1.0 share: blocks of 32, and E8M0 scales."""

import torch

from hivegrpo.peer.swarm.codecs.bits import INFINITE, MANTISSA_BITS

BLOCK = 32
"""Values that share a scale in a Microscaling format."""

UNITS = torch.tensor(
    [(code - 6) << MANTISSA_BITS if code > 6 else 1 << (code + 16) for code in range(INFINITE)], dtype=torch.int32
).view(torch.float32)
"""2^(code - 133), what an element 1 stands for under the E8M0 scale `code`; subnormal up to code 6, so made of bits."""


def block_count(values: int) -> int:
    """Blocks of a chunk with so many values; the last may be shorter."""
    return -(-values // BLOCK)
