"""A mean of differences to a robust centre, each clipped."""

from collections.abc import Iterator, Sequence
from math import isqrt

from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.bits import norm_squared
from hivegrpo.peer.swarm.rules.base import Decode, Rule
from hivegrpo.peer.swarm.rules.order import median
from hivegrpo.protocol.scalars import fp32_bits, fp32_from_bits

ITERATIONS = 3

_FRACTION_BITS = 64


class CenteredClip(Rule):
    """Karimireddy et al., "Learning from history for Byzantine robust optimization", arXiv:2012.10333, on a span.

        v_0 = the median in every coordinate
        r = the median of |x_i - v_0|, the lower one of two in the middle
        v_(l+1) = v_l + sum of c_i min(1, r / |x_i - v_l|) (x_i - v_l), three times

    c_i is i's weight share. The paper starts from the last round's result; the median needs no history that a reducer
    could disagree about. Norms are of the part of the vectors that lies in the span: a span is judged by itself.

    Differences, products and sums (in roster order) are rounded to fp32 one by one; the norms of the rounded
    differences are exact, and the factors come from integer roots, rounded down to 64 bits and then to fp32.

    Promises, while fewer than half of the contributors are faulty, whatever they send: v_0 lies in the range of the
    others in every coordinate; r is at most D, the largest distance of one of the others to v_0; and the result lies
    within 3 D of v_0, up to rounding. Contributors with a share b of the weight move a step by at most b r. What counts
    is the distance from the others, not from zero as in `clip`: a contribution of honest norm that points elsewhere is
    clipped if it is further from them than they are from each other.

    Costs four passes over the contributions, each decoding all of them, and a sort of n values in every coordinate.
    Honest contributions beyond r are clipped, too, and three steps may not reach the fixed point: the result is not the
    gradient of one machine. A wrong span takes the whole span to prove, since the norms do.
    """

    name = "centered_clip"
    version = 1
    elementwise = False

    def reduce(self, parts: range, decode: Decode, coefficients: Sequence[float]) -> Iterator[Tensor]:
        centre: list[Tensor] = []
        squares = [0] * len(coefficients)
        for index in parts:
            keep_subnormals()
            decoded = decode(index)
            assert len(decoded) == len(coefficients) > 0
            centre.append(median(decoded))
            _add_distances(squares, decoded, centre[-1])
        radius_squared = sorted(squares)[(len(squares) - 1) // 2]
        for _ in range(ITERATIONS - 1):
            factors = _factors(squares, radius_squared, coefficients)
            squares = [0] * len(coefficients)
            for place, index in enumerate(parts):
                keep_subnormals()
                decoded = decode(index)
                centre[place] = _step(centre[place], decoded, factors)
                _add_distances(squares, decoded, centre[place])
        factors = _factors(squares, radius_squared, coefficients)
        for place, index in enumerate(parts):
            keep_subnormals()
            yield _step(centre[place], decode(index), factors)


def _add_distances(squares: list[int], chunks: Sequence[Tensor], centre: Tensor) -> None:
    for place, chunk in enumerate(chunks):
        squares[place] += norm_squared(chunk - centre)


def _factors(squares: Sequence[int], radius_squared: int, coefficients: Sequence[float]) -> list[float]:
    """c_i min(1, r / |x_i - v|), fp32 values; norms in any common unit."""
    one = 1 << _FRACTION_BITS
    factors = [
        1.0 if square <= radius_squared else isqrt((radius_squared << 2 * _FRACTION_BITS) // square) / one
        for square in squares
    ]
    return [fp32_from_bits(fp32_bits(share * factor)) for share, factor in zip(coefficients, factors, strict=True)]


def _step(centre: Tensor, chunks: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    moved = centre.clone()
    for chunk, factor in zip(chunks, factors, strict=True):
        moved += (chunk - centre) * factor
    return moved
