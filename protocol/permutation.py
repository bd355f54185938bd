"""In which order a run visits its prompts: a seeded permutation of the dataset, a new one every epoch."""

import hashlib
from functools import lru_cache


def prompt_index(position: int, size: int, seed: int) -> int:
    """Row of the dataset at a position of the run's endless order.

    Position p lies in epoch p // size, at place p % size of that epoch's permutation. Every index comes once an epoch.
    """
    assert position >= 0
    assert size >= 1
    epoch, place = divmod(position, size)
    return epoch_permutation(epoch, size, seed)[place]


@lru_cache(maxsize=2)
def epoch_permutation(epoch: int, size: int, seed: int) -> tuple[int, ...]:
    """Indices 0..size-1, sorted by SHA-256 of "seed/epoch/index": the same on every machine and Python."""

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()

    return tuple(sorted(range(size), key=key))
