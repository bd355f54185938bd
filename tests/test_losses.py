"""The loss and its parts, against numbers worked out by hand and against plain torch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hivegrpo.peer.learn import logprobs
from hivegrpo.peer.learn.logprobs import token_logps
from hivegrpo.peer.learn.losses import contribution_weight, grpo_loss
from hivegrpo.protocol.config import GrpoSection

# Two sequences, of 3 and 1 tokens, with ratios that are clipped above, not clipped, clipped below | clipped below.
RATIOS = torch.tensor([[1.5, 1.1, 0.5], [0.5, 7.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])
ADVANTAGES = torch.tensor([1.0, -2.0], dtype=torch.float64)
# -min(rho A, clip(rho, 0.8, 1.3) A), token by token:
#   A = 1:  min(1.5, 1.3) = 1.3;  min(1.1, 1.1) = 1.1;  min(0.5, 0.8) = 0.5
#   A = -2: min(-1.0, -1.6) = -1.6
TOKEN_LOSSES = [[-1.3, -1.1, -0.5], [1.6]]


def settings(**changes: Any) -> GrpoSection:
    return GrpoSection(**{"epsilon": 0.2, "epsilon_high": 0.3, "max_completion_length": 5, **changes})


def loss_of(grpo: GrpoSection, weight: int, reference: Tensor | None = None) -> tuple[float, dict[str, float]]:
    zeros = torch.zeros_like(RATIOS)
    output = grpo_loss(RATIOS.log(), zeros, reference, ADVANTAGES, MASK, grpo, weight)
    return output.loss.item(), {name: value.item() for name, value in output.sums.items()}


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("dapo", (-2.9 + 1.6) / 4),  # over 4 tokens
        ("grpo", (-2.9 / 3 + 1.6) / 2),  # mean of each, over 2 sequences
        ("dr_grpo", (-2.9 + 1.6) / (2 * 5)),  # over 2 sequences of constant length 5
    ],
)
def test_loss_by_hand(loss_type: str, expected: float) -> None:
    grpo = settings(loss_type=loss_type)
    loss, _ = loss_of(grpo, contribution_weight(loss_type, num_sequences=2, num_tokens=4))
    assert loss == pytest.approx(expected, rel=1e-12)


def test_kl_is_k3_with_beta_and_only_at_tokens() -> None:
    reference = RATIOS.log() + math.log(2)
    reference[1, 1:] = 1e6  # padding
    k3 = 2 - math.log(2) - 1
    loss, sums = loss_of(settings(loss_type="dapo", beta=0.5), 4, reference)
    assert loss == pytest.approx((-2.9 + 1.6) / 4 + 0.5 * k3, rel=1e-12)
    assert sums["kl"] == pytest.approx(4 * k3)


def test_clip_counts() -> None:
    # Above with A > 0: the first token. Below with A < 0: the last. The third is below, but with A > 0.
    _, sums = loss_of(settings(), 4)
    assert sums == {"clip_ratio/low_mean": 1, "clip_ratio/high_mean": 1, "clip_ratio/region_mean": 2}


def test_gradient_flows_where_the_ratio_is_not_clipped_and_nowhere_else() -> None:
    logps = RATIOS.log().requires_grad_()
    grpo_loss(logps, torch.zeros_like(RATIOS), None, ADVANTAGES, MASK, settings(), 4).loss.backward()
    assert logps.grad is not None
    # d(-rho A)/dlogp = -rho A, over 4 tokens
    assert logps.grad.flatten().tolist() == pytest.approx([0, -1.1 / 4, -0.5 / 4, 0, 0, 0])


def test_epsilon_high_is_epsilon_unless_given() -> None:
    assert GrpoSection(epsilon=0.1).epsilon_high == 0.1
    assert GrpoSection(epsilon=0.1, epsilon_high=0.28).epsilon_high == 0.28


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_token_logps_and_their_gradient_equal_plain_log_softmax(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_VALUES", chunk)
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 4, 17, generator=generator, dtype=torch.float64)).to(dtype)
    tokens = torch.randint(17, (3, 4), generator=generator)
    upstream = torch.randn(3, 4, generator=generator, dtype=torch.float64)

    ours = logits.clone().requires_grad_()
    logps, entropies = token_logps(ours, tokens, 0.7)
    (logps * upstream).sum().backward()

    plain = logits.double().requires_grad_()
    everything = (plain / 0.7).log_softmax(-1)
    expected = everything.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    (expected * upstream).sum().backward()

    assert ours.grad is not None
    assert plain.grad is not None
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    assert not entropies.requires_grad
    # bfloat16 inputs are exact here; only their gradient is rounded to bfloat16.
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropies.double(), -(everything.exp() * everything).sum(-1).detach(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=tolerance, atol=tolerance)


def test_an_impossible_token_does_not_spoil_the_entropy() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf]]])
    _, entropies = token_logps(logits, torch.tensor([[0]]), 1.0)
    assert entropies.item() == pytest.approx(math.log(2))
