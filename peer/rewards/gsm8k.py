"""The answer to a word problem: the number after "####", as in GSM8K (Cobbe et al., arXiv:2110.14168)."""

import re
from decimal import Decimal
from typing import Any

from hivegrpo.peer.rewards.base import Completion, text_of

MARKER = "####"

MAX_DIGITS = 32
"""A longer number is no answer."""

NUMBER = re.compile(
    r"""
    (?P<sign>(?<![0-9A-Za-z)])[-\u2212][ ]?)?   # a minus, but not the one of "7-5" or "x-5"
    [$€£]?[ ]?
    (?P<digits>
        (?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?
        |(?<![0-9A-Za-z.])\.[0-9]+
    )
    """,
    re.VERBOSE,
)

OPERATOR = r"(?:\*{1,2}|[/×]|\^\{?|\}\{|[eExX][-+]?)"
"""Between two numbers, it makes a product, quotient, power or other notation of them."""
BEFORE = re.compile(rf"[0-9]{OPERATOR}\Z")
AFTER = re.compile(rf"{OPERATOR}[0-9]")
_LONGEST_BEFORE = 4
_DIGIT = re.compile("[0-9]")
_REACH = 256
"""Characters that are looked at around a digit; more than those of a number that is an answer."""


def gsm8k_answer(*, completions: list[Completion], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where completion and answer end in the same number, else 0.0; None where the answer has no number.

    The number is the one after the first "####"; without that marker it is the last one in the text.
    """
    return [_score(text_of(text), str(gold)) for text, gold in zip(completions, answer, strict=True)]


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends in: 1234 for "#### 1,234", and for "The answer is $1,234.00.".

    None if it has none, or ends in what is more than a number: "9**9", "1/2", "2e5", or digits that are not ASCII's.
    """
    _, marker, after = text.partition(MARKER)
    if marker:
        text = after
    found = _first(text) if marker else _last(text)
    if found is None or _is_part(text, found):
        return None
    digits = found["digits"].replace(",", "")
    if len(digits.replace(".", "")) > MAX_DIGITS:
        return None
    return Decimal(f"-{digits}" if found["sign"] else digits)


def _score(completion: str, gold: str) -> float | None:
    expected = final_number(gold)
    return None if expected is None else float(final_number(completion) == expected)


def _is_part(text: str, number: re.Match[str]) -> bool:
    """Whether what stands directly before or after the digits belongs to the number."""
    start, end = number.span("digits")
    before, after = text[max(0, start - _LONGEST_BEFORE) : start], text[end : end + 1]
    return (
        before[-1:].isnumeric()
        or after.isnumeric()
        or BEFORE.search(before) is not None
        or AFTER.match(text, end) is not None
    )


def _first(text: str) -> re.Match[str] | None:
    """The first number, sought around the first digit."""
    digit = _DIGIT.search(text)
    return NUMBER.search(text, max(0, digit.start() - _REACH)) if digit else None


def _last(text: str) -> re.Match[str] | None:
    """The last number, sought around the last digit."""
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    last = None
    for match in NUMBER.finditer(text, max(0, end - _REACH), end):
        last = match
    return last
