"""Strangers' text on a terminal: shown, never obeyed."""

LAYOUT = frozenset("\n\t\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}")
"""What `str.isprintable` refuses and text needs."""
MAX_REASON_CHARS = 300
"""Of what others say went wrong."""


def visible(text: str) -> str:
    """Text without anything else that a terminal would obey, or that would show it in another order."""
    return "".join(letter if letter in LAYOUT or letter.isprintable() else "?" for letter in text)


def visible_line(text: str) -> str:
    """The same on one line, so that it cannot look like a line of its own; each letter takes one place as before."""
    return visible(text).replace("\n", " ")


def printable(text: str) -> str:
    """A remote's words in a sentence of ours: short, on one line, and without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_REASON_CHARS])
