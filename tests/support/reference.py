"""The averaging layer once more, in NumPy and Python's integers, for tests: it shares no code with what it checks.

Written from the OCP Microscaling Formats (MX) Specification v1.0, RFC 6962, and the formulas in the docstrings of
codecs, rules and coefficients. Every function treats a whole vector or chunk at once, and is exact where the product
has to be: codes and bytes, rounded fp32 sums in roster order, squared norms as integers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]
Double = NDArray[np.float64]
Codes = NDArray[np.uint8]

CHUNK = 16_384
BLOCK = 32
PIECE = 1 << 20
UNIT_BITS = 298
"""Squared norms count in units of 2^-298."""


@dataclass(frozen=True)
class MiniFloat:
    """An element format of sign, exponent and mantissa, as in the specification's section 5.3."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float

    @property
    def emax(self) -> int:
        return int(np.floor(np.log2(self.largest)))

    def magnitudes(self) -> Double:
        """What every code without a sign stands for, up to the largest number."""
        codes = np.arange(1 << self.exponent_bits + self.mantissa_bits)
        exponent, mantissa = codes >> self.mantissa_bits, codes & (1 << self.mantissa_bits) - 1
        fraction = mantissa / 2.0**self.mantissa_bits
        values = np.where(
            exponent > 0, (1 + fraction) * 2.0 ** (exponent - self.bias), fraction * 2.0 ** (1 - self.bias)
        )
        return values[values <= self.largest]

    def encode(self, scaled: Double) -> Codes:
        """Codes of the nearest elements, ties to the even code; what is above the largest is the largest."""
        values = self.magnitudes()
        size = np.minimum(np.abs(scaled), self.largest)
        above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
        below = above - 1
        middle = (values[above] + values[below]) / 2
        upper = (size > middle) | ((size == middle) & (above % 2 == 0))
        codes = np.where(upper, above, below) | np.signbit(scaled) << self.exponent_bits + self.mantissa_bits
        return codes.astype(np.uint8)

    def decode(self, codes: Codes) -> Double:
        sign = 1 << self.exponent_bits + self.mantissa_bits
        return np.where(codes & sign, -1.0, 1.0) * self.magnitudes()[codes & sign - 1]


E4M3 = MiniFloat(exponent_bits=4, mantissa_bits=3, bias=7, largest=448.0)
E2M1 = MiniFloat(exponent_bits=2, mantissa_bits=1, bias=1, largest=6.0)
EMAX = {"mxint8": 0, "mxfp8": E4M3.emax, "mxfp4": E2M1.emax}


def encode_chunk(codec: str, chunk: Single) -> bytes:
    """Bytes of a chunk of finite values."""
    if codec == "fp32":
        return chunk.astype("<f4").tobytes()
    exact = chunk.astype(np.float64)
    blocks = np.pad(exact, (0, -len(exact) % BLOCK)).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(1)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - EMAX[codec], -127)
    exponent = np.maximum(exponent, -127)
    scaled = np.ldexp(blocks, -exponent[:, None]).ravel()[: len(exact)]
    scales = (exponent + 127).astype(np.uint8).tobytes()
    if codec == "mxint8":
        return scales + np.clip(np.rint(scaled * 64), -127, 127).astype(np.int8).tobytes()
    if codec == "mxfp8":
        return scales + E4M3.encode(scaled).tobytes()
    codes = np.pad(E2M1.encode(scaled), (0, len(exact) % 2))
    return scales + (codes[0::2] | codes[1::2] << 4).astype(np.uint8).tobytes()


def decode_chunk(codec: str, data: bytes, values: int) -> Single:
    """The values of a chunk that an encoder made."""
    if codec == "fp32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    blocks = -(-values // BLOCK)
    exponent = np.repeat(np.frombuffer(data[:blocks], np.uint8).astype(np.int64) - 127, BLOCK)[:values]
    rest = np.frombuffer(data[blocks:], np.uint8)
    if codec == "mxint8":
        elements = rest.view(np.int8) / 64.0
    elif codec == "mxfp8":
        elements = E4M3.decode(rest)
    else:
        elements = E2M1.decode(np.stack([rest & 15, rest >> 4], 1).ravel()[:values])
    return np.ldexp(elements, exponent).astype(np.float32)


def encode_vector(codec: str, vector: Single) -> list[bytes]:
    return [encode_chunk(codec, vector[start : start + CHUNK]) for start in range(0, len(vector), CHUNK)]


