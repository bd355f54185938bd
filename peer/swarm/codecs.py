"""How a chunk of a gradient travels: encodings that every machine decodes to the same bits.

Every operation works on one chunk of at most 16,384 values. That is below ATen's parallel grain of 32,768
(at::internal::GRAIN_SIZE), so it runs in the calling thread, whose floating-point state `keep_subnormals` holds,
and never in the threads of a pool, whose state nobody holds.
"""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from hivegrpo.peer.floats import NonFiniteError, keep_subnormals, require_finite
from hivegrpo.protocol.chunks import CHUNK_VALUES, chunk_count, chunk_values
from hivegrpo.protocol.errors import CommitmentError, ConfigError

BLOCK = 32
"""Values that share a scale in a Microscaling format."""

_MAGNITUDE = 0x7FFFFFFF
_MANTISSA_BITS = 23
_INFINITE = 255
"""Biased exponent of infinities and NaNs in fp32, and the code of NaN in E8M0."""

_UNITS = torch.tensor(
    [(code - 6) << _MANTISSA_BITS if code > 6 else 1 << (code + 16) for code in range(_INFINITE)], dtype=torch.int32
).view(torch.float32)
"""2^(code - 133), what an element 1 stands for under the E8M0 scale `code`; subnormal up to code 6, so made of bits."""


class Codec(ABC):
    """An encoding of chunks. `name` and `version` are pinned by the run; another `version` gives other bytes."""

    name: str
    version: int

    @abstractmethod
    def encoded_size(self, values: int) -> int:
        """Bytes of a chunk of `values` values."""

    @abstractmethod
    def encode(self, chunk: Tensor) -> bytes:
        """Bytes of a chunk: fp32, 1-D, 1 to CHUNK_VALUES values. NonFiniteError if one is NaN or infinite."""

    @abstractmethod
    def decode(self, data: bytes | memoryview, values: int) -> Tensor:
        """The chunk's values, fp32, all finite. CommitmentError if no encoder makes these bytes for `values`."""

    @abstractmethod
    def norm_squared(self, data: bytes | memoryview, values: int) -> int:
        """Exact sum of the squares of the decoded values, in units of 2^-298. CommitmentError as `decode`.

        The unit is the square of the smallest subnormal fp32, so every square is an integer.
        """

    def _bytes(self, data: bytes | memoryview, values: int) -> Tensor:
        """The chunk's bytes as a fresh uint8 tensor, after checking their number."""
        size = self.encoded_size(values)
        if len(data) != size:
            raise CommitmentError(f"a chunk of {values} values in {self.name} has {size} bytes, not {len(data)}")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Float32(Codec):
    """The values themselves, IEEE 754 binary32, little-endian."""

    name = "fp32"
    version = 1

    def encoded_size(self, values: int) -> int:
        return 4 * values

    def encode(self, chunk: Tensor) -> bytes:
        _check(chunk)
        require_finite(chunk, "The vector to encode")
        return chunk.numpy().astype("<f4", copy=False).tobytes()

    def decode(self, data: bytes | memoryview, values: int) -> Tensor:
        chunk = self._bytes(data, values).view(torch.float32)
        if int((chunk.view(torch.int32) & _MAGNITUDE).amax()) >> _MANTISSA_BITS == _INFINITE:
            raise CommitmentError("a chunk holds a NaN or an infinity")
        return chunk

    def norm_squared(self, data: bytes | memoryview, values: int) -> int:
        mantissa, exponent = _split(self.decode(data, values).view(torch.int32) & _MAGNITUDE)
        # A value is mantissa * 2^(exponent - 150). The squares, below 2^48, are summed for each exponent apart.
        return _shifted_sum(mantissa.long().square_(), exponent, factor=2, offset=-2)


