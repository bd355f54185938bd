"""The surrogate losses of GRPO and its descendants, in a form whose micro-batches, and whose peers, add up exactly."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hivegrpo.peer.learn.metrics import Tally
from hivegrpo.protocol.config import GrpoSection


@dataclass(frozen=True)
class LossInputs:
    """Some of the B sequences of a contribution; what lies outside the mask counts for nothing, whatever it is."""

    logps: Tensor
    """(B, T) log-probabilities under the policy that is differentiated."""
    behaviour_logps: Tensor
    """(B, T) those that the sampler had."""
    old_logps: Tensor | None
    """(B, T) those that the training pass had under the policy that sampled; None takes the sampler's word."""
    reference_logps: Tensor | None
    """(B, T) under the reference; None if and only if beta is 0."""
    advantages: Tensor
    """(B, 1) of completions, or (B, T) of their tokens."""
    mask: Tensor
    """(B, T) bool, True at tokens that count."""
    entropy_mask: Tensor | None = None
    """(B, T) bool, True at tokens that the policy term counts; None is all."""


@dataclass(frozen=True)
class LossOutput:
    """A part of a contribution's loss."""

    loss: Tensor
    """Scalar, already divided by the whole contribution's normaliser."""
    tally: Tally = field(default_factory=Tally)
    """Metrics under TRL's names."""


@dataclass(frozen=True)
class Size:
    """How much there is in a contribution."""

    sequences: int
    tokens: int
    """Those that count in the loss."""

    def normaliser(self, settings: GrpoSection) -> int:
        """What the sum over the contribution is divided by."""
        match settings.loss_type:
            case "grpo":
                return self.sequences
            case "dr_grpo":
                return self.sequences * settings.max_completion_length
            case "dapo" | "bnpo" | "cispo":
                return max(1, self.tokens)

    def weight(self, settings: GrpoSection) -> int:
        """What the contribution counts in the average over peers.

        A loss that is a sum over its own weight, averaged with these weights, is the sum over everybody's weight: the
        loss of one machine that holds all the groups. bnpo alone is divided by something else than its weight: it is
        the average over local batches, as in TRL over the micro-batches, and here a peer's contribution is one.
        """
        return self.tokens if settings.loss_type in ("dapo", "cispo") else self.sequences


def grpo_loss(inputs: LossInputs, settings: GrpoSection, size: Size) -> LossOutput:
    """Loss and metrics of some of the sequences of a contribution of the given size.

    With the ratio rho = exp(logp - old_logp), or exp of that difference's mean over the sequence
    (importance_sampling_level "sequence": GSPO, arXiv:2507.18071), the policy term of a token is

        -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A)

    (epsilon_high > epsilon is DAPO's clip-higher, arXiv:2503.14476; delta is INTELLECT-2's two-sided clipping,
    arXiv:2505.07291), and for cispo -stop_gradient(min(rho, epsilon_high)) A logp (MiniMax-M1, arXiv:2506.13585).
    It is left out where `off_policy_mask` or the entropy mask says so, and multiplied by `sampler_correction`. Then

        + beta k3,  k3 = exp(reference_logp - logp) - (reference_logp - logp) - 1

    (http://joschu.net/blog/kl-approx.html), times rho with use_bias_correction_kl (DeepSeek-V3.2, arXiv:2512.02556).
    For a contribution of n sequences with m tokens this adds up to

        grpo         1/n sum over its sequences of the mean over the tokens  (DeepSeekMath, arXiv:2402.03300)
        dr_grpo      1/(n max_completion_length) sum over its tokens         (Dr. GRPO, arXiv:2503.20783)
        dapo, cispo  1/m sum over its tokens, averaged over peers by m       (DAPO, arXiv:2503.14476)
        bnpo         1/m sum over its tokens, averaged over peers by n
    """
    assert (inputs.reference_logps is None) == (settings.beta == 0.0)
    mask, tally = inputs.mask, Tally()
    advantages = inputs.advantages.to(inputs.logps.dtype)
    old_logps = inputs.behaviour_logps if inputs.old_logps is None else inputs.old_logps
    # Filled before exp: padding may overflow, and inf * 0 is NaN.
    log_ratio = (inputs.logps - old_logps).masked_fill(~mask, 0.0)
    if settings.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / _lengths(mask)
    ratio = log_ratio.exp()
    token_loss = _policy_loss(ratio, advantages, inputs, settings, tally)
    if settings.off_policy_mask_threshold is not None:
        kept = off_policy_mask(inputs, settings.off_policy_mask_threshold)
        token_loss = token_loss * kept
        tally.mean("off_policy_mask/kept", kept, mask)
    if inputs.entropy_mask is not None:
        token_loss = token_loss * inputs.entropy_mask
    if settings.importance_sampling_correction:
        token_loss = token_loss * sampler_correction(inputs, settings, tally)
    if inputs.reference_logps is not None:
        difference = (inputs.reference_logps - inputs.logps).masked_fill(~mask, 0.0)
        divergence = difference.exp() - difference - 1.0
        if settings.use_bias_correction_kl:
            divergence = divergence * ratio
        token_loss = token_loss + settings.beta * divergence
        tally.mean("kl", divergence, mask)
    token_loss = token_loss.masked_fill(~mask, 0.0)
    if settings.loss_type == "grpo":
        token_loss = token_loss / _lengths(mask)
    return LossOutput(token_loss.sum() / size.normaliser(settings), tally)


