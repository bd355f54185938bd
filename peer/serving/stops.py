"""Stop strings: the text before the one that is complete first, however the text is cut into pieces."""

from collections.abc import Sequence


class StopCutter:
    """Passes text on as it comes, except for an end that may yet become a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none of them empty."""
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be passed on, and whether a stop string has been reached: nothing is fed after that."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            return self._held[:start], True
        safe = len(self._held) - self._doubtful()
        passed, self._held = self._held[:safe], self._held[safe:]
        return passed, False

    def rest(self) -> str:
        """What is still held when the text has ended without a stop string."""
        return self._held

    def _doubtful(self) -> int:
        """Length of the longest end that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
