"""Log-probabilities in chunks, of logits and of hidden states, against plain log_softmax."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hivegrpo.peer.learn import logprobs
from hivegrpo.peer.learn.logprobs import hidden_logps, token_logps

VOCABULARY, WIDTH, TEMPERATURE = 17, 8, 0.7
CHUNKS = (1, 50, 1 << 22)
"""One token at a time (less than a vocabulary), two, all."""

# float32 and float64 round differently in another order. In bfloat16, with 8 bits of mantissa, the logits, of up to 8,
# are rounded to multiples of 1/32 before anything can be done about it, and so are sums over the vocabulary.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    slopes: Tensor
    """Of a loss, by log-probability."""

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([self.bias] if self.bias is not None else [])


def make_inputs(dtype: torch.dtype, *, bias: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Inputs(
        hidden=normal(3, 4, WIDTH).to(dtype),
        weight=normal(VOCABULARY, WIDTH).to(dtype),
        bias=normal(VOCABULARY).to(dtype) if bias else None,
        token_ids=torch.randint(VOCABULARY, (3, 4), generator=generator),
        slopes=normal(3, 4),
    )


def plain(logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    everything = (logits / TEMPERATURE).log_softmax(-1)
    taken = everything.gather(-1, inputs.token_ids.unsqueeze(-1)).squeeze(-1)
    return taken, -(everything.exp() * everything).sum(-1)


def expected(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probabilities, entropies, and the gradients of hidden, weight and bias, in float64."""
    hidden, weight, *bias = (value.double().requires_grad_() for value in inputs.leaves())
    logps, entropies = plain(torch.nn.functional.linear(hidden, weight, *bias), inputs)
    gradients = torch.autograd.grad((logps * inputs.slopes).sum(), [hidden, weight, *bias])
    return logps.detach(), entropies.detach(), list(gradients)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours.detach().double(), theirs, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_of_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_VALUES", chunk)
    inputs = make_inputs(dtype)
    logits = (inputs.hidden @ inputs.weight.T).requires_grad_()
    logps, entropies = token_logps(logits, inputs.token_ids, TEMPERATURE)
    (gradient,) = torch.autograd.grad((logps * inputs.slopes).sum(), logits)

    doubles = logits.detach().double().requires_grad_()
    plain_logps, plain_entropies = plain(doubles, inputs)
    (plain_gradient,) = torch.autograd.grad((plain_logps * inputs.slopes).sum(), doubles)

    assert logps.dtype == entropies.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    assert not entropies.requires_grad
    exact = torch.float32 if dtype == torch.bfloat16 else dtype  # the logits are given: only the gradient is rounded
    close(logps, plain_logps.detach(), exact)
    close(entropies, plain_entropies.detach(), exact)
    close(gradient, plain_gradient, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "head"), ("head",)])
def test_of_hidden_states(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, bias: bool, trained: tuple[str, ...]
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_VALUES", chunk)
    inputs = make_inputs(dtype, bias=bias)
    plain_logps, plain_entropies, plain_gradients = expected(inputs)
    inputs.hidden.requires_grad_("hidden" in trained)
    for value in inputs.leaves()[1:]:
        value.requires_grad_("head" in trained)
    logps, entropies = hidden_logps(inputs.hidden, inputs.weight, inputs.bias, inputs.token_ids, TEMPERATURE)
    (logps * inputs.slopes).sum().backward()

    assert logps.dtype == entropies.dtype == torch.promote_types(dtype, torch.float32)
    assert not entropies.requires_grad
    close(logps, plain_logps, dtype)
    close(entropies, plain_entropies, dtype)
    for value, gradient in zip(inputs.leaves(), plain_gradients, strict=True):
        if value.requires_grad:
            assert value.grad is not None
            assert value.grad.dtype == dtype
            close(value.grad, gradient, dtype)
        else:
            assert value.grad is None


@pytest.mark.parametrize("bias", [False, True])
def test_of_hidden_states_and_of_their_logits_are_the_same(bias: bool) -> None:
    inputs = make_inputs(torch.float64, bias=bias)
    logits = torch.nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    ours = hidden_logps(inputs.hidden, inputs.weight, inputs.bias, inputs.token_ids, TEMPERATURE)
    for one, other in zip(ours, token_logps(logits, inputs.token_ids, TEMPERATURE), strict=True):
        close(one, other, torch.float64)


def test_an_impossible_token_does_not_spoil_the_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    _, entropies = token_logps(logits, torch.tensor([[0]]), 1.0)
    assert entropies.item() == pytest.approx(math.log(2))


def test_a_chunk_of_hidden_states_has_no_more_logits_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: the head is applied to two tokens at a time, never to all twelve."""
    monkeypatch.setattr(logprobs, "CHUNK_VALUES", 2 * VOCABULARY)
    linear, sizes = torch.nn.functional.linear, []

    def watched(hidden: Tensor, *rest: Tensor | None) -> Tensor:
        sizes.append(len(hidden))
        return linear(hidden, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    inputs = make_inputs(torch.float32)
    for value in inputs.leaves():
        value.requires_grad_()
    logps, _ = hidden_logps(inputs.hidden, inputs.weight, None, inputs.token_ids, TEMPERATURE)
    logps.sum().backward()
    assert sizes == [2] * 12  # six in each pass
