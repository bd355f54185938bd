"""By how much each sealed contribution is multiplied: from weights and exact norms, as anyone can compute again.

The coordinator signs the coefficients in the seal; a peer computes them again and refuses a seal that has others.
"""

from collections.abc import Sequence
from math import isqrt

from hivegrpo.protocol.scalars import fp32_bits

CLIP_FACTOR = 3
"""A contribution above so many times the median norm is scaled down to that."""

CLIP_FROM = 4
"""Contributors from which the rule "auto" clips: below, the median says little."""

_FRACTION_BITS = 64


def planned_rule(rule: str, contributors: int) -> str:
    """The rule that a plan names, given the run's: "auto" is "clip" for four contributors or more, else "mean"."""
    if rule != "auto":
        return rule
    return "clip" if contributors >= CLIP_FROM else "mean"


def coefficients(rule: str, weights: Sequence[int], norms_squared: Sequence[int]) -> list[int]:
    """Bit patterns (fp32) of the sealed contributors' coefficients, in roster order.

    c_i = w_i / sum(w), and for "clip" times min(1, 3 m / |x_i|), where m is the median of the norms |x_i|: the lower
    one of the two in the middle, so that half of the contributors cannot raise it. Norms are given squared, in units of
    2^-298. The factor is rounded down to 64 bits, the product to double, and then to fp32; all of it is IEEE 754.
    """
    assert len(weights) == len(norms_squared) > 0
    total = sum(weights)
    factors = _clip_factors(norms_squared) if rule == "clip" else [1.0] * len(weights)
    return [fp32_bits(weight / total * factor) for weight, factor in zip(weights, factors, strict=True)]


def norm_bytes(norm_squared: int) -> bytes:
    """How a squared norm travels: big-endian, as short as possible."""
    return norm_squared.to_bytes((norm_squared.bit_length() + 7) // 8, "big")


def _clip_factors(norms_squared: Sequence[int]) -> list[float]:
    limit = CLIP_FACTOR**2 * sorted(norms_squared)[(len(norms_squared) - 1) // 2]
    one = 1 << _FRACTION_BITS
    return [1.0 if norm <= limit else isqrt((limit << 2 * _FRACTION_BITS) // norm) / one for norm in norms_squared]
