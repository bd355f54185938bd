"""The averaging layer once more, in NumPy and Python's integers, for tests: it shares no code with what it checks.

Written from the OCP Microscaling Formats (MX) Specification v1.0, RFC 6962, and the formulas in the docstrings of
codecs, rules and coefficients. Every function treats a whole vector or chunk at once, and is exact where the product
has to be: codes and bytes, rounded fp32 sums in roster order, squared norms as integers.
"""

import hashlib
import struct
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
    result = []
    for weight, norm in zip(weights, norms_squared, strict=True):
        factor = 1.0
        if rule == "clip" and norm > 9 * median:
            # The largest k / 2^64 whose square is at most 9 median / norm.
            steps = isqrt(int(Fraction(9 * median, norm) * (1 << 128)))
            assert Fraction(steps**2, 1 << 128) <= Fraction(9 * median, norm) < Fraction((steps + 1) ** 2, 1 << 128)
            factor = float(Fraction(steps, 1 << 64))
        result.append(struct.unpack("<I", struct.pack("<f", weight / total * factor))[0])
    return result


def weighted_sum(vectors: Sequence[Single], bits: Sequence[int]) -> Single:
    """x_1 c_1 + x_2 c_2 + ..., every product and every sum rounded to fp32, left to right."""
    scales = np.array(bits, np.uint32).view(np.float32)
    total = vectors[0] * scales[0]
    for vector, scale in zip(vectors[1:], scales[1:], strict=True):
        total = total + vector * scale
    return np.asarray(total, np.float32)


def reduce_vectors(rule: str, vectors: Sequence[Single], bits: Sequence[int]) -> Single:
    """A rule's result before it is encoded."""
    if rule in ("mean", "clip"):
        return weighted_sum(vectors, bits)
    raise KeyError(rule)


def reduce_doubles(rule: str, vectors: Sequence[Single], bits: Sequence[int]) -> tuple[Double, Double]:
    """A rule's result in fp64, and by how much rounded fp32 sums may differ from it."""
    scales = np.array(bits, np.uint32).view(np.float32).astype(np.float64)
    terms = [vector.astype(np.float64) * scale for vector, scale in zip(vectors, scales, strict=True)]
    if rule in ("mean", "clip"):
        # Each of n products and n - 1 sums is off by at most 2^-24 of itself, or by 2^-150 below the normal range.
        slack = (2 * len(terms) * 2.0**-24) * np.sum(np.abs(terms), 0) + 2 * len(terms) * 2.0**-150
        return np.sum(terms, 0), slack
    raise KeyError(rule)


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
