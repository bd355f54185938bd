"""How fast each peer works, as the coordinator sees it, and what share of a round that is worth.

Seen are the groups that a peer worked on, over the time from the grant of its lease to its contribution: whatever a
peer says of itself counts for nothing, and one that reports early gets no more than twice an even share. Of a lease
that expired under a connected peer it is known that it was no faster than that. A lease that lived through a restart,
or came with the held-out measurement, tells nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

EVEN = 64
"""The pace of the median peer. Paces are whole numbers, so that their sum is exact."""

SLOWEST, FASTEST = EVEN // 2, 2 * EVEN
"""What a peer can be given, over an even share: half of it, or twice."""

FOLLOW = 0.3
"""Of the way from the speed to a new sample."""

MOST_CHANGE = 4.0
"""A sample counts as at most so many times the speed, and at least its inverse."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """What the speeds of a round are measured by."""

    median: float = 0.0
    """The lower median of the known speeds of the peers that were connected when it began; 0 if none was known."""
    fresh: int = EVEN
    """The pace of a peer of which nothing is known: the mean of the others', so that it gets an even share."""

    @classmethod
    def of(cls, speeds: dict[str, float], connected: Iterable[str]) -> Self:
        """Of a round that begins with these peers."""
        known = sorted(speeds[peer] for peer in connected if peer in speeds)
        if not known:
            return cls()
        median = known[(len(known) - 1) // 2]
        return cls(median, round(sum(_pace(speed, median) for speed in known) / len(known)))

    def pace(self, speed: float | None) -> int:
        """Of a peer with this speed, in `EVEN`ths of the median's, within bounds."""
        return self.fresh if speed is None or self.median <= 0.0 else _pace(speed, self.median)


@dataclass(slots=True)
class Waiting:
    """Peers that wait for work, oldest first, each with its pace; and the sum of these."""

    paces: dict[str, int] = field(default_factory=dict)
    total: int = 0

    def __len__(self) -> int:
        return len(self.paces)

    def add(self, peer: str, pace: int) -> None:
        """A peer waits; if it did already, at its old place."""
        self.total += pace - self.paces.get(peer, 0)
        self.paces[peer] = pace

    def discard(self, peer: str) -> None:
        """A peer does not wait any more, if it did."""
        self.total -= self.paces.pop(peer, 0)


def observe(speeds: dict[str, float], peer: str, groups: int, seconds: float) -> None:
    """Take into the speeds (groups a second, by peer), in place, that a peer worked on so many groups in that time."""
    if groups > 0 and seconds > 0.0:
        sample = groups / seconds
        speed = speeds.get(peer, sample)
        bounded = min(max(sample, speed / MOST_CHANGE), speed * MOST_CHANGE)
        speeds[peer] = speed + FOLLOW * (bounded - speed)


def observe_at_most(speeds: dict[str, float], peer: str, groups: int, seconds: float) -> None:
    """Likewise, that it did not even do so many groups in that time."""
    if seconds > 0.0 and groups / seconds < speeds.get(peer, float("inf")):
        observe(speeds, peer, groups, seconds)


def even_share(remaining: int, waiting: int) -> int:
    """Groups of what remains that each of so many waiting peers would get if they were all alike."""
    return -(-remaining // waiting)


def share_of(remaining: int, waiting: int, pace: int, total: int) -> int:
    """Groups of what remains that one of so many waiting peers gets, whose paces add up to `total`.

    In proportion to its pace; between half and twice an even share, and so that each of the others can have a group, as
    far as there are enough.
    """
    even = even_share(remaining, waiting)
    share = -(-remaining * pace // total)
    return min(max(share, -(-even // 2)), 2 * even, max(remaining - waiting + 1, 1))


def _pace(speed: float, median: float) -> int:
    return min(max(round(EVEN * speed / median), SLOWEST), FASTEST)
