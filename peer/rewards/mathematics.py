"""The answer to a mathematics problem, compared as mathematics: math-verify, without its clock.

Importing this imports sympy, and a completion can keep sympy busy for ever: only a process that can be killed does it.
"""

import logging
import re
from functools import lru_cache
from typing import Any

import math_verify as library  # type: ignore[import-untyped]  # it ships no types

from hivegrpo.peer.rewards.base import Completion, text_of
from hivegrpo.peer.rewards.gsm8k import MARKER

MAX_TEXT = 4096
"""Characters of a completion that are looked at, from its end: the patterns of math-verify are not linear."""

# It warns that without its alarm signal someone else has to watch the clock, which is what the pool does.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_TARGETS = (library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig())
_DELIMITER = re.compile(r"\$|\\boxed|\\\(|\\\[")
_NUMBER = re.compile(r"-?[€£]?[0-9]+(?:[ ,][0-9]{3})*(?:\.[0-9]+)?")
_PROSE = re.compile(r"[A-Za-z]{3,}|[^\\]*(?<![A-Za-z])[A-Za-z]{2,} +[A-Za-z]{2,}[^\\]*")


def math_verify(*, completions: list[Completion], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion's answer equals the gold one, else 0.0; None where no mathematics is found in the gold.

    The completion's answer is its last `\\boxed{}`, else what it calls its answer, else its last formula or number
    (sought by math-verify in the last `MAX_TEXT` characters). Gold is a number, LaTeX with or without delimiters, or a
    solution in the form of GSM8K, where what counts stands after "####".
    """
    return [_score(text_of(text), str(gold)) for text, gold in zip(completions, answer, strict=True)]


def _score(completion: str, gold: str) -> float | None:
    expected = _parse_gold(gold)
    if not expected:
        return None
    found = _parse(completion[-MAX_TEXT:])
    return float(bool(found) and library.verify(list(expected), found, timeout_seconds=None))


@lru_cache(maxsize=64)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    _, marker, after = gold.partition(MARKER)
    text = (after if marker else gold).strip()
    return () if len(text) > MAX_TEXT else tuple(_parse(_delimited(text)))


def _delimited(text: str) -> str:
    """Bare LaTeX in dollars, or the first number in it would be taken for it; numbers and prose as they are."""
    bare = not (_DELIMITER.search(text) or _NUMBER.fullmatch(text) or _PROSE.fullmatch(text))
    return f"${text}$" if bare else text


def _parse(text: str) -> list[Any]:
    """What it stands for; empty if it cannot be parsed, and never the text itself, so that two such do not match."""
    parsed: list[Any] = library.parse(
        text, extraction_config=_TARGETS, fallback_mode="no_fallback", parsing_timeout=None
    )
    return parsed


# The first comparison of formulas loads more of sympy, and that must not be taken out of a completion's time.
_score("$x + 1$", "$1 / x$")
