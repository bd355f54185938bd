"""Encodings of gradient chunks: bytes, bounds, exactness, and what is refused."""

import struct
from collections.abc import Iterator
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
from hivegrpo.peer.swarm.codecs.mxint8 import MxInt8
from hivegrpo.peer.swarm.codecs.registry import CODECS, get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector, encode_vector
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError, ConfigError

MXINT8 = MxInt8()

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
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
    elements = np.arange(-127, 128, dtype=np.int8)
    padded = np.pad(elements, (0, 1)).reshape(-1, BLOCK)
    for code in range(255):
        data = bytes([code]) * len(padded) + padded.tobytes()
        decoded = MXINT8.decode(data, padded.size).double().numpy()
        assert (decoded == padded.ravel() * 2.0 ** (code - 133)).all()


@quickly
@given(chunks(longest=3 * BLOCK + 5))
def test_mxint8_follows_the_specification(chunk: Tensor) -> None:
    scales, elements = b"", b""
    for start in range(0, len(chunk), BLOCK):
        block = [Fraction(value) for value in chunk[start : start + BLOCK].tolist()]
        largest = max(map(abs, block))
        exponent = max(-127, (largest.numerator.bit_length() - largest.denominator.bit_length()) if largest else -127)
        if Fraction(2) ** exponent > largest and exponent > -127:
            exponent -= 1
        scales += bytes([exponent + 127])
        for value in block:
            # round() of a Fraction goes to the nearest, ties to even
            elements += struct.pack("b", max(-127, min(127, round(value * 64 / Fraction(2) ** exponent))))
    assert MXINT8.encode(chunk) == scales + elements


@quickly
@given(chunks())
def test_mxint8_error_is_bounded_by_the_largest_of_the_block(chunk: Tensor) -> None:
    decoded = MXINT8.decode(MXINT8.encode(chunk), len(chunk))
    for exact, got in zip(torch.split(chunk, BLOCK), torch.split(decoded, BLOCK), strict=True):
        bound = max(exact.abs().max().item() * 2.0**-7, 2.0**-134)
        assert (exact.double() - got.double()).abs().max().item() <= bound


@pytest.mark.parametrize("exponent", range(-30, 31, 10))
def test_mxint8_keeps_small_and_large_gradients(exponent: int) -> None:
    gradient = torch.from_numpy(np.random.default_rng(0).standard_normal(CHUNK_VALUES)) * 10.0**exponent
    decoded = MXINT8.decode(MXINT8.encode(gradient.float()), CHUNK_VALUES).double()
    # Gaussian blocks have scales of about 2 standard deviations: uniform errors of 1/32 / sqrt(12), 0.8 percent.
    assert (decoded - gradient).norm() / gradient.norm() < 0.01


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
    ],
    ids=["fp32 nan", "fp32 infinity", "scale of nan", "first element", "last element"],
)
def test_bytes_that_no_encoder_makes_are_refused(name: str, data: bytes, values: int, reason: str) -> None:
    codec = get_codec(name)
    with pytest.raises(CommitmentError, match=reason):
        codec.decode(data, values)
    with pytest.raises(CommitmentError, match=reason):
        codec.norm_squared(data, values)


def test_an_unknown_codec_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"no codec 'mxint9'.*fp32, mxint8"):
        get_codec("mxint9")


@codecs
@pytest.mark.parametrize("values", [1, CHUNK_VALUES, CHUNK_VALUES + 1, 3 * CHUNK_VALUES + 100])
def test_vectors_are_their_chunks_in_order(codec: Codec, values: int) -> None:
    vector = torch.arange(values, dtype=torch.float32) - 1000
    encoded = encode_vector(codec, vector)
    assert encoded == [codec.encode(vector[start : start + CHUNK_VALUES]) for start in range(0, values, CHUNK_VALUES)]
    decoded = decode_vector(codec, b"".join(encoded), values)
    expected = [codec.decode(chunk, min(CHUNK_VALUES, values - i * CHUNK_VALUES)) for i, chunk in enumerate(encoded)]
    assert torch.equal(decoded, torch.cat(expected))
    with pytest.raises(CommitmentError, match="bytes, not"):
        decode_vector(codec, b"".join(encoded) + b"\0", values)
