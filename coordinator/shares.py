"""How many chunks each reducer reduces, so that the spans are with everybody soonest.

A round uploads twice, and nobody begins with the second before all have ended the first: its contribution, which is of
the same size for all, and its span, which goes to all others. So spans are in proportion to the upload rates. Only the
ratios of the rates matter.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from itertools import accumulate

from hivegrpo.protocol.chunks import split_evenly

MOST_OF_MEAN = 2
"""Nobody reduces more than so many times the mean share: what one reducer can hold up or spoil is bounded."""

NOISE = 1.125
"""Rates are told from their median by what they differ from it beyond this factor: equal links, measured in a few
rounds, differ by as much, and the largest span is what all wait for."""

_HALVINGS = 60


def shares(chunks: int, rates: Sequence[float | None], peers: int) -> list[int]:
    """Chunks of each candidate, 0 for who should not reduce; they sum to `chunks`.

    `rates` are upload rates of the candidates (a None counts as the median of the others), of `peers` in the roster.
    The largest share / rate is as small as whole chunks and the cap allow. With one or two peers, whose upload does not
    depend on the shares, these are even.
    """
    assert chunks > 0 < len(rates) <= peers
    if peers <= 2:
        return [len(span) for span in split_evenly(chunks, len(rates))]
    speeds = _told_apart(rates)
    most = max(1, MOST_OF_MEAN * chunks // len(rates))

    def below(limit: float) -> list[int]:
        """The most that each can take within a time."""
        return [min(most, int(limit * speed)) for speed in speeds]

    found = [0] * len(rates)
    early, late = 0.0, max(most / speed for speed in speeds)
    for _ in range(_HALVINGS):
        if chunks - sum(found) <= len(rates):
            break
        middle = (early + late) / 2
        if sum(tried := below(middle)) <= chunks:
            early, found = middle, tried
        else:
            late = middle
    ends = [((found[each] + 1) / speed, each) for each, speed in enumerate(speeds) if found[each] < most]
    heapify(ends)
    for _ in range(chunks - sum(found)):  # each goes to who is through with it first
        each = ends[0][1]
        found[each] += 1
        if found[each] < most:
            heapreplace(ends, ((found[each] + 1) / speeds[each], each))
        else:
            heappop(ends)
    return found


def spans(sizes: Sequence[int]) -> list[range]:
    """Contiguous ranges of these sizes, from 0."""
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def _told_apart(rates: Sequence[float | None]) -> list[float]:
    """Rates, moved to the lower median of the known ones by up to the noise; the median in place of the unknown."""
    known = sorted(rate for rate in rates if rate is not None)
    middle = known[(len(known) - 1) // 2] if known else 1.0
    return [middle if rate is None else min(max(middle, rate / NOISE), rate * NOISE) for rate in rates]
