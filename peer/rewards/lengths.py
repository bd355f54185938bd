"""Penalties on the number of tokens."""

from typing import Any

from hivegrpo.protocol.errors import ConfigError


def length_penalty(*, completion_ids: list[list[int]], max_length: int, **_: Any) -> list[float]:
    """-min(1, |y| / max_length) for a completion y of |y| tokens: the shorter the better, from 0 down to -1."""
    if max_length < 1:
        raise ConfigError(f"max_length is {max_length}.", "Give a number of tokens, 1 or more.")
    return [-min(1.0, len(ids) / max_length) for ids in completion_ids]


def soft_overlong_punishment(
    *, completion_ids: list[list[int]], max_completion_len: int, soft_punish_cache: int, **_: Any
) -> list[float]:
    """A penalty on completions that come near the longest allowed length (DAPO, arXiv:2503.14476, equation 13).

    With L = max_completion_len, C = soft_punish_cache and a completion y of |y| tokens:

        0                   where |y| <= L - C
        ((L - C) - |y|) / C where L - C < |y| <= L
        -1                  where L < |y|
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ConfigError(
            f"soft_punish_cache is {soft_punish_cache}, and max_completion_len {max_completion_len}.",
            "Give lengths in tokens, the first one at most the second.",
        )
    free = max_completion_len - soft_punish_cache
    return [_punishment(len(ids), free, max_completion_len, soft_punish_cache) for ids in completion_ids]


def _punishment(length: int, free: int, longest: int, cache: int) -> float:
    if length <= free:
        return 0.0
    return (free - length) / cache if length <= longest else -1.0
