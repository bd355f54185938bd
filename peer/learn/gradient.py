"""One contribution: the gradient of the loss over a rollout, at the policy's current parameters."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from hivegrpo.peer.learn.batches import Batch, make_batch, plan_batches
from hivegrpo.peer.learn.cancel import check
from hivegrpo.peer.learn.logprobs import hidden_logps, token_logps
from hivegrpo.peer.learn.losses import LossInputs, Size, grpo_loss, high_entropy_mask
from hivegrpo.peer.learn.metrics import Tally
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import NumericsError


@dataclass(frozen=True)
class Gradient:
    """What a peer contributes."""

    vector: Tensor
    """(size,) on the CPU, in the trained parameters' precision."""
    weight: int
    """Tokens or sequences, by loss type; 0 if no token counts."""
    metrics: dict[str, float]
    """loss, and under TRL's names kl and what was clipped: means over the tokens that were differentiated."""
    logps: list[Tensor]
    """Of each sequence, (T,) float32: log-probabilities of the training pass; empty if it was not needed."""


def rollout_gradient(
    policy: Policy,
    rollout: Rollout,
    grpo: GrpoSection,
    micro_batch_tokens: int,
    cancelled: threading.Event | None = None,
) -> Gradient:
    """Gradient of the rollout's loss with respect to what is trained, in micro-batches that add up to it exactly.

    Without old log-probabilities in the rollout, where the loss needs them, the current ones are taken: the current
    parameters must then be those that sampled. The weighted mean of the gradients of several rollouts is the gradient
    of all of them together. Raises Cancelled between micro-batches, and NumericsError if the gradient is not finite.
    """
    size, tally, loss = rollout.size, Tally(), torch.zeros((), dtype=torch.float64)
    logps = [torch.zeros(0)] * len(rollout.completions)
    batches = _plan(rollout, grpo, micro_batch_tokens)
    entropy_masks = _high_entropy(policy, rollout, batches, grpo, cancelled)
    with policy.flat_gradient() as gradient:
        for members, entropy_mask in zip(batches, entropy_masks, strict=True):
            check(cancelled)
            batch = make_batch(rollout, members, policy.device)
            part = _backward(policy, batch, grpo, size, entropy_mask)
            tally.add(part.tally)
            loss += part.loss.cpu()
            for member, row in zip(members, part.logps.cpu(), strict=True):
                logps[member] = row[: len(rollout.completions[member].token_ids)].clone()
    vector = gradient.cpu()
    if not vector.isfinite().all():
        raise NumericsError(
            "The gradient is not finite.", "The policy has diverged, or this device computes wrong numbers."
        )
    return Gradient(vector, size.weight(grpo), {"loss": loss.item()} | tally.values(), logps)


@torch.no_grad()
def rollout_logps(
    policy: Policy,
    rollout: Rollout,
    grpo: GrpoSection,
    micro_batch_tokens: int,
    cancelled: threading.Event | None = None,
) -> list[Tensor]:
    """What `rollout_gradient` has as `logps`, at the current parameters, without the backward pass."""
    logps = [torch.zeros(0)] * len(rollout.completions)
    for members in _plan(rollout, grpo, micro_batch_tokens):
        check(cancelled)
        rows, _ = completion_logps(policy, make_batch(rollout, members, policy.device), grpo.temperature)
        for member, row in zip(members, rows.cpu(), strict=True):
            logps[member] = row[: len(rollout.completions[member].token_ids)].clone()
    return logps


def completion_logps(policy: Policy, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the completions' tokens under the current parameters, and entropies: two (B, T)."""
    mask = torch.cat([batch.prompt_mask, batch.completion_mask.long()], dim=1)
    inputs = {
        "input_ids": torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
    }
    keep = batch.completion_ids.shape[1] + 1
    if policy.head is None:
        logits = policy.model(**inputs, logits_to_keep=keep).logits[:, :-1]
        return token_logps(logits, batch.completion_ids, temperature)
    hidden = policy.body(**inputs).last_hidden_state[:, -keep:-1]
    return hidden_logps(hidden, policy.head.weight, policy.head.bias, batch.completion_ids, temperature)


@dataclass(frozen=True)
class _Part:
    loss: Tensor
    tally: Tally
    logps: Tensor


def _backward(policy: Policy, batch: Batch, grpo: GrpoSection, size: Size, entropy_mask: Tensor | None) -> _Part:
    """Forward and backward over one micro-batch."""
    reference_logps = None
    if grpo.beta != 0.0:
        with torch.no_grad(), policy.reference():
            reference_logps, _ = completion_logps(policy, batch, grpo.temperature)
    logps, _ = completion_logps(policy, batch, grpo.temperature)
    old_logps = batch.old_logps
    if grpo.importance_sampling_correction and old_logps is None:
        old_logps = logps.detach()
    inputs = LossInputs(
        logps,
        batch.behaviour_logps,
        old_logps if grpo.importance_sampling_correction else None,
        reference_logps,
        batch.advantages,
        batch.completion_mask,
        entropy_mask,
    )
    output = grpo_loss(inputs, grpo, size)
    output.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
    return _Part(output.loss.detach(), output.tally, logps.detach())


def _plan(rollout: Rollout, grpo: GrpoSection, budget: int) -> list[list[int]]:
    """Micro-batches of the sequences whose loss is not constant.

    Without a KL term, a sequence whose advantage is 0 has a gradient of 0, and needs no pass.
    """
    moving = rollout.advantages.any(dim=1).tolist()
    members = [
        member
        for member, counted in enumerate(rollout.counted)
        if counted and (moving[member] or grpo.beta != 0.0 or grpo.top_entropy_quantile < 1.0)
    ]
    prompts, completions = map(len, rollout.prompt_ids), (len(c.token_ids) for c in rollout.completions)
    return plan_batches(members, list(prompts), list(completions), budget)


@torch.no_grad()
def _high_entropy(
    policy: Policy,
    rollout: Rollout,
    batches: list[list[int]],
    grpo: GrpoSection,
    cancelled: threading.Event | None,
) -> list[Tensor | None]:
    """For each micro-batch, which tokens are among those of highest entropy in the whole rollout; None for all."""
    if grpo.top_entropy_quantile == 1.0:
        return [None] * len(batches)
    entropies, masks = [], []
    for members in batches:
        check(cancelled)
        batch = make_batch(rollout, members, policy.device)
        entropies.append(completion_logps(policy, batch, grpo.temperature)[1])
        masks.append(batch.completion_mask)
    flat = high_entropy_mask(
        torch.cat([part.flatten() for part in entropies]),
        torch.cat([mask.flatten() for mask in masks]),
        grpo.top_entropy_quantile,
    )
    parts = torch.split(flat, [mask.numel() for mask in masks])
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]
