"""The answer in a completion, as text, so that completions can vote: equal strings are the same answer.

In time linear in the text, and in the caller's process: what votes is only compared, never parsed as mathematics.
"""

from hivegrpo.peer.rewards.gsm8k import final_number

BOXED = "\\boxed{"
SPACES = frozenset(" \t\n\r")


def number_answer(text: str) -> str | None:
    """The number that a solution ends in (`gsm8k.final_number`), without trailing zeros; None if it has none."""
    number = final_number(text)
    if not number:
        return None if number is None else "0"
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def boxed_answer(text: str) -> str | None:
    """What stands in the last `\\boxed{}`, without white space; without one, the last number."""
    start = text.rfind(BOXED)
    if start < 0:
        return number_answer(text)
    depth, begin = 1, start + len(BOXED)
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return "".join(letter for letter in text[begin:place] if letter not in SPACES)
    return None
