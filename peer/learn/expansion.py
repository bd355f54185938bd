"""How much longer a tokenizer may make a text: its file comes from strangers, and a few lines of it can make a letter
gigabytes long, by steps that each make every letter ten.

Vocabularies are not looked at: no entry of them makes a text longer.
"""

import base64
import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from hivegrpo.peer.learn.base import unusable
from hivegrpo.protocol.errors import ConfigError

FILE = "tokenizer.json"
MOST_STEPS = 64
"""Of one part. A step that puts something around each letter makes a text longer by a constant, once per step."""
MOST_CHARACTERS = 16
"""That one step writes in place of what it finds, or in front."""
MOST_GROWTH = 256
"""Of all steps of a part, multiplied."""
MOST_SPECIAL = 256
"""Tokens that are put around a text."""
CHARSMAP_GROWTH = 64
"""Bytes that a character map may write for a character; in those of SentencePiece it is 33."""
PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
"""Of the file, and what a sequence of such steps calls them."""

Step = dict[str, Any]


def require_bounded(folder: Path) -> None:
    """ConfigError if the folder has a tokenizer.json that makes texts too long, or that cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        growths = {part: _growth(list(_steps(content.get(part), name))) for part, name in PARTS.items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise unusable("tokenizer", folder, error) from None
    for part, growth in growths.items():
        if growth > MOST_GROWTH:
            raise ConfigError(
                f"The {part} of {path} may make a text more than {MOST_GROWTH} times as long.",
                "No tokenizer needs that: choose another model.",
            )


def _steps(part: Step | None, name: str) -> Iterator[Step]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for each in part[name]:
            yield from _steps(each, name)
    else:
        yield part


def _growth(steps: list[Step]) -> int:
    """A bound of how many times as long steps make a text, one after the other; ValueError for steps that are odd."""
    if len(steps) > MOST_STEPS:
        raise ValueError(f"more than {MOST_STEPS} steps")
    return prod(map(_growth_of, steps))


def _growth_of(step: Step) -> int:
    match step["type"]:
        case "Replace":
            return _replaced(step["pattern"], len(_short(step["content"])))
        case "Prepend":
            return 1 + len(_short(step["prepend"]))
        case "ByteLevel":
            return 2  # what it writes for a byte has two bytes itself
        case "Precompiled":
            return _mapped(base64.b64decode(step["precompiled_charsmap"] or ""))
        case "TemplateProcessing":
            return _templated(step)
        case _:
            return 1


def _replaced(pattern: dict[str, str], written: int) -> int:
    """An expression, and an empty string, may match between any two letters."""
    found = len(pattern["String"]) if "String" in pattern else 0
    return max(1, -(-written // found)) if found else 1 + written


def _mapped(charsmap: bytes) -> int:
    """SentencePiece's: the size of a trie in 4 bytes, the trie, and the texts that it points into, each ended by 0."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
    if max(map(len, texts)) > CHARSMAP_GROWTH:
        raise ValueError(f"a character map that writes more than {CHARSMAP_GROWTH} bytes")
    return CHARSMAP_GROWTH


def _templated(step: Step) -> int:
    special = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    pieces = step["single"]
    if sum(special[piece["SpecialToken"]["id"]] for piece in pieces if "SpecialToken" in piece) > MOST_SPECIAL:
        raise ValueError(f"more than {MOST_SPECIAL} special tokens around a text")
    return max(1, sum("Sequence" in piece for piece in pieces))


def _short(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a step that writes more than {MOST_CHARACTERS} characters at once")
    return text
