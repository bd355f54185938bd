"""A rollout: groups of completions with rewards and advantages. It never leaves the peer."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from hivegrpo.peer.learn.advantages import group_advantages, weighted_rewards
from hivegrpo.peer.learn.data import PROMPT
from hivegrpo.peer.learn.sampler import Completion
from hivegrpo.peer.rewards.registry import Reward
from hivegrpo.protocol.config import GrpoSection


@dataclass(frozen=True)
class Rollout:
    """B sequences; the G of a group follow each other."""

    prompt_ids: list[list[int]]
    """Of each sequence: each prompt comes G times."""
    completions: list[Completion]
    texts: list[str]
    """The completions, as the rewards saw them."""
    rewards: Tensor
    """(B,) float64; NaN where no function gave one."""
    advantages: Tensor
    """(B,) float64."""
    metrics: dict[str, float]
    """Under TRL's names: means over the sequences, and the sum `num_tokens` of all tokens, prompts included."""

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that the loss sums over."""
        return sum(len(completion.token_ids) for completion in self.completions)


def make_rollout(
    rows: Sequence[dict[str, Any]],
    prompt_ids: Sequence[list[int]],
    completions: list[Completion],
    texts: list[str],
    rewards: Sequence[Reward],
    weights: Sequence[float],
    grpo: GrpoSection,
) -> Rollout:
    """Score the G completions of each row and compare them within their groups.

    rows, prompt_ids: one a group; completions, texts: G a group, in the same order.
    """
    copies = grpo.num_generations
    repeated = [row for row in rows for _ in range(copies)]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name != PROMPT}
    prompts = [row[PROMPT] for row in repeated]
    token_ids = [completion.token_ids for completion in completions]
    scores = torch.tensor(
        [reward.score(prompts, texts, token_ids, columns) for reward in rewards], dtype=torch.float64
    ).T
    totals = weighted_rewards(scores, weights)
    advantages = group_advantages(totals, copies, grpo.scale_rewards)
    all_prompt_ids = [ids for ids in prompt_ids for _ in range(copies)]
    metrics = advantages.metrics | _length_metrics(all_prompt_ids, completions) | _score_metrics(scores, rewards)
    return Rollout(all_prompt_ids, completions, texts, totals, advantages.values, metrics)


def _score_metrics(scores: Tensor, rewards: Sequence[Reward]) -> dict[str, float]:
    means = scores.nanmean(dim=0).tolist()
    return {f"rewards/{reward.name}/mean": mean for reward, mean in zip(rewards, means, strict=True) if not isnan(mean)}


def _length_metrics(prompt_ids: list[list[int]], completions: list[Completion]) -> dict[str, float]:
    lengths = [len(completion.token_ids) for completion in completions]
    terminated = [length for length, completion in zip(lengths, completions, strict=True) if completion.terminated]
    return {
        "num_tokens": float(sum(map(len, prompt_ids)) + sum(lengths)),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": 1.0 - len(terminated) / len(lengths),
        "completions/mean_terminated_length": sum(terminated) / max(1, len(terminated)),
    }
