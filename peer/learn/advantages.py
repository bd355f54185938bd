"""Group-relative advantages: how much better a completion is than its siblings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_OFFSET = 1e-4
"""Added to a group's standard deviation, as TRL does, so that a nearly constant group stays bounded."""


@dataclass(frozen=True)
class Advantages:
    """One advantage a completion, and what the rewards were like."""

    values: Tensor
    """(B,) advantages; 0 for a completion that nobody could score."""
    metrics: dict[str, float]


def weighted_rewards(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Total reward of each completion: r_i = sum_k w_k s_ik over the functions that scored it.

    scores: (B, K), NaN where function k did not score completion i. Returns (B,), NaN where none did.
    """
    total = (scores * torch.tensor(weights, dtype=scores.dtype)).nansum(dim=1)
    return total.masked_fill(scores.isnan().all(dim=1), torch.nan)


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: Literal["group", "none"]) -> Advantages:
    """Advantages within each group of G = num_generations consecutive completions.

    "group": A_i = (r_i - mean(r)) / (std(r) + 1e-4), with the unbiased std of the group (DeepSeekMath, section 4.1.2,
    arXiv:2402.03300). "none": A_i = r_i - mean(r), which does not favour questions that are nearly always or nearly
    never solved (Dr. GRPO, arXiv:2503.20783). Unscored completions (NaN) enter neither mean nor std and get 0.

    rewards: (B,) with B a multiple of G. Metrics: `reward` and `reward_std` over all scored completions, and
    `frac_reward_zero_std`, the share of completions whose group has equal rewards, so that it teaches nothing.
    """
    groups = rewards.view(-1, num_generations)
    std = _nanstd(groups, dim=1, keepdim=True)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    values = centred / (std + STD_OFFSET) if scale_rewards == "group" else centred
    metrics = {"frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).double().mean().item()}
    if not rewards.isnan().all():
        metrics["reward"] = rewards.nanmean().item()
        metrics["reward_std"] = _nanstd(rewards, dim=0).item()
    return Advantages(values.nan_to_num(nan=0.0).flatten(), metrics)


def _nanstd(values: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Unbiased standard deviation over the numbers among the NaNs; 0 for one number, NaN for none."""
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count == 0, torch.nan)
    return std if keepdim else std.squeeze(dim)
