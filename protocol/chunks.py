"""How the flat gradient vector is cut: values into chunks, chunks into spans.

A chunk is the unit of encoding, commitment and checking; a span is the contiguous range of chunks that one
reducer reduces.
"""

from itertools import pairwise

CHUNK_VALUES = 16_384
"""Values in a chunk; the last chunk of a vector may hold fewer."""

SPAN_FRAME_BYTES = 128 << 10
"""A reduced span travels in frames of so many bytes; the last one is shorter."""


def chunk_count(values: int) -> int:
    """Chunks of a vector with that many values."""
    return -(-values // CHUNK_VALUES)


def chunk_values(values: int, index: int) -> int:
    """Values in chunk `index` of a vector of `values`."""
    assert 0 <= index < chunk_count(values)
    return min(CHUNK_VALUES, values - index * CHUNK_VALUES)


def split_evenly(chunks: int, parts: int) -> list[range]:
    """`parts` contiguous ranges that cover `chunks`, sizes differing by at most one, larger ones first."""
    size, extra = divmod(chunks, parts)
    bounds = [index * size + min(index, extra) for index in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(bounds)]
