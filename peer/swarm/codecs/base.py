"""How a chunk of a gradient travels: encodings that every machine decodes to the same bits.

Every operation of torch works on one chunk of at most 16,384 values. That is below ATen's parallel grain of 32,768
(at::internal::GRAIN_SIZE), so it runs in the calling thread, whose floating-point state `keep_subnormals` holds,
and never in the threads of a pool, whose state nobody holds. NumPy's run in the calling thread, however long they are.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hivegrpo.protocol.chunks import CHUNK_VALUES, equal_parts
from hivegrpo.protocol.errors import CommitmentError


class Codec(ABC):
    """An encoding of chunks. `name` and `version` are pinned by the run; another `version` gives other bytes.

    Its methods take `count` equally long chunks, one after the other, at a time: a codec that starts its operations
    once for all of them is faster by what starting them takes.
    """

    name: str
    version: int
    feedback: bool = False
    """Whether it loses so much that what is lost should be added to the next gradient (`hivegrpo.peer.feedback`)."""

    @abstractmethod
    def encoded_size(self, values: int) -> int:
        """Bytes of a chunk of `values` values."""

    @abstractmethod
    def encode(self, chunks: Tensor, count: int = 1) -> bytes:
        """Bytes of chunks: fp32, 1-D, 1 to CHUNK_VALUES values each. NonFiniteError if one is NaN or infinite."""

    @abstractmethod
    def decode(self, data: bytes | memoryview, values: int, count: int = 1) -> Tensor:
        """Chunks of `values` values each, fp32[count * values], finite. CommitmentError if no encoder makes `data`."""

    def decode_again(self, data: bytes | memoryview, values: int, count: int = 1) -> Tensor:
        """As `decode`, of chunks that `norm_squared` or `decode` has taken; need not find what is wrong with others."""
        return self.decode(data, values, count)

    @abstractmethod
    def norm_squared(self, data: bytes | memoryview, values: int, count: int = 1) -> int:
        """Exact sum of the squares of the decoded values, in units of 2^-298. CommitmentError as `decode`.

        The unit is the square of the smallest subnormal fp32, so every square is an integer.
        """

    def check_size(self, data: bytes | memoryview, values: int, count: int = 1) -> int:
        """Bytes of each of `count` chunks of `values` values; CommitmentError unless `data` has so many of them."""
        size = self.encoded_size(values)
        if len(data) != count * size:
            what = "a chunk" if count == 1 else f"{count} chunks, each"
            raise CommitmentError(f"{what} of {values} values in {self.name} has {count * size} bytes, not {len(data)}")
        return size


class ChunkwiseCodec(Codec):
    """A codec that treats one chunk after the other."""

    @abstractmethod
    def encode_chunk(self, chunk: Tensor) -> bytes:
        """As `encode`, of one."""

    @abstractmethod
    def decode_chunk(self, data: bytes | memoryview, values: int) -> Tensor:
        """As `decode`, of one, of the right length."""

    @abstractmethod
    def chunk_norm_squared(self, data: bytes | memoryview, values: int) -> int:
        """As `norm_squared`, of one, of the right length."""

    def encode(self, chunks: Tensor, count: int = 1) -> bytes:
        check_chunks(chunks, count)
        return b"".join(map(self.encode_chunk, chunks.contiguous().view(count, -1)))

    def decode(self, data: bytes | memoryview, values: int, count: int = 1) -> Tensor:
        decoded = torch.empty(count, values)
        for row, chunk in zip(decoded, self._split(data, values, count), strict=True):
            row.copy_(self.decode_chunk(chunk, values))
        return decoded.view(-1)

    def norm_squared(self, data: bytes | memoryview, values: int, count: int = 1) -> int:
        return sum(self.chunk_norm_squared(chunk, values) for chunk in self._split(data, values, count))

    def _split(self, data: bytes | memoryview, values: int, count: int) -> list[memoryview]:
        self.check_size(data, values, count)
        return equal_parts(memoryview(data), count)


def as_tensor(data: bytes | memoryview) -> Tensor:
    """Bytes as a fresh uint8 tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def check_chunks(chunks: Tensor, count: int) -> None:
    """What `encode` may be given."""
    assert chunks.dtype == torch.float32
    assert chunks.dim() == 1
    assert chunks.numel() % count == 0
    assert 0 < chunks.numel() // count <= CHUNK_VALUES
