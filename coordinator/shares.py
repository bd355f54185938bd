"""How many chunks each reducer reduces, so that the slowest upload ends soonest.

Among n peers, one that reduces s of S chunks uploads S - s of its own chunks, and its span n - 1 times:
S + (n - 2) s in all. Only the ratios of the rates matter.
"""

from collections.abc import Sequence
from itertools import accumulate

from hivegrpo.protocol.chunks import split_evenly

MOST_OF_MEAN = 2
"""Nobody reduces more than so many times the mean share: what one reducer can hold up or spoil is bounded."""

_HALVINGS = 60


def shares(chunks: int, rates: Sequence[float | None], peers: int) -> list[int]:
    """Chunks of each candidate, 0 for who should not reduce; they sum to `chunks`.

    `rates` are upload rates of the candidates (a None counts as the median of the others), of `peers` in the roster.
    The largest upload time, (chunks + (peers - 2) s) / rate, is as small as whole chunks and the cap allow. With one
    or two peers it does not depend on the shares, which are then even.
    """
    assert chunks > 0 < len(rates) <= peers
    if peers <= 2:
        return [len(span) for span in split_evenly(chunks, len(rates))]
    speeds = _filled(rates)
    most = max(1, MOST_OF_MEAN * chunks // len(rates))

    def seconds(candidate: int, share: int) -> float:
        return (chunks + (peers - 2) * share) / speeds[candidate]

    def below(limit: float) -> list[int]:
        """The most that each can take within a time."""
        return [min(most, max(0, int((limit * speed - chunks) / (peers - 2)))) for speed in speeds]

    early, late = 0.0, max(seconds(candidate, most) for candidate in range(len(rates)))
    for _ in range(_HALVINGS):
        middle = (early + late) / 2
        early, late = (middle, late) if sum(below(middle)) <= chunks else (early, middle)
    found = below(early)
    while sum(found) < chunks:  # few: those that would end at the same time, and what was rounded off
        room = (candidate for candidate in range(len(rates)) if found[candidate] < most)
        found[min(room, key=lambda candidate: (seconds(candidate, found[candidate] + 1), candidate))] += 1
    return found


def spans(sizes: Sequence[int]) -> list[range]:
    """Contiguous ranges of these sizes, from 0."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _filled(rates: Sequence[float | None]) -> list[float]:
    """Rates, with the lower median of the known ones in place of the unknown."""
    known = sorted(rate for rate in rates if rate is not None)
    middle = known[(len(known) - 1) // 2] if known else 1.0
    return [middle if rate is None else rate for rate in rates]
