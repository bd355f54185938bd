"""What a model writes before it answers: text between tags, which may come split over any number of pieces."""

from collections.abc import Iterator
from typing import NamedTuple

TAGS = {
    "<think>": "</think>",  # Qwen, DeepSeek, and most others
    "[THINK]": "[/THINK]",  # Mistral
    "<seed:think>": "</seed:think>",
    "◁think▷": "◁/think▷",  # Kimi
}
TAG_TEXTS = frozenset((*TAGS, *TAGS.values()))


class Piece(NamedTuple):
    """A part of an answer."""

    text: str
    thinking: bool
    """Whether it is thought, its tags included, and not said."""


class ThinkingSplitter:
    """Tells thoughts from what is said. All pieces together are the text that was fed."""

    def __init__(self, prompt: str) -> None:
        """prompt: what the model reads, or its end; some templates open the first thought themselves."""
        opened = [tag for tag in TAGS if prompt.rstrip().endswith(tag)]
        self._close = TAGS[opened[0]] if opened else None
        """What ends the thought that is open."""
        self._rest = ""
        """What may be the beginning of a tag."""

    def feed(self, text: str) -> Iterator[Piece]:
        """What is sure after more text."""
        self._rest += text
        while (tag := self._next_tag()) is not None:
            before, _, self._rest = self._rest.partition(tag)
            if self._close is None:
                yield from _piece(before, False)
                yield Piece(tag, True)
                self._close = TAGS[tag]
            else:
                yield Piece(before + tag, True)
                self._close = None
        held = max((_overlap(self._rest, tag) for tag in self._awaited()), default=0)
        sure, self._rest = self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
        yield from _piece(sure, self._close is not None)

    def end(self) -> Iterator[Piece]:
        """What is left."""
        yield from _piece(self._rest, self._close is not None)
        self._rest = ""

    def _awaited(self) -> tuple[str, ...]:
        return tuple(TAGS) if self._close is None else (self._close,)

    def _next_tag(self) -> str | None:
        found = [(place, tag) for tag in self._awaited() if (place := self._rest.find(tag)) >= 0]
        return min(found)[1] if found else None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that a tag begins with, short of the whole tag."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)


def _piece(text: str, thinking: bool) -> Iterator[Piece]:
    if text:
        yield Piece(text, thinking)
