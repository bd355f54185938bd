"""Encodings of gradient chunks: bytes, bounds, exactness, and what is refused."""

import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hivegrpo.peer.floats import NonFiniteError
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.microscaling import BLOCK
from hivegrpo.peer.swarm.codecs.mxfp4 import MxFp4
from hivegrpo.peer.swarm.codecs.mxfp8 import MxFp8
from hivegrpo.peer.swarm.codecs.mxint8 import MxInt8
from hivegrpo.peer.swarm.codecs.registry import CODECS, get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector, encode_vector
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError, ConfigError

MXINT8, MXFP8, MXFP4 = MxInt8(), MxFp8(), MxFp4()

E4M3 = [Fraction(8 * (code > 7) + code % 8) * Fraction(2) ** (max(1, code // 8) - 10) for code in range(0x7F)]
"""Magnitudes by code: mantissas of 3 bits, smallest exponent -6, so 2^-9 for the lowest bit."""
E2M1 = [Fraction(twice, 2) for twice in (0, 1, 2, 3, 4, 6, 8, 12)]

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
floats = pytest.mark.parametrize(("codec", "magnitudes"), [(MXFP8, E4M3), (MXFP4, E2M1)], ids=["mxfp8", "mxfp4"])
quickly = settings(max_examples=60, deadline=None)


def from_bits(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype="<u4").view("<f4").astype(np.float32))


finite_bits = st.tuples(st.booleans(), st.integers(0, 0x7F7FFFFF)).map(lambda pair: pair[0] << 31 | pair[1])
"""Bit patterns of finite fp32 values; hypothesis favours the ends, so zeros, subnormals and the largest are common."""


@st.composite
def chunks(draw: st.DrawFn, longest: int = CHUNK_VALUES) -> Tensor:
    """Chunks of any length: drawn values, repeated up to the length."""
    pattern = draw(st.lists(finite_bits, min_size=1, max_size=3 * BLOCK))
    return from_bits(list(np.resize(pattern, draw(st.integers(1, longest)))))


@pytest.fixture
def flushing() -> Iterator[None]:
    """Some library has switched flush-to-zero on in this thread."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_mxint8_bytes_worked_by_hand() -> None:
    # Block 1, maximum 3: X = 2^1, scale byte 127 + 1 = 0x80, an element is x / 2 * 64 = 32 x.
    first = [3.0, -1.0, 3 / 64, 1 / 64, 5 / 64, -3 / 64, -0.0, -3.0] + [0.0] * 24
    # 96, -32, then the ties 1.5 -> 2, 0.5 -> 0, 2.5 -> 2, -1.5 -> -2, then 0 and -96.
    first_elements = bytes([0x60, 0xE0, 0x02, 0x00, 0x02, 0xFE, 0x00, 0xA0]) + bytes(24)
    # Block 2, three values, maximum 2 - 2^-23: X = 2^0, and 64 (2 - 2^-23) rounds to 128, clamped to 127.
    second = [2 - 2**-23, -(2 - 2**-23), 1.0]
    data = bytes([0x80, 0x7F]) + first_elements + bytes([0x7F, 0x81, 0x40])
    assert MXINT8.encode(torch.tensor(first + second)) == data
    decoded = [3.0, -1.0, 4 / 64, 0.0, 4 / 64, -4 / 64, 0.0, -3.0, *[0.0] * 24, 127 / 64, -127 / 64, 1.0]
    assert MXINT8.decode(data, 35).tolist() == decoded


@pytest.mark.parametrize(
    ("bits", "data"),
    [
        (0x00000000, "0000"),  # zero: the smallest scale, 2^-127
        (0x80000000, "0000"),
        (0x00000001, "0000"),  # 2^-149 is 2^-16 of an element under that scale
        (0x00010000, "0001"),  # 2^-133 is one
        (0x80008000, "0000"),  # -2^-134: the tie goes to zero
        (0x00018000, "0002"),  # 1.5 * 2^-133: the tie goes to two
        (0x00400000, "0040"),  # 2^-127 is the scale itself
        (0x007FFFFF, "007f"),  # the largest subnormal
        (0x00800000, "0140"),  # 2^-126, the smallest normal
        (0xFF7FFFFF, "fe81"),  # the lowest finite value
    ],
)
def test_mxint8_at_the_ends_of_the_range(bits: int, data: str) -> None:
    assert MXINT8.encode(from_bits([bits])).hex() == data


def test_fp32_bytes_are_little_endian() -> None:
    assert get_codec("fp32").encode(torch.tensor([1.0, -2.5])).hex() == "0000803f" + "000020c0"


def test_mxint8_decodes_every_scale_and_element_exactly() -> None:
    # Every block begins with 127, so that its scale is the one that it needs.
    elements = np.pad(np.arange(-127, 128, dtype=np.int8), (0, 24)).reshape(-1, BLOCK - 1)
    padded = np.pad(elements, ((0, 0), (1, 0)), constant_values=127)
    for code in range(255):
        data = bytes([code]) * len(padded) + padded.tobytes()
        decoded = MXINT8.decode(data, padded.size).double().numpy()
        assert (decoded == padded.ravel() * 2.0 ** (code - 133)).all()


def test_mxfp8_bytes_worked_by_hand() -> None:
    # Block 1, maximum 3: X = 2^(1 - 8) = 2^-7, scale byte 127 - 7 = 0x78, an element is 128 x. A code is sign,
    # exponent + 7 in 4 bits, mantissa in 3; below 2^-6 the exponent's bits are 0 and the mantissa counts in 2^-9.
    first = [3.0, -1.0, 1.0625, 1.1875, 3.4375, -(2.0**-16), 2.0**-17, 3 * 2.0**-17, 2.0**-13, -0.0] + [0.0] * 22
    # 384 = 1.5 * 2^8: 1111 100. -128 = -1.0 * 2^7: 1 1110 000. 136 = 1.0625 * 2^7, a tie, to even: 1110 000.
    # 152 = 1.1875 * 2^7, a tie between mantissas 1 and 2: 1110 010. 440 = 1.71875 * 2^8, nearest is 448 = 1.75 * 2^8:
    # 1111 110. -2^-9: 1 0000 001. 2^-10, a tie, to 0. 3 * 2^-10, a tie, to 2. 2^-6: 0001 000. -0: 1 0000 000.
    first_elements = bytes([0x7C, 0xF0, 0x70, 0x72, 0x7E, 0x81, 0x00, 0x02, 0x08, 0x80]) + bytes(22)
    # Block 2, maximum 2 - 2^-23: X = 2^-8, and just below 512 saturates at 448. 1.875 is 480, a tie between 448 and
    # what is NaN here, saturates too. 1 is 256: 1111 000.
    second = [2 - 2**-23, -(2 - 2**-23), 1.875, 1.0]
    data = bytes([0x78, 0x77]) + first_elements + bytes([0x7E, 0xFE, 0x7E, 0x78])
    assert MXFP8.encode(torch.tensor(first + second)) == data
    decoded = [3.0, -1.0, 1.0, 1.25, 3.5, -(2.0**-16), 0.0, 2.0**-15, 2.0**-13, -0.0, *[0.0] * 22]
    assert MXFP8.decode(data, 36).tolist() == [*decoded, 1.75, -1.75, 1.75, 1.0]


def test_mxfp4_bytes_worked_by_hand() -> None:
    # Block 1, maximum 3: X = 2^(1 - 2) = 2^-1, scale byte 126 = 0x7E, an element is 2 x: 6, -2, then the ties
    # 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4, and -0.5, -0. Codes 0 to 7 stand for
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6.
    first = [3.0, -1.0, 0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 2.5, -0.25, -0.0] + [0.0] * 21
    # 7 and C, 0 and 2, 2 and 4, 4 and 6, 6 and 9, 8 and 0: the first of a pair in the lower half.
    first_elements = bytes([0xC7, 0x20, 0x42, 0x64, 0x96, 0x08]) + bytes(10)
    # Block 2, maximum 2 - 2^-23: X = 2^(0 - 2) = 2^-2, and just above -8 saturates at -6; 4 and 0.5 follow.
    second = [-(2 - 2**-23), 1.0, 0.125]
    data = bytes([0x7E, 0x7D]) + first_elements + bytes([0x6F, 0x01])
    assert MXFP4.encode(torch.tensor(first + second)) == data
    decoded = [3.0, -1.0, 0.0, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, -0.25, -0.0, *[0.0] * 21, -1.5, 1.0, 0.125]
    assert MXFP4.decode(data, 35).tolist() == decoded


@pytest.mark.parametrize(
    ("codec", "bits", "data"),
    [
        (MXFP8, 0x00000000, "0000"),  # zero: the smallest scale, 2^-127
        (MXFP8, 0x80000000, "0080"),
        (MXFP8, 0x00002000, "0001"),  # 2^-136 = 2^-127 * 2^-9, the smallest that it can hold
        (MXFP8, 0x00001000, "0000"),  # 2^-137: the tie goes to zero
        (MXFP8, 0x00001001, "0001"),
        (MXFP8, 0x80003000, "0082"),  # -1.5 * 2^-136: the tie goes to two
        (MXFP8, 0x00400000, "0038"),  # 2^-127 is the scale itself, the element 1
        (MXFP8, 0x007FFFFF, "0040"),  # the largest subnormal rounds to the element 2
        (MXFP8, 0x04FFFFFF, "017e"),  # just below 2^-117: scale 2^-126, saturates
        (MXFP8, 0x047FFFFF, "007e"),  # just below 2^-118: the smallest scale, saturates
        (MXFP8, 0xFF7FFFFF, "f6fe"),  # the lowest finite value: -448 * 2^119
        (MXFP4, 0x80000000, "0008"),
        (MXFP4, 0x00200000, "0001"),  # 2^-128, half of the smallest scale
        (MXFP4, 0x00100000, "0000"),  # 2^-129: the tie goes to zero
        (MXFP4, 0x80300000, "000a"),  # -0.75 * 2^-127: the tie goes to one
        (MXFP4, 0x01FFFFFF, "0107"),  # just below 2^-123: scale 2^-126, saturates
        (MXFP4, 0xFF7FFFFF, "fc0f"),  # -6 * 2^125
    ],
)
def test_mx_floats_at_the_ends_of_the_range(codec: Codec, bits: int, data: str) -> None:
    assert codec.encode(from_bits([bits])).hex() == data


def exponent_of_the_scale(block: list[Fraction], emax: int) -> int:
    """floor(log2(largest)) - emax, at least -127."""
    largest = max(map(abs, block))
    if not largest:
        return -127
    exponent = largest.numerator.bit_length() - largest.denominator.bit_length()
    return max(-127, exponent - (Fraction(2) ** exponent > largest) - emax)


@quickly
@given(chunks(longest=3 * BLOCK + 5))
def test_mxint8_follows_the_specification(chunk: Tensor) -> None:
    scales, elements = b"", b""
    for values in torch.split(chunk, BLOCK):
        block = [Fraction(value) for value in values.tolist()]
        exponent = exponent_of_the_scale(block, 0)
        scales += bytes([exponent + 127])
        for value in block:
            # round() of a Fraction goes to the nearest, ties to even
            elements += struct.pack("b", max(-127, min(127, round(value * 64 / Fraction(2) ** exponent))))
    assert MXINT8.encode(chunk) == scales + elements


@floats
@quickly
@given(chunk=chunks(longest=3 * BLOCK + 5))
def test_mx_floats_follow_the_specification(codec: Codec, magnitudes: list[Fraction], chunk: Tensor) -> None:
    emax = {MXFP8: 8, MXFP4: 2}[codec]
    scales, codes = b"", []
    for values in torch.split(chunk, BLOCK):
        block = [Fraction(value) for value in values.tolist()]
        exponent = exponent_of_the_scale(block, emax)
        scales += bytes([exponent + 127])
        for value, sign in zip(block, values.signbit().tolist(), strict=True):
            element = min(abs(value) / Fraction(2) ** exponent, magnitudes[-1])
            above = bisect_left(magnitudes, element)
            nearest = min((max(above - 1, 0), above), key=lambda code: (abs(magnitudes[code] - element), code % 2))
            codes.append(nearest | (sign << (7 if codec is MXFP8 else 3)))
    if codec is MXFP4:
        codes = [low | high << 4 for low, high in zip(codes[::2], [*codes[1::2], 0][: len(codes[::2])], strict=True)]
    assert codec.encode(chunk) == scales + bytes(codes)


@pytest.mark.parametrize("scale", [0, 1, 5, 9, 10, 127, 200, 246])
def test_mxfp8_decodes_every_element_exactly(scale: int) -> None:
    codes = [*range(0x7F), *range(0x80, 0xFF)]
    # Every block begins with 448, so that its scale is the one that it needs.
    parts = [codes[start : start + BLOCK - 1] for start in range(0, len(codes), BLOCK - 1)]
    elements = bytes(code for part in parts for code in (0x7E, *part))
    decoded = MXFP8.decode(bytes([scale]) * len(parts) + elements, len(elements))
    for code, value in zip(elements, decoded.tolist(), strict=True):
        assert Fraction(value) == E4M3[code & 0x7F] * (-1) ** (code >> 7) * Fraction(2) ** (scale - 127)
        assert str(value).startswith("-") == (code >= 0x80)


@pytest.mark.parametrize("scale", [0, 1, 2, 127, 252])
def test_mxfp4_decodes_every_element_exactly(scale: int) -> None:
    data = bytes([scale]) + bytes(low | (15 - low) << 4 for low in range(16))
    codes = [code for low in range(16) for code in (low, 15 - low)]
    for code, value in zip(codes, MXFP4.decode(data, BLOCK).tolist(), strict=True):
        assert Fraction(value) == E2M1[code & 7] * (-1) ** (code >> 3) * Fraction(2) ** (scale - 127)
        assert str(value).startswith("-") == (code >= 8)


def mxint8_bound(values: Tensor, largest: float) -> Tensor:
    return torch.full_like(values, max(largest * 2.0**-7, 2.0**-134))


def mxfp8_bound(values: Tensor, largest: float) -> Tensor:
    return (values / 8).clamp_(min=max(largest * 2.0**-18, 2.0**-137))


def mxfp4_bound(values: Tensor, largest: float) -> Tensor:
    return (values / 4).clamp_(min=max(largest / 16, 2.0**-129))


@pytest.mark.parametrize(
    ("codec", "bound"),
    [(MXINT8, mxint8_bound), (MXFP8, mxfp8_bound), (MXFP4, mxfp4_bound)],
    ids=["mxint8", "mxfp8", "mxfp4"],
)
@quickly
@given(chunk=chunks())
def test_errors_are_within_the_bounds_that_are_stated(
    codec: Codec, bound: Callable[[Tensor, float], Tensor], chunk: Tensor
) -> None:
    decoded = codec.decode(codec.encode(chunk), len(chunk)).double()
    for exact, got in zip(torch.split(chunk.double(), BLOCK), torch.split(decoded, BLOCK), strict=True):
        magnitudes = exact.abs()
        assert ((exact - got).abs() <= bound(magnitudes, magnitudes.max().item())).all()
        if codec is MXFP8:
            saturated = magnitudes > 1.75 * 2.0 ** (max(math.frexp(magnitudes.max().item())[1] - 1, -119))
            precise = magnitudes.div(16).clamp_(min=bound(torch.zeros(1), magnitudes.max().item()).item())
            assert ((exact - got).abs() <= precise)[~saturated].all()


@pytest.mark.parametrize("exponent", range(-30, 31, 10))
@pytest.mark.parametrize(("codec", "error"), [(MXINT8, 0.01), (MXFP8, 0.032), (MXFP4, 0.12)])
def test_small_and_large_gradients_lose_no_more_than_others(codec: Codec, error: float, exponent: int) -> None:
    gradient = torch.from_numpy(np.random.default_rng(0).standard_normal(CHUNK_VALUES)) * 10.0**exponent
    decoded = codec.decode(codec.encode(gradient.float()), CHUNK_VALUES).double()
    # The largest of 32 Gaussian values is about 2 standard deviations; where the next power of two lies decides the
    # rest. mxint8: uniform errors of 1/32 to 1/64, over sqrt(12): 0.75 to 0.84 percent. mxfp8: 1/8 of a power of two
    # over sqrt(12) is 2.4 percent of the values, and the largest saturate: 2.8 to 3.15. mxfp4: 11.2 to 11.9.
    assert (decoded - gradient).norm() / gradient.norm() < error


@codecs
@quickly
@given(chunk=chunks())
def test_decoding_what_was_decoded_before_changes_nothing(codec: Codec, chunk: Tensor) -> None:
    data = codec.encode(chunk)
    assert len(data) == codec.encoded_size(len(chunk))
    decoded = codec.decode(memoryview(data), len(chunk))
    assert decoded.dtype == torch.float32
    again = codec.decode(codec.encode(decoded), len(chunk))
    assert torch.equal(again.view(torch.int32), decoded.view(torch.int32))


@quickly
@given(chunks())
def test_fp32_changes_no_bit(chunk: Tensor) -> None:
    codec = get_codec("fp32")
    assert torch.equal(codec.decode(codec.encode(chunk), len(chunk)).view(torch.int32), chunk.view(torch.int32))


@codecs
@quickly
@given(chunk=chunks(longest=CHUNK_VALUES // 3))
def test_non_contiguous_chunks_encode_alike(codec: Codec, chunk: Tensor) -> None:
    strided = chunk.unsqueeze(1).expand(-1, 3).contiguous()[:, 1]
    assert codec.encode(strided) == codec.encode(chunk)


@codecs
@quickly
@given(chunk=chunks(longest=100))
def test_the_norm_is_exact(codec: Codec, chunk: Tensor) -> None:
    data = codec.encode(chunk)
    exact = sum((Fraction(value) ** 2 for value in codec.decode(data, len(chunk)).tolist()), Fraction(0))
    assert codec.norm_squared(data, len(chunk)) == exact * 2**298


@codecs
@pytest.mark.parametrize("bits", [0x7F7FFFFF, 0x3FFFFFFF])
def test_the_norm_of_a_chunk_of_the_largest_mantissas_is_exact(codec: Codec, bits: int) -> None:
    data = codec.encode(from_bits([bits]).repeat(CHUNK_VALUES))
    value = Fraction(codec.decode(data, CHUNK_VALUES)[0].item())
    assert codec.norm_squared(data, CHUNK_VALUES) == CHUNK_VALUES * value**2 * 2**298


@codecs
@pytest.mark.usefixtures("flushing")
def test_a_thread_that_flushes_subnormals_encodes_decodes_and_measures_alike(codec: Codec) -> None:
    chunk = from_bits([0x00400000, 0x80030000, 0x00800001, 0x00000001])
    encoded = codec.encode(chunk)
    torch.set_flush_denormal(False)
    assert codec.encode(chunk) == encoded
    norm, decoded = codec.norm_squared(encoded, 4), codec.decode(encoded, 4).view(torch.int32).tolist()
    torch.set_flush_denormal(True)
    assert codec.norm_squared(encoded, 4) == norm
    torch.set_flush_denormal(True)
    assert codec.decode(encoded, 4).view(torch.int32).tolist() == decoded
    assert decoded[0] == 0x00400000


@codecs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 40, CHUNK_VALUES - 1])
def test_what_is_not_finite_is_not_encoded(codec: Codec, value: float, position: int) -> None:
    chunk = torch.ones(CHUNK_VALUES)
    chunk[position] = value
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        codec.encode(chunk)


@codecs
@pytest.mark.parametrize("values", [1, 31, 32, 33, CHUNK_VALUES])
@pytest.mark.parametrize("change", [-1, 1])
def test_chunks_of_another_size_are_refused(codec: Codec, values: int, change: int) -> None:
    data = bytes(codec.encoded_size(values) + change)
    with pytest.raises(CommitmentError, match="bytes, not"):
        codec.decode(data, values)
    with pytest.raises(CommitmentError, match="bytes, not"):
        codec.norm_squared(data, values)


@pytest.mark.parametrize(
    ("name", "data", "values", "reason"),
    [
        ("fp32", struct.pack("<2I", 0, 0x7FC00000), 2, "NaN"),
        ("fp32", struct.pack("<2I", 0xFF800000, 0), 2, "infinity"),
        ("mxint8", bytes([0, 255]) + bytes(33), 33, "NaN"),
        ("mxint8", bytes([254, 0]) + bytes([0x80]) + bytes(32), 33, "-128"),
        ("mxint8", bytes([0, 254]) + bytes(32) + bytes([0x80]), 33, "-128"),
        ("mxint8", bytes([0, 1]) + bytes(32) + bytes([0xC1]), 33, "too large"),
        ("mxfp8", bytes([0, 255]) + bytes(32) + bytes([0x7E]), 33, "scale stands for NaN"),
        ("mxfp8", bytes([247, 0]) + bytes([0x7E]) + bytes(32), 33, "more than fp32"),
        ("mxfp8", bytes([0, 0, 0x7F]) + bytes(32), 33, "element stands for NaN"),
        ("mxfp8", bytes([0, 0]) + bytes(32) + bytes([0xFF]), 33, "element stands for NaN"),
        ("mxfp8", bytes([0, 1]) + bytes(32) + bytes([0xF7]), 33, "too large"),
        ("mxfp4", bytes([255, 0]) + bytes([0x07]) + bytes(16), 33, "scale stands for NaN"),
        ("mxfp4", bytes([0, 253]) + bytes(16) + bytes([0x07]), 33, "more than fp32"),
        ("mxfp4", bytes([1, 0]) + bytes([0x5D]) + bytes(16), 33, "too large"),
        ("mxfp4", bytes([0, 0]) + bytes(16) + bytes([0x10]), 33, "half byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_that_no_encoder_makes_are_refused(name: str, data: bytes, values: int, reason: str) -> None:
    codec = get_codec(name)
    with pytest.raises(CommitmentError, match=reason):
        codec.decode(data, values)
    with pytest.raises(CommitmentError, match=reason):
        codec.norm_squared(data, values)
    good = codec.encode(torch.ones(values))
    for run in (data + good + good, good + data + good, good + good + data):
        with pytest.raises(CommitmentError, match=reason):
            codec.decode(run, values, 3)
        with pytest.raises(CommitmentError, match=reason):
            codec.norm_squared(run, values, 3)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@codecs
@pytest.mark.parametrize("values", [1, 31, 32, 100])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_chunk_of_a_run_is_what_it_is_alone(codec: Codec, values: int, count: int) -> None:
    generator = torch.Generator().manual_seed(values)
    run = torch.randn(count, values, generator=generator)
    run *= torch.tensor([1e-30, 1.0, 0.0, 1e-20, 1e30][:count]).view(-1, 1)
    alone = [codec.encode(chunk) for chunk in run]
    data = codec.encode(run.view(-1), count)
    assert data == b"".join(alone)
    decoded = torch.cat([codec.decode(chunk, values) for chunk in alone])
    assert _same_bits(codec.decode(data, values, count), decoded)
    assert _same_bits(codec.decode_again(data, values, count), decoded)
    norms = [codec.norm_squared(chunk, values) for chunk in alone]
    assert codec.norm_squared(data, values, count) == sum(norms)
    assert len({*norms}) == count, "one norm for two chunks would hide a mistake"
    for wrong in (data[:-1], data + b"\0", alone[0] * (count + 1)):
        with pytest.raises(CommitmentError, match="bytes, not"):
            codec.decode(wrong, values, count)
        with pytest.raises(CommitmentError, match="bytes, not"):
            codec.norm_squared(wrong, values, count)


@codecs
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_not_encoded_in_a_run(codec: Codec, place: int) -> None:
    run = torch.ones(3, 40)
    run[place, 35] = torch.inf
    with pytest.raises(NonFiniteError, match="NaN or an infinity"):
        codec.encode(run.view(-1), 3)


@codecs
@quickly
@given(data=st.data(), values=st.integers(1, 3 * BLOCK))
def test_arbitrary_bytes_are_refused_or_finite(codec: Codec, data: st.DataObject, values: int) -> None:
    raw = data.draw(st.binary(max_size=2 * codec.encoded_size(values)))
    with suppress(CommitmentError):
        codec.norm_squared(raw, values)
    with suppress(CommitmentError):
        assert codec.decode(raw, values).isfinite().all()


@codecs
@settings(max_examples=200, deadline=None)
@given(chunk=chunks(longest=2 * BLOCK + 1), change=st.tuples(st.integers(0), st.integers(0, 255)))
def test_a_changed_byte_is_refused_or_decodes_to_what_encodes_to_it(
    codec: Codec, chunk: Tensor, change: tuple[int, int]
) -> None:
    data = bytearray(codec.encode(chunk))
    data[change[0] % len(data)] = change[1]
    try:
        decoded = codec.decode(data, len(chunk))
    except CommitmentError:
        with pytest.raises(CommitmentError):
            codec.norm_squared(data, len(chunk))
        return
    assert decoded.isfinite().all()
    assert codec.encode(decoded) == data
    exact = sum((Fraction(value) ** 2 for value in decoded.tolist()), Fraction(0))
    assert codec.norm_squared(data, len(chunk)) == exact * 2**298


def test_an_unknown_codec_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"no codec 'mxint9'.*fp32, mxfp4, mxfp8, mxint8"):
        get_codec("mxint9")


@codecs
@pytest.mark.parametrize("values", [1, CHUNK_VALUES, CHUNK_VALUES + 1, 3 * CHUNK_VALUES + 100, 17 * CHUNK_VALUES + 5])
def test_vectors_are_their_chunks_in_order(codec: Codec, values: int) -> None:
    vector = torch.arange(values, dtype=torch.float32) - 1000
    encoded = encode_vector(codec, vector)
    assert encoded == [codec.encode(vector[start : start + CHUNK_VALUES]) for start in range(0, values, CHUNK_VALUES)]
    decoded = decode_vector(codec, b"".join(encoded), values)
    expected = [codec.decode(chunk, min(CHUNK_VALUES, values - i * CHUNK_VALUES)) for i, chunk in enumerate(encoded)]
    assert torch.equal(decoded, torch.cat(expected))
    with pytest.raises(CommitmentError, match="bytes, not"):
        decode_vector(codec, b"".join(encoded) + b"\0", values)
