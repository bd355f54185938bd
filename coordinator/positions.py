"""Which positions of the run's endless order of prompts are free: a cursor, and the ranges that came back.

Every position is in exactly one place: ahead of the cursor, among the returned ranges, in a live lease, held by a
contribution, or spent. So no prompt counts twice in an epoch.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Positions:
    """The free positions."""

    cursor: int = 0
    """The first position that was never leased."""
    returned: list[range] = field(default_factory=list)
    """Sorted, disjoint, not adjacent, all below the cursor."""

    def copy(self) -> "Positions":
        """An independent book, for trying out allotments."""
        return Positions(self.cursor, list(self.returned))

    def pick(self, count: int) -> range:
        """Up to `count` contiguous free positions: returned ones first, unless they would make less than half of it.

        Crumbs wait for a request of their size: one of them would otherwise keep a whole peer busy with little.
        """
        assert count >= 1
        fitting = next((run for run in self.returned if len(run) >= count), None)
        largest = fitting or max(self.returned, key=len, default=range(0))
        if 2 * len(largest) >= count:
            return largest[:count]
        return range(self.cursor, self.cursor + count)

    def take(self, run: range) -> None:
        """Mark free positions as leased; they are at the cursor, or within one returned range."""
        if run.start == self.cursor:
            self.cursor = run.stop
            return
        index = bisect_left(self.returned, run.start + 1, key=lambda free: free.start) - 1
        free = self.returned[index]
        assert index >= 0
        assert free.start <= run.start < run.stop <= free.stop
        rest = [range(free.start, run.start), range(run.stop, free.stop)]
        self.returned[index : index + 1] = [part for part in rest if part]

    def give_back(self, positions: Iterable[int]) -> None:
        """Free single positions, in ascending order."""
        for run in _runs(positions):
            self._give_back_run(run)

    def _give_back_run(self, run: range) -> None:
        index = bisect_left(self.returned, run.start, key=lambda free: free.start)
        low, high = index, index
        start, stop = run.start, run.stop
        if index > 0 and self.returned[index - 1].stop == start:
            low, start = index - 1, self.returned[index - 1].start
        if index < len(self.returned) and self.returned[index].start == stop:
            high, stop = index + 1, self.returned[index].stop
        self.returned[low:high] = [range(start, stop)]


def _runs(positions: Iterable[int]) -> Iterable[range]:
    if isinstance(positions, range) and positions.step == 1:
        if positions:
            yield positions
        return
    start = stop = None
    for position in positions:
        if start is not None and position == stop:
            stop = position + 1
            continue
        if start is not None and stop is not None:
            yield range(start, stop)
        start, stop = position, position + 1
    if start is not None and stop is not None:
        yield range(start, stop)
