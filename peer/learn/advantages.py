"""Group-relative advantages: how much better a completion, or a step of it, is than its siblings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hivegrpo.peer.learn.metrics import finite
from hivegrpo.peer.rewards.base import Score

STD_OFFSET = 1e-4
"""Added to a standard deviation, as TRL does, so that nearly constant rewards stay bounded."""

Steps = dict[int, float]
"""Rewards of one completion by the index of the token at which they are given."""

Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Advantages:
    """What completions are worth, compared with their group."""

    values: Tensor
    """(B, 1) of completions, or (B, T) of tokens; 0 where nobody could score."""
    rewards: Tensor
    """(B,) total reward; NaN where no function gave one."""
    informative: Tensor
    """(B / G,) bool: whether the rewards of the group differ, so that it teaches something."""
    metrics: dict[str, float]
    """`reward`, `reward_std` and `frac_reward_zero_std`, under TRL's names."""


def advantages_of(
    scores: Sequence[Sequence[Score]],
    weights: Sequence[float],
    lengths: Sequence[int],
    num_generations: int,
    scale_rewards: Scale,
) -> Advantages:
    """Advantages from what K reward functions say of B completions of the given lengths, in tokens.

    Outcome supervision, unless a function gave rewards of steps; then process supervision, where a plain score is one
    more step, at the completion's last token.
    scores: K rows of B.
    """
    if not any(isinstance(score, Sequence) for row in scores for score in row):
        numbers = [[float("nan") if score is None else score for score in row] for row in scores]
        table = torch.tensor(numbers, dtype=torch.float64).T
        return group_advantages(weighted_rewards(table, weights), num_generations, scale_rewards)
    steps = weighted_steps(scores, weights, lengths)
    return step_advantages(steps, lengths, num_generations, scale_rewards)


def weighted_rewards(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Total reward of each completion: r_i = sum_k w_k s_ik over the functions that scored it.

    scores: (B, K), NaN where function k did not score completion i. Returns (B,), NaN where none did.
    """
    total = (scores * torch.tensor(weights, dtype=scores.dtype)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), torch.nan)


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: Scale) -> Advantages:
    """Outcome supervision: advantages within each group of G = num_generations consecutive completions.

    "group": A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the unbiased std of the group (DeepSeekMath, section 4.1.2,
    arXiv:2402.03300). "batch": the std of all B rewards instead (arXiv:2508.08221). "none": A_i = r_i - mean(r), which
    does not favour questions that are nearly always or nearly never solved (Dr. GRPO, arXiv:2503.20783). Unscored
    completions (NaN) enter neither mean nor std and get 0.

    rewards: (B,) with B a multiple of G. Metrics: `reward` and `reward_std` over all scored completions, and
    `frac_reward_zero_std`, the share of completions whose std is 0, so that they teach nothing.
    """
    groups = rewards.view(-1, num_generations)
    group_std = _nanstd(groups)
    std = _nanstd(rewards.view(1, -1)).expand_as(group_std) if scale_rewards == "batch" else group_std
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    values = centred if scale_rewards == "none" else centred / (std + STD_OFFSET)
    return _advantages(values.nan_to_num(nan=0.0).view(-1, 1), rewards, group_std, std)


def weighted_steps(scores: Sequence[Sequence[Score]], weights: Sequence[float], lengths: Sequence[int]) -> list[Steps]:
    """The rewards of each completion's steps, weighted and added up where several functions speak of the same token."""
    steps: list[Steps] = [{} for _ in lengths]
    for row, weight in zip(scores, weights, strict=True):
        for own, score, length in zip(steps, row, lengths, strict=True):
            given = score if isinstance(score, Sequence) else [] if score is None else [(length - 1, score)]
            for index, reward in given:
                own[index] = own.get(index, 0.0) + weight * reward
    return steps


def step_advantages(
    steps: Sequence[Steps], lengths: Sequence[int], num_generations: int, scale_rewards: Scale
) -> Advantages:
    """Process supervision (DeepSeekMath, section 4.1.3, arXiv:2402.03300).

    Each step's reward is normalised over all steps of all completions of its group (or of the batch, or only centred,
    by scale_rewards): r' = (r - mean(R)) / (std(R) + 1e-4). The advantage of a token is the sum of the r' of the steps
    that end at or after it.

    steps, lengths: B completions, in tokens. Returns values (B, max(lengths)); a completion's reward is the sum of its
    steps', NaN without one.
    """
    table = torch.full((len(steps), max(lengths)), torch.nan, dtype=torch.float64)
    for row, own in zip(table, steps, strict=True):
        for index, reward in own.items():
            row[index] = reward
    groups = table.view(-1, num_generations * table.shape[1])
    group_std = _nanstd(groups)
    std = _nanstd(table.view(1, -1)).expand_as(group_std) if scale_rewards == "batch" else group_std
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    scaled = centred if scale_rewards == "none" else centred / (std + STD_OFFSET)
    per_step = scaled.nan_to_num(nan=0.0).view_as(table)
    values = per_step.flip(1).cumsum(dim=1).flip(1)
    rewards = table.nansum(dim=1).masked_fill(table.isnan().all(dim=1), torch.nan)
    return _advantages(values, rewards, group_std, std)


def _advantages(values: Tensor, rewards: Tensor, group_std: Tensor, std: Tensor) -> Advantages:
    constant = torch.isclose(group_std, torch.zeros_like(group_std)) | group_std.isnan()
    metrics = {"frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).double().mean().item()}
    if not rewards.isnan().all():
        metrics["reward"] = rewards.nanmean().item()
        metrics["reward_std"] = _nanstd(rewards.view(1, -1)).item()
    return Advantages(values, rewards, ~constant.flatten(), finite(metrics))


def _nanstd(values: Tensor) -> Tensor:
    """Unbiased standard deviation of each row without its NaNs, (B, 1); 0 for one number, NaN for none."""
    count = (~values.isnan()).sum(dim=1, keepdim=True)
    squares = (values - values.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count == 0, torch.nan)
