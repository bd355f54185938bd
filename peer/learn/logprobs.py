"""Log-probabilities of taken tokens, and entropies, without a softmax the size of the logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 22
"""Logits that are looked at at a time: 16 MiB of float32."""


def token_logps(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the taken tokens, and the entropy of each distribution.

    logits: (B, T, V) of any floating dtype; token_ids: (B, T). Returns two (B, T), in nats, in float32 (float64 for
    float64 logits); the entropies carry no gradient. The backward pass makes the logits' gradient, in their dtype;
    everything else works on a chunk of tokens at a time.
    """
    logps, entropies = _TokenLogps.apply(logits.flatten(0, 1), token_ids.flatten(), temperature)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return logps.view(token_ids.shape), entropies.view(token_ids.shape)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(logits.dtype, torch.float32)
        normalisers = torch.empty(token_ids.shape, dtype=precision, device=logits.device)
        logps, entropies = torch.empty_like(normalisers), torch.empty_like(normalisers)
        for part in _chunks(logits):
            scaled = logits[part].to(precision) / temperature
            normalisers[part] = scaled.logsumexp(dim=-1)
            logps[part] = scaled.gather(-1, token_ids[part].unsqueeze(-1)).squeeze(-1) - normalisers[part]
            probabilities = scaled.sub_(normalisers[part].unsqueeze(-1)).exp_()
            entropies[part] = torch.special.entr(probabilities).sum(dim=-1)
        ctx.save_for_backward(logits, token_ids, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        """d logp / d logits = (onehot(token) - softmax) / temperature."""
        logits, token_ids, normalisers = ctx.saved_tensors
        slopes = (gradients[0] / ctx.temperature).unsqueeze(-1)
        result = torch.empty_like(logits)
        for part in _chunks(logits):
            scaled = logits[part].to(normalisers.dtype) / ctx.temperature
            change = scaled.sub_(normalisers[part].unsqueeze(-1)).exp_().mul_(-slopes[part])
            result[part] = change.scatter_add_(-1, token_ids[part].unsqueeze(-1), slopes[part])
        return result, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    step = max(1, CHUNK_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))
