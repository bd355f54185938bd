"""How fast each peer uploads, from what the others saw of it: the coordinator measures, it does not believe.

Two things are seen in an attempt: how long a sender's chunks took to come (by each reducer), and how long a reducer's
span took (by each voter). In both a peer uploads to all at once, so what it sent to all of them over the time that one
of them saw is that observer's estimate. An observer's times add up to one estimate, a peer's sample is the median of
its observers', and a rate follows the samples slowly: fewer liars than half of the observers cannot move a sample out
of what the honest saw.
"""

from collections.abc import Iterator

from hivegrpo.coordinator.round import Attempt
from hivegrpo.protocol.chunks import SPAN_FRAME_BYTES

MIN_BYTES = 128 << 10
"""A transfer of less says more about latency and buffers than about bandwidth."""

MIN_SECONDS = 1e-6
"""No transfer counts as quicker, whatever its observer says: so every rate is a finite number."""

FOLLOW = 0.3
"""Of the way from the rate to a new sample."""

MOST_CHANGE = 4.0
"""A sample counts as at most so many times the rate, and at least its inverse."""

Sighting = tuple[str, str, int, float]
"""(peer, observer, bytes that the peer sent to everybody, seconds that the observer saw)."""


def follow(rates: dict[str, float], attempt: Attempt) -> None:
    """Take what was seen in a committed attempt into the rates (bytes a second, by peer), in place."""
    for peer, sample in samples(attempt).items():
        rate = rates.get(peer, sample)
        bounded = min(max(sample, rate / MOST_CHANGE), rate * MOST_CHANGE)
        rates[peer] = rate + FOLLOW * (bounded - rate)


def samples(attempt: Attempt) -> dict[str, float]:
    """The median of what the others saw of each peer's upload rate, bytes a second; the lower one of two."""
    seen: dict[str, dict[str, tuple[int, float]]] = {}
    for peer, observer, sent, seconds in _sightings(attempt):
        before = seen.setdefault(peer, {}).get(observer, (0, 0.0))
        seen[peer][observer] = before[0] + sent, before[1] + seconds
    estimates = {peer: sorted(sent / max(time, MIN_SECONDS) for sent, time in by.values()) for peer, by in seen.items()}
    return {peer: each[(len(each) - 1) // 2] for peer, each in estimates.items()}


def _sightings(attempt: Attempt) -> Iterator[Sighting]:
    ballot = attempt.winner()
    if ballot is None:
        return
    sizes = [size for _, size in ballot[1]]  # of the result; a contribution's span has the same, by the same codec
    reducers = [reducer.peer for reducer in attempt.plan.reducers]
    own = dict(zip(reducers, sizes, strict=True))
    for index, reducer in enumerate(reducers):
        if sizes[index] < MIN_BYTES:
            continue
        for sender, seconds in attempt.pushes.get(reducer, {}).items():
            if sender != reducer and seconds > 0.0:
                yield sender, reducer, sum(sizes) - own.get(sender, 0), seconds
        for voter, times in attempt.fetches.items():
            timed = sizes[index] - SPAN_FRAME_BYTES  # its time counts from the end of the first frame on
            if voter != reducer and timed >= MIN_BYTES and times and times[index] > 0.0:
                yield reducer, voter, timed * (len(attempt.roster) - 1), times[index]
