"""Under which licence an export goes out: what is said, or what the base's own card says. Never a guess."""

import re
from pathlib import Path

from hivegrpo.peer.learn.base import CARD
from hivegrpo.protocol.errors import ConfigError

IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}", re.ASCII)
"""As the hub writes licences."""
MOST_BYTES = 1 << 16
"""Of a card that are looked at."""
FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
LINE = re.compile(r"""^license:[ \t]+(["']?)([^\s"']+)\1[ \t]*$""", re.MULTILINE)
"""Found without a YAML parser: strangers write cards, and a few lines of YAML can name gigabytes."""


def check_license(text: str) -> str:
    """A licence's identifier; ConfigError if it is none."""
    if not IDENTIFIER.fullmatch(text):
        raise ConfigError(
            f"{text!r} is not the identifier of a licence.",
            "Write it as the hub does: apache-2.0, mit, llama3.2, other.",
        )
    return text


def base_license(folder: Path) -> str | None:
    """What the card in a base model's folder says; None if there is no card, or it says nothing that is usable."""
    if not (folder / CARD).is_file():
        return None
    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(MOST_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return None
    front = FRONT_MATTER.match(text)
    named = {found[1] for found in LINE.findall(front[1])} if front is not None else set()
    return named.pop() if len(named) == 1 and IDENTIFIER.fullmatch(min(named)) else None
