"""One contribution: the gradient of the loss over a rollout, at the policy's current parameters."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from hivegrpo.peer.learn.batches import Batch, make_batch, plan_batches
from hivegrpo.peer.learn.cancel import check
from hivegrpo.peer.learn.logprobs import token_logps
from hivegrpo.peer.learn.losses import contribution_weight, grpo_loss
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import NumericsError


@dataclass(frozen=True)
class Gradient:
    """What a peer contributes."""

    vector: Tensor
    """(size,) on the CPU, in the adapter's precision."""
    weight: int
    """Tokens or sequences, by loss type."""
    metrics: dict[str, float]
    """loss, entropy, kl (with beta > 0) and clip ratios: means over the rollout's completion tokens."""


def rollout_gradient(
    policy: Policy,
    rollout: Rollout,
    grpo: GrpoSection,
    micro_batch_tokens: int,
    cancelled: threading.Event | None = None,
) -> Gradient:
    """Gradient of the rollout's loss with respect to the adapter, in micro-batches that add up to it exactly.

    The weighted mean of the gradients of several rollouts is the gradient of all of them together. Raises Cancelled
    between micro-batches, and NumericsError if the gradient is not finite.
    """
    num_tokens = rollout.num_completion_tokens
    weight = contribution_weight(grpo.loss_type, len(rollout.completions), num_tokens)
    prompt_lengths = [len(ids) for ids in rollout.prompt_ids]
    completion_lengths = [len(completion.token_ids) for completion in rollout.completions]
    sums: dict[str, Tensor] = {}
    with policy.flat_gradient() as gradient:
        for members in plan_batches(prompt_lengths, completion_lengths, micro_batch_tokens):
            check(cancelled)
            for name, value in _accumulate(policy, make_batch(rollout, members, policy.device), grpo, weight).items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
    vector = gradient.cpu()
    if not vector.isfinite().all():
        raise NumericsError(
            "The gradient is not finite.", "The policy has diverged, or this device computes wrong numbers."
        )
    loss = sums.pop("loss").item()
    return Gradient(vector, weight, {"loss": loss} | {name: value.item() / num_tokens for name, value in sums.items()})


def completion_logps(policy: Policy, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions' tokens under the current parameters, and entropies: two (B, T)."""
    mask = torch.cat([batch.prompt_mask, batch.completion_mask.long()], dim=1)
    output = policy.model(
        input_ids=torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=batch.completion_ids.shape[1] + 1,
    )
    return token_logps(output.logits[:, :-1], batch.completion_ids, temperature)


def _accumulate(policy: Policy, batch: Batch, grpo: GrpoSection, weight: int) -> dict[str, Tensor]:
    """Forward and backward over one micro-batch; sums over its tokens, and its part of the loss."""
    reference_logps = None
    if grpo.beta != 0.0:
        with torch.no_grad(), policy.reference():
            reference_logps, _ = completion_logps(policy, batch, grpo.temperature)
    logps, entropies = completion_logps(policy, batch, grpo.temperature)
    output = grpo_loss(
        logps, batch.behaviour_logps, reference_logps, batch.advantages, batch.completion_mask, grpo, weight
    )
    output.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
    entropy = entropies.masked_fill(~batch.completion_mask, 0.0).sum()
    return {"loss": output.loss.detach(), "entropy": entropy, **output.sums}
