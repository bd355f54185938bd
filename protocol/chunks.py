"""How the flat gradient vector is cut: values into chunks, chunks into spans.

A chunk is the unit of encoding, commitment and checking; a span is the contiguous range of chunks that one
reducer reduces.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

B = TypeVar("B", bytes, memoryview)

CHUNK_VALUES = 16_384
"""Values in a chunk; the last chunk of a vector may hold fewer."""

RUN_CHUNKS = 8
"""A sender's chunks travel so many in a frame, and are computed with together."""

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


def runs(values: Sequence[int], most: int = RUN_CHUNKS) -> Iterator[range]:
    """Consecutive chunks, at most so many, that have equally many values each; `values` says how many each has.

    So the vector's last chunk, if it is shorter, is a run of its own.
    """
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or end - start == most or values[end] != values[start]:
            yield range(start, end)
            start = end


def equal_parts(data: B, count: int) -> list[B]:
    """`data`, whose length is a multiple of `count`, in `count` equally long parts."""
    size = len(data) // count
    return [data[start : start + size] for start in range(0, len(data), size)]
