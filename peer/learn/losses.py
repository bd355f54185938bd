"""The GRPO surrogate loss, in a form whose micro-batches, and whose peers, add up exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hivegrpo.protocol.config import GrpoSection


@dataclass(frozen=True)
class LossOutput:
    """A part of a contribution's loss, and sums over its tokens for the metrics."""

    loss: Tensor
    """Scalar, already divided by the whole contribution's normaliser."""
    sums: dict[str, Tensor]
    """Scalars under TRL's names; divided by the contribution's tokens they are its means."""


def contribution_weight(loss_type: str, num_sequences: int, num_tokens: int) -> int:
    """What a contribution counts in the average over peers: the normaliser of its loss, up to a constant.

    Tokens for dapo, sequences for grpo and dr_grpo. A loss that is a sum over its own weight, averaged with these
    weights, is the sum over everybody's weight: the loss of one machine that holds all the groups.
    """
    return num_tokens if loss_type == "dapo" else num_sequences


def grpo_loss(
    logps: Tensor,
    behaviour_logps: Tensor,
    reference_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    settings: GrpoSection,
    weight: int,
) -> LossOutput:
    """Clipped surrogate with a KL penalty, for some of the B sequences of a contribution.

    With the ratio rho = exp(logp - behaviour_logp), the loss of a token is

        l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3,
        k3 = exp(reference_logp - logp) - (reference_logp - logp) - 1,

    and a contribution with n sequences and m tokens (`weight` is the one of the two that its loss type counts) sums up

        dapo     1/m sum over its tokens of l                   (DAPO, arXiv:2503.14476)
        grpo     1/n sum over its sequences of the mean of l    (DeepSeekMath, arXiv:2402.03300)
        dr_grpo  1/(n max_completion_length) sum of l           (Dr. GRPO, arXiv:2503.20783)

    logps, behaviour_logps, reference_logps (None if and only if beta is 0): (B, T); mask: (B, T) bool, True at the
    completion's tokens; advantages: (B,).
    k3 is the estimator of http://joschu.net/blog/kl-approx.html; epsilon_high > epsilon is DAPO's clip-higher.
    """
    assert weight > 0
    assert (reference_logps is None) == (settings.beta == 0.0)
    advantage = advantages.to(logps.dtype).unsqueeze(1)
    # Filled before exp: padding may overflow, and inf * 0 is NaN.
    ratio = (logps - behaviour_logps).masked_fill(~mask, 0.0).exp()
    clipped = ratio.clamp(1.0 - settings.epsilon, 1.0 + settings.epsilon_high)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
    low = (ratio < 1.0 - settings.epsilon) & (advantage < 0.0)
    high = (ratio > 1.0 + settings.epsilon_high) & (advantage > 0.0)
    sums = {
        "clip_ratio/low_mean": (low & mask).sum(),
        "clip_ratio/high_mean": (high & mask).sum(),
        "clip_ratio/region_mean": ((low | high) & mask).sum(),
    }
    if reference_logps is not None:
        difference = (reference_logps - logps).masked_fill(~mask, 0.0)
        divergence = difference.exp() - difference - 1.0
        token_loss = token_loss + settings.beta * divergence
        sums["kl"] = divergence.detach().sum()
    return LossOutput(_add_up(token_loss.masked_fill(~mask, 0.0), mask, settings, weight), sums)


def _add_up(token_loss: Tensor, mask: Tensor, settings: GrpoSection, weight: int) -> Tensor:
    if settings.loss_type == "grpo":
        return (token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).sum() / weight
    scale = weight * settings.max_completion_length if settings.loss_type == "dr_grpo" else weight
    return token_loss.sum() / scale