def off_policy_mask(inputs: LossInputs, threshold: float) -> Tensor:
    """1 at what to keep, else 0, (B, 1) or (B, T) as the advantages: not where the advantage is negative and the
    sequence's mean of behaviour_logp - logp is above the threshold (DeepSeek-V3.2, arXiv:2512.02556, equation 9)."""
    drift = (inputs.behaviour_logps - inputs.logps.detach()).masked_fill(~inputs.mask, 0.0)
    drift = drift.sum(dim=1, keepdim=True) / _lengths(inputs.mask)
    return ((inputs.advantages >= 0.0) | (drift <= threshold)).to(inputs.logps.dtype)


def sampler_correction(inputs: LossInputs, settings: GrpoSection, tally: Tally) -> Tensor:
    """Importance weights exp(old_logp - behaviour_logp) for a sampler that computes otherwise than the training pass.

    (B, T) of tokens or (B, 1) of whole sequences, by importance_sampling_mode; beyond the bounds they are clamped
    (truncated importance sampling, https://fengyao.notion.site/off-policy-rl) or set to 0 (masked).
    """
    assert inputs.old_logps is not None
    difference = (inputs.old_logps.detach() - inputs.behaviour_logps).masked_fill(~inputs.mask, 0.0)
    tally.mean("sampling/sampling_logp_difference/mean", difference.abs(), inputs.mask)
    tally.maxima["sampling/sampling_logp_difference/max"] = difference.abs().max()
    by_sequence = settings.importance_sampling_mode.startswith("sequence")
    weights = (difference.sum(dim=1, keepdim=True) if by_sequence else difference).exp()
    low, high = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
    if low is not None or high is not None:
        clamped = weights.clamp(low, high)
        truncate = settings.importance_sampling_mode.endswith("truncate")
        weights = clamped if truncate else weights.masked_fill(weights != clamped, 0.0)
    counted = weights[inputs.mask.any(dim=1)] if by_sequence else weights[inputs.mask]
    tally.mean("sampling/importance_sampling_ratio/mean", weights, inputs.mask)
    if counted.numel():
        tally.minima["sampling/importance_sampling_ratio/min"] = counted.min()
        tally.maxima["sampling/importance_sampling_ratio/max"] = counted.max()
    return weights


def high_entropy_mask(entropies: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """True at the tokens of a whole batch whose entropy is among the highest `quantile` (arXiv:2506.01939).

    entropies: (B, T) in nats; mask: (B, T) bool, True at the tokens that count. Returns (B, T) bool.
    """
    counted = entropies[mask]
    if counted.numel() == 0:
        return mask
    return mask & (entropies >= _quantile(counted.float(), 1.0 - quantile))


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def _policy_loss(ratio: Tensor, advantages: Tensor, inputs: LossInputs, settings: GrpoSection, tally: Tally) -> Tensor:
    """The policy term before masks and corrections, with what was clipped noted in the tally."""
    if settings.loss_type == "cispo":
        clipped = (ratio > settings.epsilon_high) & (advantages > 0.0)
        tally.mean("cispo_clip_ratio", clipped.to(ratio.dtype), inputs.mask)
        return -ratio.clamp(max=settings.epsilon_high).detach() * advantages * inputs.logps
    low, high = 1.0 - settings.epsilon, 1.0 + settings.epsilon_high
    clipped_low, clipped_high = (ratio < low) & (advantages < 0.0), (ratio > high) & (advantages > 0.0)
    for name, clipped in (("low", clipped_low), ("high", clipped_high), ("region", clipped_low | clipped_high)):
        tally.mean(f"clip_ratio/{name}_mean", clipped.to(ratio.dtype), inputs.mask)
    if inputs.mask.any():
        tally.minima["clip_ratio/low_min"] = _sequence_means(clipped_low, inputs.mask).min()
        tally.maxima["clip_ratio/high_max"] = _sequence_means(clipped_high, inputs.mask).max()
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)


def _sequence_means(clipped: Tensor, mask: Tensor) -> Tensor:
    """Share of the tokens, of each sequence that has any."""
    return ((clipped & mask).sum(dim=1) / _lengths(mask).squeeze(1))[mask.any(dim=1)]


def _lengths(mask: Tensor) -> Tensor:
    """Tokens of each sequence, at least 1: (B, 1)."""
    return mask.sum(dim=1, keepdim=True).clamp(min=1)