class MxInt8(Codec):
    """MXINT8 of the OCP Microscaling Formats (MX) Specification v1.0: 8.25 bits a value.

    A block of 32 values x_j shares a scale X = 2^floor(log2(max |x_j|)), at least 2^-127, kept as E8M0 (biased by
    127). An element is q_j = clamp(round_half_even(64 x_j / X), -127, 127), and decodes to q_j X / 64, exactly.
    So |x_j - decoded| <= max(2^-7 max|x|, 2^-134).

    Layout: the scales of all blocks, one byte each, then all elements, one byte each; the last block may be shorter.
    -128, which the format has and no encoder makes, is refused like the scale that stands for NaN: with the largest
    scale it would decode to an infinity.
    """

    name = "mxint8"
    version = 1

    def encoded_size(self, values: int) -> int:
        return _blocks(values) + values

    def encode(self, chunk: Tensor) -> bytes:
        # Integer operations, and float ones whose operands and results are normal and exact: no floating-point state
        # of the thread matters here.
        _check(chunk)
        values = chunk.numel()
        blocks = pad(chunk, (0, -values % BLOCK)).view(-1, BLOCK)
        magnitude = blocks.view(torch.int32) & _MAGNITUDE
        scale = magnitude.amax(1, keepdim=True) >> _MANTISSA_BITS
        if int(scale.amax()) == _INFINITE:
            raise NonFiniteError("The vector to encode holds a NaN or an infinity.")
        mantissa, exponent = _split(magnitude)
        # |x| is mantissa * 2^(exponent - 150), X is 2^(scale - 127): so 64 |x| / X is mantissa * 2^(exponent - scale
        # - 17). A factor below 2^-126 may as well be 2^-126, since a mantissa has 24 bits.
        factor = ((exponent - scale).add_(110).clamp_(min=1) << _MANTISSA_BITS).view(torch.float32)
        elements = mantissa.float().mul_(factor).round_().clamp_(max=127.0).copysign_(blocks).to(torch.int8)
        return scale.to(torch.uint8).numpy().tobytes() + elements.view(-1)[:values].numpy().tobytes()

    def decode(self, data: bytes | memoryview, values: int) -> Tensor:
        keep_subnormals()
        scales, elements = self._parse(data, values)
        return (elements.float() * _UNITS[scales.int()].unsqueeze(1)).view(-1)[:values]

    def norm_squared(self, data: bytes | memoryview, values: int) -> int:
        scales, elements = self._parse(data, values)
        # An element is q * 2^(scale - 133), its square q^2 * 2^(2 scale + 32) units.
        return _shifted_sum(elements.int().square_().sum(1), scales, factor=2, offset=32)

    def _parse(self, data: bytes | memoryview, values: int) -> tuple[Tensor, Tensor]:
        """Scales, uint8[blocks], and elements, int8[blocks, 32], the last block padded with zeros."""
        raw = self._bytes(data, values)
        blocks = _blocks(values)
        scales, elements = raw[:blocks], raw[blocks:].view(torch.int8)
        if int(scales.amax()) == _INFINITE:
            raise CommitmentError("a block's scale stands for NaN")
        if int(elements.amin()) == -128:
            raise CommitmentError("an element is -128, which no encoder makes")
        return scales, pad(elements, (0, -values % BLOCK)).view(-1, BLOCK)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(), MxInt8())}


def get_codec(name: str) -> Codec:
    """The codec of that name; ConfigError if there is none."""
    if name not in CODECS:
        raise ConfigError(f"There is no codec {name!r}.", f"Choose one of: {', '.join(sorted(CODECS))}.")
    return CODECS[name]


def encode_vector(codec: Codec, vector: Tensor) -> list[bytes]:
    """The encoded chunks of a flat fp32 vector, in order. NonFiniteError as `Codec.encode`."""
    return [codec.encode(chunk) for chunk in torch.split(vector, CHUNK_VALUES)]


def decode_vector(codec: Codec, data: bytes | memoryview, values: int) -> Tensor:
    """The flat fp32 vector of `values` values whose chunks, in order, make up `data`. CommitmentError as `decode`."""
    counts = [chunk_values(values, index) for index in range(chunk_count(values))]
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + codec.encoded_size(count))
    view = memoryview(data)
    if len(view) != ends[-1]:
        raise CommitmentError(f"a vector of {values} values in {codec.name} has {ends[-1]} bytes, not {len(view)}")
    vector = torch.empty(values, dtype=torch.float32)
    for out, (low, high) in zip(torch.split(vector, CHUNK_VALUES), pairwise(ends), strict=True):
        out.copy_(codec.decode(view[low:high], out.numel()))
    return vector


def _check(chunk: Tensor) -> None:
    assert chunk.dtype == torch.float32
    assert chunk.dim() == 1
    assert 0 < chunk.numel() <= CHUNK_VALUES


def _blocks(values: int) -> int:
    return -(-values // BLOCK)


def _split(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (m, e) for the bits of non-negative finite fp32 values m * 2^(e - 150): 0 <= m < 2^24, 1 <= e <= 254."""
    exponent = (magnitude >> _MANTISSA_BITS).clamp_(min=1)
    return magnitude - ((exponent - 1) << _MANTISSA_BITS), exponent


def _shifted_sum(terms: Tensor, exponents: Tensor, *, factor: int, offset: int) -> int:
    """Exact sum of terms * 2^(factor * exponent + offset); a chunk of terms must add up to less than 2^63."""
    sums = torch.zeros(256, dtype=torch.int64).index_add_(0, exponents.long(), terms.long())
    return sum(total << (factor * exponent + offset) for exponent, total in enumerate(sums.tolist()) if total)
