"""Exact match."""

from typing import Any


def exact_match(*, completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion is the answer, apart from white space around it, else 0.0."""
    return [float(text.strip() == str(gold).strip()) for text, gold in zip(completions, answer, strict=True)]
