"""The answer to a word problem: the number after "####", as in GSM8K (Cobbe et al., arXiv:2110.14168)."""

import re
from decimal import Decimal
from typing import Any

MARKER = "####"

MAX_DIGITS = 32
"""A longer number is no answer."""

NUMBER = re.compile(
    r"""
    (?P<sign>(?<![0-9A-Za-z)])-[ ]?)?   # a minus, but not the one of "7-5" or "x-5"
    [$€£]?[ ]?
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)
    (?P<fraction>\.[0-9]+)?
    """,
    re.VERBOSE,
)


def gsm8k_answer(*, completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where completion and answer end in the same number, else 0.0; None where the answer has no number.

    The number is the one after the first "####"; without that marker it is the last one in the text.
    """
    return [_score(text, str(gold)) for text, gold in zip(completions, answer, strict=True)]


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends in: 1234 for "#### 1,234", and for "The answer is $1,234.00."."""
    _, marker, after = text.partition(MARKER)
    found = NUMBER.search(after) if marker else _last(NUMBER.finditer(text))
    if found is None or len(found["whole"]) + len(found["fraction"] or "") > MAX_DIGITS:
        return None
    digits = found["whole"].replace(",", "") + (found["fraction"] or "")
    return Decimal(f"-{digits}" if found["sign"] else digits)


def _score(completion: str, gold: str) -> float | None:
    expected = final_number(gold)
    return None if expected is None else float(final_number(completion) == expected)


def _last(matches: Any) -> Any:
    last = None
    for match in matches:
        last = match
    return last
