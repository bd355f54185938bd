"""How a chunk of a gradient travels: encodings that every machine decodes to the same bits.

Every operation works on one chunk of at most 16,384 values. That is below ATen's parallel grain of 32,768
(at::internal::GRAIN_SIZE), so it runs in the calling thread, whose floating-point state `keep_subnormals` holds,
and never in the threads of a pool, whose state nobody holds.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError


class Codec(ABC):
    """An encoding of chunks. `name` and `version` are pinned by the run; another `version` gives other bytes."""

    name: str
    version: int
    feedback: bool = False
    """Whether it loses so much that what is lost should be added to the next gradient (`hivegrpo.peer.feedback`)."""

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


def check_chunk(chunk: Tensor) -> None:
    """What `encode` may be given."""
    assert chunk.dtype == torch.float32
    assert chunk.dim() == 1
    assert 0 < chunk.numel() <= CHUNK_VALUES
