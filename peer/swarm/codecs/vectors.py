"""Whole vectors, chunk by chunk."""

from itertools import pairwise

import torch
from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.protocol.chunks import CHUNK_VALUES, chunk_count, chunk_values
from hivegrpo.protocol.errors import CommitmentError


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