def decode_vector(codec: str, chunks: Sequence[bytes], values: int) -> Single:
    sizes = [min(CHUNK, values - start) for start in range(0, values, CHUNK)]
    return np.concatenate([decode_chunk(codec, *each) for each in zip(chunks, sizes, strict=True)])


def rounding_error(codec: str, values: Double) -> Double:
    """Largest error that the specification's rounding may make of each value, given its block's largest."""
    blocks = np.abs(np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK))
    largest = np.repeat(blocks.max(1), BLOCK)[: len(values)]
    size = np.abs(values)
    match codec:
        case "mxint8":  # half a step of X / 64, or a whole one at 127, under X > max / 2
            return np.maximum(largest * 2.0**-7, 2.0**-134)
        case "mxfp8":  # half a step of 3 bits; a step where the block's top saturates; half the smallest, 2^-10 X
            return np.maximum(size / 8, np.maximum(largest * 2.0**-18, 2.0**-137))
        case "mxfp4":  # half a step of 1 bit, or of the smallest, 2^-2 X
            return np.maximum(size / 4, np.maximum(largest / 16, 2.0**-129))
    return np.zeros_like(values)


def norm_squared(vector: Single) -> int:
    """Exact squared norm of fp32 values, in units of 2^-298."""
    fraction, exponent = np.frexp(vector.astype(np.float64))
    mantissa = np.ldexp(fraction, 24).astype(np.int64)  # a value is mantissa * 2^(exponent - 24)
    total = 0
    for start in range(0, len(vector), CHUNK):  # 2^14 squares below 2^48 fit in 63 bits
        run = slice(start, start + CHUNK)
        order = exponent[run]
        for each in np.unique(order):
            squares = int((mantissa[run][order == each] ** 2).sum())
            shift = 2 * (int(each) - 24) + UNIT_BITS
            total += squares << shift if shift >= 0 else squares >> -shift
    return total


