"""Log-probabilities of taken tokens, and entropies, without ever holding the logits of all tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 22
"""Logits that are held at a time: 16 MiB of float32."""


def token_logps(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the taken tokens, and the entropy of each distribution.

    logits: (B, T, V) of any floating dtype; token_ids: (B, T). Returns two (B, T), in nats, in float32 (float64 for
    float64 logits); the entropies carry no gradient. The backward pass makes the logits' gradient, in their dtype;
    everything else works on a chunk of tokens at a time.
    """
    logps, entropies = _TokenLogps.apply(logits.flatten(0, 1), token_ids.flatten(), temperature)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return logps.view(token_ids.shape), entropies.view(token_ids.shape)


def hidden_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `token_logps` of the logits hidden @ weight.T + bias, of which only a chunk of tokens exists at a time.

    hidden: (B, T, H); weight: (V, H); bias: (V,) or None; token_ids: (B, T).
    """
    logps, entropies = _HiddenLogps.apply(hidden.flatten(0, 1), weight, bias, token_ids.flatten(), temperature)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return logps.view(token_ids.shape), entropies.view(token_ids.shape)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(logits.dtype, torch.float32)
        normalisers = torch.empty(token_ids.shape, dtype=precision, device=logits.device)
        logps, entropies = torch.empty_like(normalisers), torch.empty_like(normalisers)
        for part in _chunks(*logits.shape):
            scaled = logits[part].to(precision) / temperature
            normalisers[part] = scaled.logsumexp(dim=-1)
            logps[part] = _at(scaled, token_ids[part]) - normalisers[part]
            entropies[part] = torch.special.entr(_softmax(scaled, normalisers[part])).sum(dim=-1)
        ctx.save_for_backward(logits, token_ids, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        logits, token_ids, normalisers = ctx.saved_tensors
        slopes = gradients[0] / ctx.temperature
        result = torch.empty_like(logits)
        for part in _chunks(*logits.shape):
            scaled = logits[part].to(normalisers.dtype) / ctx.temperature
            result[part] = _logits_gradient(scaled, normalisers[part], token_ids[part], slopes[part])
        return result, None, None


class _HiddenLogps(torch.autograd.Function):
    """With a frozen head, d logp / d hidden = (weight[token] - softmax @ weight) / temperature is had in the forward
    pass, one vector a token, and the backward pass needs no logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        normalisers = torch.empty(token_ids.shape, dtype=precision, device=hidden.device)
        logps, entropies = torch.empty_like(normalisers), torch.empty_like(normalisers)
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        slopes = torch.empty_like(hidden) if frozen and ctx.needs_input_grad[0] else None
        for part in _chunks(len(hidden), len(weight)):
            scaled = torch.nn.functional.linear(hidden[part], weight, bias).to(precision) / temperature
            normalisers[part] = scaled.logsumexp(dim=-1)
            logps[part] = _at(scaled, token_ids[part]) - normalisers[part]
            probabilities = _softmax(scaled, normalisers[part])
            entropies[part] = torch.special.entr(probabilities).sum(dim=-1)
            if slopes is not None:
                slopes[part] = (weight[token_ids[part]] - probabilities.to(weight.dtype) @ weight) / temperature
        if slopes is not None:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(hidden, weight, bias, token_ids, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return slopes * gradients[0].unsqueeze(-1).to(slopes.dtype), None, None, None, None
        hidden, weight, bias, token_ids, normalisers = ctx.saved_tensors
        slopes = gradients[0] / ctx.temperature
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        of_bias = torch.zeros_like(bias) if bias is not None else None
        for part in _chunks(len(hidden), len(weight)):
            scaled = torch.nn.functional.linear(hidden[part], weight, bias).to(normalisers.dtype) / ctx.temperature
            change = _logits_gradient(scaled, normalisers[part], token_ids[part], slopes[part]).to(weight.dtype)
            of_hidden[part] = change @ weight
            of_weight.addmm_(change.T, hidden[part])
            if of_bias is not None:
                of_bias += change.sum(dim=0)
        return of_hidden, of_weight, of_bias, None, None


def _at(scaled: Tensor, token_ids: Tensor) -> Tensor:
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _softmax(scaled: Tensor, normalisers: Tensor) -> Tensor:
    """In the place of `scaled`."""
    return scaled.sub_(normalisers.unsqueeze(-1)).exp_()


def _logits_gradient(scaled: Tensor, normalisers: Tensor, token_ids: Tensor, slopes: Tensor) -> Tensor:
    """slope (onehot(token) - softmax), in the place of `scaled`."""
    change = _softmax(scaled, normalisers).mul_(-slopes.unsqueeze(-1))
    return change.scatter_add_(-1, token_ids.unsqueeze(-1), slopes.unsqueeze(-1))


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))
