"""Whole vectors: runs of chunks, so many at a time as travel together."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.protocol.chunks import CHUNK_VALUES, chunk_count, chunk_values, equal_parts, runs
from hivegrpo.protocol.errors import CommitmentError


def encode_vector(codec: Codec, vector: Tensor) -> list[bytes]:
    """The encoded chunks of a flat fp32 vector, in order. NonFiniteError as `Codec.encode`."""
    chunks: list[bytes] = []
    for run, values in _vector_runs(vector.numel()):
        part = vector[run.start * CHUNK_VALUES :][: len(run) * values]
        chunks += equal_parts(codec.encode(part, len(run)), len(run))
    return chunks


def decode_vector(codec: Codec, data: bytes | memoryview, values: int) -> Tensor:
    """The flat fp32 vector of `values` values whose chunks, in order, make up `data`. CommitmentError as `decode`."""
    parts = [(run, length, len(run) * codec.encoded_size(length)) for run, length in _vector_runs(values)]
    total = sum(size for _, _, size in parts)
    if len(data) != total:
        raise CommitmentError(f"a vector of {values} values in {codec.name} has {total} bytes, not {len(data)}")
    vector, rest = torch.empty(values), memoryview(data)
    for run, length, size in parts:
        vector[run.start * CHUNK_VALUES :][: len(run) * length] = codec.decode(rest[:size], length, len(run))
        rest = rest[size:]
    return vector


def _vector_runs(values: int) -> Iterator[tuple[range, int]]:
    """The runs of a vector's chunks, and how many values each chunk of a run has."""
    counts = [chunk_values(values, index) for index in range(chunk_count(values))]
    return ((run, counts[run.start]) for run in runs(counts))