def coefficients(rule: str, weights: Sequence[int], norms_squared: Sequence[int]) -> list[int]:
    """fp32 bits of weight share times clip factor: w / sum(w) * min(1, 3 m / |x|), m the lower median norm."""
    total = sum(weights)
    median = sorted(norms_squared)[(len(norms_squared) - 1) // 2]
    factors = [shrink(9 * median, norm) if rule == "clip" else 1.0 for norm in norms_squared]
    return [fp32_bits(weight / total * factor) for weight, factor in zip(weights, factors, strict=True)]


def shrink(limit: int, square: int) -> float:
    """min(1, sqrt(limit / square)): the largest k / 2^64 that is not above it."""
    if square <= limit:
        return 1.0
    ratio = Fraction(limit, square)
    steps = isqrt(int(ratio * (1 << 128)))
    assert Fraction(steps**2, 1 << 128) <= ratio < Fraction((steps + 1) ** 2, 1 << 128)
    return float(Fraction(steps, 1 << 64))


def fp32_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def reduce_vectors(rule: str, vectors: Sequence[Single], bits: Sequence[int], spans: Sequence[slice]) -> Single:
    """A rule's result before it is encoded; `spans` are the values that belong together."""
    scales = np.array(bits, np.uint32).view(np.float32)
    reduce = {"mean": weighted_sum, "clip": weighted_sum, "trimmed_mean": trimmed_mean, "centered_clip": centered_clip}
    return np.concatenate([reduce[rule]([vector[span] for vector in vectors], scales) for span in spans])


def weighted_sum(vectors: Sequence[Single], scales: Single) -> Single:
    """x_1 c_1 + x_2 c_2 + ..., every product and every sum rounded to fp32, left to right."""
    total = vectors[0] * scales[0]
    for vector, scale in zip(vectors[1:], scales[1:], strict=True):
        total = total + vector * scale
    return np.asarray(total, np.float32)


def trimmed_mean(vectors: Sequence[Single], scales: Single) -> Single:
    """The weighted mean without the floor(n / 4) smallest and largest in every coordinate."""
    return trimmed(vectors, scales, len(vectors) // 4)


def trimmed(vectors: Sequence[Single], scales: Single, drop: int) -> Single:
    """sum(c x) / sum(c) from the smallest that remains up, in fp32, kept between the smallest and the largest."""
    values, shares = _remaining(vectors, scales, drop)
    total, weight = values[0] * shares[0], shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total, weight = total + value * share, weight + share
    mean = total / weight
    low, high = values[0], values[-1]
    below = (mean < low) | ((mean == low) & np.signbit(mean) & ~np.signbit(low))
    mean = np.where(below, low, mean)
    above = (mean > high) | ((mean == high) & ~np.signbit(mean) & np.signbit(high))
    return np.where(above, high, mean).astype(np.float32)


def _remaining(vectors: Sequence[Single], scales: Single, drop: int) -> tuple[Single, Single]:
    """Values and their shares in every coordinate, sorted, -0 before 0, equals in roster order, without the ends."""
    stacked = np.stack(vectors)
    order = np.lexsort((~np.signbit(stacked), stacked), axis=0)[drop : len(vectors) - drop]
    return np.take_along_axis(stacked, order, 0), scales[order]


def centered_clip(vectors: Sequence[Single], scales: Single) -> Single:
    """Three clipped steps from the median, the radius being the median distance to it."""
    centre = trimmed(vectors, np.full(len(vectors), 0.5, np.float32), (len(vectors) - 1) // 2)
    radius = 0
    for step in range(3):
        squares = [norm_squared(vector - centre) for vector in vectors]
        radius = sorted(squares)[(len(squares) - 1) // 2] if step == 0 else radius
        moved = centre
        for vector, square, scale in zip(vectors, squares, scales, strict=True):
            moved = moved + (vector - centre) * np.float32(float(scale) * shrink(radius, square))
        centre = moved
    return centre


def reduce_doubles(
    rule: str, vectors: Sequence[Single], bits: Sequence[int], spans: Sequence[slice]
) -> tuple[Double, Double]:
    """A rule's result in fp64, and by how much rounded fp32 operations may differ from it."""
    scales = np.array(bits, np.uint32).view(np.float32).astype(np.float64)
    pairs = [_in_doubles(rule, np.stack([vector[span] for vector in vectors]), scales) for span in spans]
    result, slack = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return result, slack


def _in_doubles(rule: str, vectors: Single, scales: Double) -> tuple[Double, Double]:
    count, wide = len(vectors), vectors.astype(np.float64)
    tiny = 4 * count * 2.0**-149  # of roundings below the normal range
    if rule in ("mean", "clip"):
        # n products and n - 1 sums, each off by at most 2^-24 of what it makes.
        terms = wide * scales[:, None]
        return terms.sum(0), 2 * count * 2.0**-24 * np.abs(terms).sum(0) + tiny
    if rule == "trimmed_mean":
        # The same, n - 1 sums of shares, and a division.
        values, shares = _remaining(list(vectors), scales.astype(np.float32), count // 4)
        terms, weight = values.astype(np.float64) * shares, shares.astype(np.float64).sum(0)
        return terms.sum(0) / weight, (4 * count * 2.0**-24 * np.abs(terms).sum(0) + tiny) / weight
    centre, radius = np.median(wide, 0), 0.0
    size = np.abs(wide).max(0)
    for step in range(3):
        away = wide - centre
        norms = np.linalg.norm(away, axis=1)
        radius = float(np.sort(norms)[(count - 1) // 2]) if step == 0 else radius
        factors = np.minimum(1.0, np.divide(radius, norms, out=np.ones_like(norms), where=norms > 0))
        centre = centre + ((scales * factors)[:, None] * away).sum(0)
    # Each of three steps rounds 3 n times to 2^-24 of at most twice the largest value there; the distances, and with
    # them the factors, move by as much of the span's whole length, spread over it as the values are.
    spread = np.linalg.norm(size) / np.sqrt(len(size))
    return centre, 3 * 3 * count * 2.0**-23 * (size + spread) + tiny


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962, section 2.1, from hashes of leaves, level by level."""
    level = list(leaves)
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(level) & ~1 :]
    return level[0]


def leaf(piece: bytes) -> bytes:
    return hashlib.sha256(b"\0" + piece).digest()


def chunks_root(chunks: Sequence[bytes]) -> bytes:
    """What a contributor commits to."""
    return merkle_root([leaf(chunk) for chunk in chunks])


def span_root(data: bytes) -> bytes:
    """Digest of a reduced span."""
    return merkle_root([leaf(data[start : start + PIECE]) for start in range(0, len(data), PIECE)])
