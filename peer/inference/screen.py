"""Where a conversation is shown: answers on stdout, everything else on stderr."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hivegrpo.peer.inference.thinking import Piece
from hivegrpo.protocol.text import visible

SIDE_BY_SIDE = 100
"""Columns of a terminal from which on two answers fit beside each other."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"

Show = Callable[[int, Piece], None]
"""Takes the next piece of the answer with that number."""


class Screen:
    """On a terminal, answers are made visible, and thoughts dim. Elsewhere stdout gets what the model wrote as it is:
    a program wants the text itself, and there is nothing that would obey it."""

    def __init__(self) -> None:
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a byte that is no character ends no conversation
        self.asks = sys.stdin.isatty()
        """Whether somebody types."""
        self.is_terminal = sys.stdout.isatty()
        self._obeys = self.is_terminal and os.environ.get("TERM") != "dumb"
        self._dims = self._obeys and "NO_COLOR" not in os.environ

    def say(self, text: str) -> None:
        """About the conversation, not of it; parts may come from the model's files."""
        print(visible(text), file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """What follows begins on a line of its own."""
        print(flush=True)

    @contextmanager
    def answers(self, titles: Sequence[str]) -> Iterator[Show]:
        """Inside, the yielded function shows the answers, which come one after the other."""
        console = Console()
        if self._obeys and len(titles) > 1 and console.width >= SIDE_BY_SIDE:
            with _columns(titles, console) as show:
                yield show
            return
        current = 0

        def show_piece(number: int, piece: Piece) -> None:
            nonlocal current
            if number != current:
                self.end_line()
                self._label(titles[number])
                current = number
            self._write(piece)

        if len(titles) > 1:
            self._label(titles[0])
        yield show_piece
        self.end_line()

    def _label(self, title: str) -> None:
        self.say(f"[{title}]")

    def _write(self, piece: Piece) -> None:
        text = visible(piece.text) if self.is_terminal else piece.text
        print(f"{DIM}{text}{PLAIN}" if piece.thinking and self._dims else text, end="", flush=True)


@contextmanager
def _columns(titles: Sequence[str], console: Console) -> Iterator[Show]:
    """Answers side by side, while they come."""
    texts = [Text() for _ in titles]
    table = Table(expand=True)
    for title in titles:
        table.add_column(Text(visible(title)), overflow="fold", ratio=1)
    table.add_row(*texts)
    with Live(table, console=console, auto_refresh=False) as live:

        def show(number: int, piece: Piece) -> None:
            texts[number].append(visible(piece.text), style="dim" if piece.thinking else "")
            live.refresh()

        yield show
