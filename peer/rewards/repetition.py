"""A penalty on repeating oneself."""

from typing import Any

from hivegrpo.protocol.errors import ConfigError

LONGEST = 100
"""Tokens of an n-gram; keeps the time proportional to the completion's."""


def repetition_penalty(
    *, completion_ids: list[list[int]], ngram_size: int = 3, max_penalty: float = -1.0, **_: Any
) -> list[float]:
    """max_penalty times the share of repeated n-grams, (1 - distinct / all), over token ids.

    0 for a completion shorter than one n-gram (Yeo et al., arXiv:2502.03373, appendix C.2).
    """
    if not 1 <= ngram_size <= LONGEST or max_penalty > 0:
        raise ConfigError(
            f"ngram_size is {ngram_size}, and max_penalty {max_penalty}.",
            f"Give 1 to {LONGEST} tokens, and a penalty of at most 0.",
        )
    return [_repeated(ids, ngram_size) * max_penalty for ids in completion_ids]


def _repeated(ids: list[int], size: int) -> float:
    ngrams = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
