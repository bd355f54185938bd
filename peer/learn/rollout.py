"""A rollout: groups of completions with rewards and advantages. It never leaves the peer."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from hivegrpo.peer.learn.advantages import Advantages, advantages_of
from hivegrpo.peer.learn.losses import Size
from hivegrpo.peer.learn.sampler import Completion
from hivegrpo.peer.rewards.base import Score
from hivegrpo.protocol.config import GrpoSection


@dataclass(frozen=True)
class Group:
    """G completions of one prompt, and what the K reward functions say of them."""

    row: dict[str, Any]
    prompt_ids: list[int]
    completions: list[Completion]
    texts: list[str]
    """The completions, as the rewards saw them."""
    scores: list[list[Score]]
    """K rows of G."""


@dataclass(frozen=True)
class Rollout:
    """B sequences; the G of a group follow each other."""

    version: int
    """Policy version that sampled."""
    prompt_ids: list[list[int]]
    """Of each sequence: each prompt comes G times."""
    completions: list[Completion]
    advantages: Tensor
    """(B, 1) or (B, longest completion) float64."""
    counted: list[bool]
    """Whether a sequence's tokens count in the loss; those that were cut may not."""
    old_logps: list[Tensor] | None = None
    """Of each sequence, (T,): the training pass's log-probabilities under the version that sampled, if known."""

    @property
    def size(self) -> Size:
        """What the loss is divided by."""
        tokens = sum(len(c.token_ids) for c, counted in zip(self.completions, self.counted, strict=True) if counted)
        return Size(len(self.completions), tokens)


def compare(groups: Sequence[Group], weights: Sequence[float], grpo: GrpoSection) -> Advantages:
    """Advantages of all completions of some groups, in order."""
    functions = range(len(weights))
    scores = [[score for group in groups for score in group.scores[k]] for k in functions]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    return advantages_of(scores, weights, lengths, grpo.num_generations, grpo.scale_rewards)


def make_rollout(groups: Sequence[Group], advantages: Tensor, version: int, grpo: GrpoSection) -> Rollout:
    """The rollout of some groups, with advantages as `compare` gives them."""
    completions = [completion for group in groups for completion in group.completions]
    return Rollout(
        version=version,
        prompt_ids=[group.prompt_ids for group in groups for _ in group.completions],
        completions=completions,
        advantages=advantages,
        counted=[c.terminated or not grpo.mask_truncated_completions for c in completions],
    )


def rollout_metrics(groups: Sequence[Group], names: Sequence[str], advantages: Advantages) -> dict[str, float]:
    """Metrics of everything that was sampled, under TRL's names: counts, lengths, entropy, and rewards by function."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [len(completion.token_ids) for completion in completions if completion.terminated]
    metrics = {
        "num_prompts": len(groups),
        "num_completions": len(completions),
        "num_completion_tokens": sum(lengths),
        "num_tokens": sum(lengths) + sum(len(group.prompt_ids) * len(group.completions) for group in groups),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
        "entropy": float(torch.cat([completion.entropies for completion in completions]).double().mean()),
    }
    if ended:
        metrics |= {
            "completions/mean_terminated_length": fmean(ended),
            "completions/min_terminated_length": min(ended),
            "completions/max_terminated_length": max(ended),
        }
    for k, name in enumerate(names):
        scores = [_total(score) for group in groups for score in group.scores[k] if score is not None]
        if scores:
            metrics[f"rewards/{name}/mean"] = fmean(scores)
            metrics[f"rewards/{name}/std"] = stdev(scores) if len(scores) > 1 else 0.0
    return {name: float(value) for name, value in metrics.items()} | advantages.metrics


def _total(score: float | Sequence[tuple[int, float]]) -> float:
    return sum(reward for _, reward in score) if isinstance(score, Sequence) else score
