"""Own scorers for tasks of reasoning-gym whose scorers there cannot be used.

Those of most hand the answer to `eval`, or to sympy's parser, which evaluates too. Here an answer is compared, or read
by plain parsers. The scores are those of reasoning-gym 0.1.25, except where a docstring says otherwise.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hivegrpo.peer.rewards.arithmetic import Expression, evaluate

Scorer = Callable[[str, str, Mapping[str, Any]], float]
"""(answer, gold, the metadata of the entry) -> 0 to 1; may raise anything on an answer that is none."""

CELLS = frozenset("0123456789")


def countdown(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the target from exactly the numbers given; 0.05 for another expression; 0.01 for anything else.

    Exactly, where reasoning-gym rounds.
    """
    found = _evaluate(answer)
    if found is None:
        return 0.01
    right = sorted(found.numbers) == sorted(metadata["numbers"]) and found.value == metadata["target"]
    return 1.0 if right else 0.05


def puzzle24(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for 24 from exactly the numbers given, else 0.01; reasoning-gym takes any four numbers, and rounds down."""
    found = _evaluate(answer)
    right = found is not None and found.value == 24 and sorted(found.numbers) == sorted(metadata["numbers"])
    return 1.0 if right else 0.01


def number_sorting(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for a list in order whose numbers are each within 1 of the gold one, else 0.0; NaN is no number."""
    expected, found = _numbers(gold), _numbers(answer)
    in_order = found == sorted(found, reverse=metadata["direction"] != "ascending")
    near = len(found) == len(expected) and all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    return float(in_order and near)


def spiral_matrix(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the gold text, 0.1 for it as a list."""
    if answer.strip() == gold.strip():
        return 1.0
    return 0.1 if " ".join(map(str, _list(answer))) == gold.strip() else 0.0


def binary_matrix(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the gold text, 0.1 for it as a list of lists."""
    if answer == gold:
        return 1.0
    return 0.1 if _table(answer) == gold else 0.0


def n_queens(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for one of the solutions, 0.5 for one as a list of lists."""
    if answer in metadata["valid_answers"]:
        return 1.0
    return 0.5 if _table(answer) in metadata["valid_answers"] else 0.0


def string_insertion(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the gold text, 0.1 for it as a list of characters."""
    if answer == gold:
        return 1.0
    return 0.1 if "".join(_list(answer)) == gold else 0.0


def bitwise_arithmetic(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the same integer, decimal, 0x, 0o or 0b, else 0.0. reasoning-gym evaluates the problem again for it."""
    return float(int(answer, 0) == int(gold, 0))


def game_of_life_halting(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the same truth value, else 0.0; reasoning-gym gives 1.0 to every text."""
    return float(answer.strip().lower() == gold.strip().lower())


def board(answer: str, gold: str, metadata: Mapping[str, Any]) -> float:
    """1.0 for the same rows of digits, 0.05 for other rows of digits, else 0.0.

    reasoning-gym compares with tuples, which JSON does not keep.
    """
    found = _rows(answer)
    if not all(CELLS.issuperset(row) for row in found):
        return 0.0
    return 1.0 if found == _rows(gold) else 0.05


OWN: Mapping[str, Scorer] = {
    "arc_agi": board,
    "binary_matrix": binary_matrix,
    "bitwise_arithmetic": bitwise_arithmetic,
    "countdown": countdown,
    "game_of_life_halting": game_of_life_halting,
    "n_queens": n_queens,
    "number_sorting": number_sorting,
    "puzzle24": puzzle24,
    "rearc": board,
    "spiral_matrix": spiral_matrix,
    "string_insertion": string_insertion,
}
"""Own scorers by task."""


def _evaluate(text: str) -> Expression | None:
    try:
        return evaluate(text)
    except (ValueError, ZeroDivisionError):
        return None


def _list(text: str) -> list[Any]:
    """A list as JSON or as Python writes it; ValueError if it is none."""
    value = json.loads(text.replace("'", '"'))
    if not isinstance(value, list):
        raise ValueError("not a list")
    return value


def _numbers(text: str) -> list[float]:
    return [float(item) for item in _list(text)]


def _table(text: str) -> str:
    return "\n".join(" ".join(map(str, row)) for row in _list(text))


def _rows(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.strip().split("\n")]
    return [line.split() for line in lines if not line.startswith("Shape: ")]
