"""Under which licence an export goes out: what is said, or what the base's own card says. Never a guess."""

import re
from pathlib import Path

from hivegrpo.peer.learn.base import CARD
from hivegrpo.protocol.errors import ConfigError

IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}", re.ASCII)
"""As the hub writes licences."""


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
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]  # it ships no types

    if not (folder / CARD).is_file():
        return None
    try:
        metadata = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, YAMLError):
        return None
    named = metadata.get("license")
    return named if isinstance(named, str) and IDENTIFIER.fullmatch(named) else None
