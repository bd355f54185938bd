"""No encoding at all."""

import torch
from torch import Tensor

from hivegrpo.peer.floats import require_finite
from hivegrpo.peer.swarm.codecs.base import ChunkwiseCodec, as_tensor
from hivegrpo.peer.swarm.codecs.bits import INFINITE, MAGNITUDE, MANTISSA_BITS, norm_squared
from hivegrpo.protocol.errors import CommitmentError


class Float32(ChunkwiseCodec):
    """The values themselves, IEEE 754 binary32, little-endian."""

    name = "fp32"
    version = 1

    def encoded_size(self, values: int) -> int:
        return 4 * values

    def encode_chunk(self, chunk: Tensor) -> bytes:
        require_finite(chunk, "The vector to encode")
        return chunk.numpy().astype("<f4", copy=False).tobytes()

    def decode_chunk(self, data: bytes | memoryview, values: int) -> Tensor:
        chunk = as_tensor(data).view(torch.float32)
        if int((chunk.view(torch.int32) & MAGNITUDE).amax()) >> MANTISSA_BITS == INFINITE:
            raise CommitmentError("a chunk holds a NaN or an infinity")
        return chunk

    def chunk_norm_squared(self, data: bytes | memoryview, values: int) -> int:
        return norm_squared(self.decode_chunk(data, values))
