"""Exact match."""

from typing import Any

from hivegrpo.peer.rewards.base import Completion, text_of


def exact_match(*, completions: list[Completion], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 where the completion is the answer, apart from white space around it, else 0.0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(completion).strip() == str(gold).strip()) for completion, gold in pairs]
