"""The losses, their masks and corrections, against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hivegrpo.peer.learn.losses import LossInputs, Size, grpo_loss, high_entropy_mask
from hivegrpo.peer.learn.metrics import Tally
from hivegrpo.protocol.config import GrpoSection

# Two sequences, of 3 and 1 tokens, with ratios that are clipped above, not clipped, clipped below | clipped below.
RATIOS = torch.tensor([[1.5, 1.1, 0.5], [0.5, 7.0, 7.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, False]])
ZEROS = torch.zeros_like(RATIOS)
INPUTS = LossInputs(
    logps=RATIOS.log(),
    behaviour_logps=ZEROS,
    old_logps=None,
    reference_logps=None,
    advantages=torch.tensor([[1.0], [-2.0]], dtype=torch.float64),
    mask=MASK,
)
SIZE = Size(sequences=2, tokens=4)
# -min(rho A, clip(rho, 0.8, 1.3) A), token by token:
#   A = 1:  min(1.5, 1.3) = 1.3;  min(1.1, 1.1) = 1.1;  min(0.5, 0.8) = 0.5
#   A = -2: min(-1.0, -1.6) = -1.6
FIRST, SECOND = -1.3 - 1.1 - 0.5, 1.6


def settings(**changes: Any) -> GrpoSection:
    return GrpoSection(**{"epsilon": 0.2, "epsilon_high": 0.3, "max_completion_length": 5, **changes})


def loss_of(inputs: LossInputs, size: Size = SIZE, **changes: Any) -> tuple[float, dict[str, float]]:
    output = grpo_loss(inputs, settings(**changes), size)
    return output.loss.item(), output.tally.values()


def slopes_of(inputs: LossInputs, **changes: Any) -> list[float]:
    """d loss / d logp of each token, padding last."""
    logps = inputs.logps.clone().requires_grad_()
    grpo_loss(replace(inputs, logps=logps), settings(**changes), SIZE).loss.backward()
    assert logps.grad is not None
    return logps.grad.flatten().tolist()


@pytest.mark.parametrize(
    ("loss_type", "expected", "weight"),
    [
        ("dapo", (FIRST + SECOND) / 4, 4),  # over 4 tokens
        ("bnpo", (FIRST + SECOND) / 4, 2),  # the same, but it counts by its sequences
        ("grpo", (FIRST / 3 + SECOND) / 2, 2),  # mean of each, over 2 sequences
        ("dr_grpo", (FIRST + SECOND) / (2 * 5), 2),  # over 2 sequences of constant length 5
    ],
)
def test_loss_by_hand(loss_type: str, expected: float, weight: int) -> None:
    assert loss_of(INPUTS, loss_type=loss_type)[0] == pytest.approx(expected, rel=1e-12)
    assert SIZE.weight(settings(loss_type=loss_type)) == weight


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("dapo", (FIRST + SECOND) / 50),
        ("bnpo", (FIRST + SECOND) / 50),
        ("grpo", (FIRST / 3 + SECOND) / 10),
        ("dr_grpo", (FIRST + SECOND) / (10 * 5)),
    ],
)
def test_a_part_is_divided_by_the_size_of_the_whole(loss_type: str, expected: float) -> None:
    loss, _ = loss_of(INPUTS, Size(sequences=10, tokens=50), loss_type=loss_type)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_gradient_flows_where_the_ratio_is_not_clipped_and_nowhere_else() -> None:
    # d(-rho A)/dlogp = -rho A, over 4 tokens
    assert slopes_of(INPUTS) == pytest.approx([0, -1.1 / 4, -0.5 / 4, 0, 0, 0])


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    # -min(rho, 1.2) A logp: 1.2 ln 1.5, 1.1 ln 1.1, 0.5 ln 0.5 with A = 1, and 0.5 ln 0.5 with A = -2
    expected = -1.2 * math.log(1.5) - 1.1 * math.log(1.1) - 0.5 * math.log(0.5) + 2 * 0.5 * math.log(0.5)
    cispo = {"loss_type": "cispo", "epsilon_high": 1.2}
    loss, metrics = loss_of(INPUTS, **cispo)
    assert loss == pytest.approx(expected / 4, rel=1e-12)
    assert slopes_of(INPUTS, **cispo) == pytest.approx([-1.2 / 4, -1.1 / 4, -0.5 / 4, 1.0 / 4, 0, 0])
    assert metrics == {"cispo_clip_ratio": 1 / 4}
    assert SIZE.weight(settings(**cispo)) == 4


# 2 * 0.5 * 1.728 = 1.2 ** 3: the geometric mean of the first sequence is 1.2, that of the second 0.5.
SEQUENCES = replace(INPUTS, logps=torch.tensor([[2.0, 0.5, 1.728], [0.5, 7.0, 7.0]], dtype=torch.float64).log())


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("grpo", (-1.1 + 1.6) / 2), ("dapo", (3 * -1.1 + 1.6) / 4), ("bnpo", -1.7 / 4)]
)
def test_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens(loss_type: str, expected: float) -> None:
    # A = 1: min(1.2, 1.1) = 1.1, at each of its tokens;  A = -2: min(-1.0, -1.6) = -1.6
    sequence = {"importance_sampling_level": "sequence", "epsilon_high": 0.1, "loss_type": loss_type}
    loss, metrics = loss_of(SEQUENCES, **sequence)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert metrics == {
        "clip_ratio/low_mean": 1 / 2,  # of the sequences
        "clip_ratio/high_mean": 1 / 2,
        "clip_ratio/region_mean": 1,
        "clip_ratio/low_min": 0,
        "clip_ratio/high_max": 1,
    }


def test_every_token_moves_the_ratio_of_its_sequence() -> None:
    # Loss of the first: -1.2 for each of 3 tokens, a third of the log-ratio is each token's; the second is clipped.
    slopes = slopes_of(SEQUENCES, importance_sampling_level="sequence", loss_type="grpo")
    assert slopes == pytest.approx([-1.2 / 3 / 2] * 3 + [0, 0, 0])


@pytest.mark.parametrize(("delta", "expected", "slope"), [(None, 14.0, 14.0), (4.0, 8.0, 0.0)])
def test_delta_bounds_the_ratio_where_the_advantage_is_negative(
    delta: float | None, expected: float, slope: float
) -> None:
    # A = -2, rho = 7: min(7 A, 1.3 A) = -14, and with delta min(4 A, 1.3 A) = -8. With A = 1 the clip comes first.
    inputs = replace(INPUTS, logps=torch.tensor([[7.0, 1.0, 1.0], [7.0, 1.0, 1.0]], dtype=torch.float64).log())
    loss, _ = loss_of(inputs, delta=delta)
    assert loss == pytest.approx((-1.3 - 1.0 - 1.0 + expected) / 4, rel=1e-12)
    assert slopes_of(inputs, delta=delta)[3] == pytest.approx(slope / 4)


def test_advantages_of_tokens() -> None:
    # -min(1.5 * 1, 1.3), -min(1.1 * 3, 1.1 * 3), -min(0.5 * -1, 0.8 * -1) | -min(0.5 * 2, 0.8 * 2)
    advantages = torch.tensor([[1.0, 3.0, -1.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    loss, _ = loss_of(replace(INPUTS, advantages=advantages))
    assert loss == pytest.approx((-1.3 - 3.3 + 0.8 - 1.0) / 4, rel=1e-12)


K3 = 2 - math.log(2) - 1
"""Of a reference that is twice as probable."""


@pytest.mark.parametrize(("corrected", "expected"), [(False, K3), (True, K3 * (1.5 + 1.1 + 0.5 + 0.5) / 4)])
def test_kl_is_k3_and_times_the_ratio_if_corrected(corrected: bool, expected: float) -> None:
    reference = INPUTS.logps + math.log(2)
    inputs = replace(INPUTS, reference_logps=reference)
    loss, metrics = loss_of(inputs, beta=0.5, use_bias_correction_kl=corrected)
    assert loss == pytest.approx((FIRST + SECOND) / 4 + 0.5 * expected, rel=1e-12)
    assert metrics["kl"] == pytest.approx(expected, rel=1e-12)


def test_the_corrected_gradient_of_the_kl_is_unbiased() -> None:
    """d/dlogp of rho k3 is rho (logp - reference_logp): the gradient of the divergence itself, sampled elsewhere."""
    difference = torch.tensor([[0.3, -0.2, 0.9], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    inputs = replace(INPUTS, reference_logps=INPUTS.logps - difference, advantages=torch.zeros(2, 1))
    slopes = slopes_of(inputs, beta=1.0, use_bias_correction_kl=True)
    assert slopes == pytest.approx((RATIOS * difference / 4).flatten().tolist())


def test_kl_of_sequences_is_corrected_by_their_ratios() -> None:
    inputs = replace(SEQUENCES, reference_logps=SEQUENCES.logps + math.log(2))
    _, metrics = loss_of(inputs, beta=0.5, importance_sampling_level="sequence")
    assert metrics["kl"] == pytest.approx(K3 * (3 * 1.2 + 0.5) / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("advantages", "threshold", "expected"),
    [
        # Mean log-ratio of the sampler to the policy: -ln(1.5 * 1.1 * 0.5) / 3 = 0.06 | ln 2 = 0.69
        ([[1.0], [-2.0]], 0.7, FIRST + SECOND),
        ([[1.0], [-2.0]], 0.6, FIRST),
        ([[1.0], [2.0]], 0.6, FIRST - 1.0),  # -min(0.5 * 2, 0.8 * 2)
        ([[-1.0], [-2.0]], 0.01, 0.0),
        ([[1.0, -1.0, 1.0], [-2.0, 0.0, 0.0]], 0.01, -1.3 - 0.5),  # a token's advantage decides over the token
    ],
)
def test_off_policy_mask(advantages: list[list[float]], threshold: float, expected: float) -> None:
    inputs = replace(INPUTS, advantages=torch.tensor(advantages, dtype=torch.float64))
    loss, _ = loss_of(inputs, off_policy_mask_threshold=threshold)
    assert loss == pytest.approx(expected / 4, rel=1e-12)


def test_off_policy_mask_compares_with_the_sampler_and_leaves_the_kl() -> None:
    # The sampler was e times as probable at each token; the training pass, which is what rho compares with, was not.
    inputs = replace(
        INPUTS, behaviour_logps=INPUTS.logps + 1.0, old_logps=ZEROS, reference_logps=INPUTS.logps + math.log(2)
    )
    masked, metrics = loss_of(inputs, beta=0.5, use_bias_correction_kl=False, off_policy_mask_threshold=0.99)
    assert masked == pytest.approx((FIRST + 2 * K3) / 4, rel=1e-12)
    assert metrics["off_policy_mask/kept"] == 1 / 2
    kept, metrics = loss_of(inputs, beta=0.5, use_bias_correction_kl=False, off_policy_mask_threshold=1.01)
    assert kept == pytest.approx((FIRST + SECOND + 2 * K3) / 4, rel=1e-12)
    assert metrics["off_policy_mask/kept"] == 1


# The training pass finds the tokens 2, 0.5, 1 | 4 times as probable as the sampler did: 1 | 4 times for the sequences.
CORRECTIONS = torch.tensor([[2.0, 0.5, 1.0], [4.0, 9.0, 9.0]], dtype=torch.float64)
SAMPLED = replace(INPUTS, old_logps=ZEROS, behaviour_logps=-CORRECTIONS.log())
BOUNDS = {"importance_sampling_clip_min": 0.6, "importance_sampling_clip_max": 3.0}


@pytest.mark.parametrize(
    ("mode", "bounds", "weights"),
    [
        ("token_truncate", BOUNDS, [2.0, 0.6, 1.0, 3.0]),
        ("token_mask", BOUNDS, [2.0, 0.0, 1.0, 0.0]),
        ("sequence_truncate", BOUNDS, [1.0, 1.0, 1.0, 3.0]),
        ("sequence_mask", BOUNDS, [1.0, 1.0, 1.0, 0.0]),
        ("token_truncate", BOUNDS | {"importance_sampling_clip_max": None}, [2.0, 0.6, 1.0, 4.0]),
        ("token_mask", {"importance_sampling_clip_max": 1.5}, [0.0, 0.5, 1.0, 0.0]),
        ("sequence_mask", {"importance_sampling_clip_max": 4.1}, [1.0, 1.0, 1.0, 4.0]),
        ("token_mask", {"importance_sampling_clip_max": None}, [2.0, 0.5, 1.0, 4.0]),
    ],
)
def test_sampler_correction(mode: str, bounds: dict[str, float | None], weights: list[float]) -> None:
    losses = [-1.3, -1.1, -0.5, 1.6]
    correction = {"importance_sampling_correction": True, "importance_sampling_mode": mode, **bounds}
    loss, metrics = loss_of(SAMPLED, **correction)
    assert loss == pytest.approx(sum(map(math.prod, zip(losses, weights, strict=True))) / 4, rel=1e-12)
    counted = weights if mode.startswith("token") else weights[2:]  # one of each sequence
    name = "sampling/importance_sampling_ratio"
    assert metrics[f"{name}/mean"] == pytest.approx(sum(counted) / len(counted))
    assert (metrics[f"{name}/min"], metrics[f"{name}/max"]) == pytest.approx((min(counted), max(counted)))
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx((2 * math.log(2) + math.log(4)) / 4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(4))


def test_sampler_correction_leaves_the_kl() -> None:
    inputs = replace(SAMPLED, reference_logps=INPUTS.logps + math.log(2))
    correction = {"importance_sampling_correction": True, "importance_sampling_mode": "token_mask", **BOUNDS}
    loss, _ = loss_of(inputs, beta=0.5, use_bias_correction_kl=False, **correction)
    assert loss == pytest.approx((-1.3 * 2.0 - 0.5 * 1.0) / 4 + 0.5 * K3, rel=1e-12)


def test_the_entropy_mask_leaves_tokens_out_of_the_policy_term_only() -> None:
    entropy_mask = torch.tensor([[False, True, False], [True, False, False]])
    inputs = replace(INPUTS, entropy_mask=entropy_mask, reference_logps=INPUTS.logps + math.log(2))
    loss, _ = loss_of(inputs, beta=0.5, use_bias_correction_kl=False)
    assert loss == pytest.approx((-1.1 + 1.6) / 4 + 0.5 * K3, rel=1e-12)


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [
        (0.4, [4.0, 5.0]),  # above 1 + 0.6 * (5 - 1) = 3.4
        (0.5, [3.0, 4.0, 5.0]),  # from 3.0, the median
        (0.0, [5.0]),
        (1.0, [1.0, 2.0, 3.0, 4.0, 5.0]),
    ],
)
def test_high_entropy_mask(quantile: float, expected: list[float]) -> None:
    entropies = torch.tensor([[2.0, 5.0, 99.0], [1.0, 3.0, 4.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert sorted(entropies[high_entropy_mask(entropies, mask, quantile)].tolist()) == expected


def test_high_entropy_mask_of_nothing_is_nothing() -> None:
    assert not high_entropy_mask(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5).any()


def test_clip_metrics() -> None:
    # Above with A > 0: the first token. Below with A < 0: the last. The third is below, but with A > 0.
    _, metrics = loss_of(INPUTS)
    assert metrics == pytest.approx(
        {
            "clip_ratio/low_mean": 1 / 4,
            "clip_ratio/high_mean": 1 / 4,
            "clip_ratio/region_mean": 2 / 4,
            "clip_ratio/low_min": 0.0,  # of the first sequence; all of the second's
            "clip_ratio/high_max": 1 / 3,  # of the first sequence; none of the second's
        }
    )


EVERYTHING = {
    "beta": 0.5,
    "off_policy_mask_threshold": 0.6,
    "importance_sampling_correction": True,
    "importance_sampling_mode": "token_truncate",
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
@pytest.mark.parametrize("padding", [math.inf, -math.inf, math.nan, 1e6])
def test_padding_counts_for_nothing_whatever_it_is(loss_type: str, level: str, padding: float) -> None:
    changes = EVERYTHING | {"loss_type": loss_type, "importance_sampling_level": level}
    reference = INPUTS.logps + 0.1
    clean = replace(SAMPLED, reference_logps=reference)
    dirty = LossInputs(
        logps=_padded(INPUTS.logps, padding),
        behaviour_logps=_padded(SAMPLED.behaviour_logps, padding),
        old_logps=_padded(ZEROS, padding),
        reference_logps=_padded(reference, padding),
        advantages=INPUTS.advantages,
        mask=MASK,
    )
    assert loss_of(dirty, **changes) == loss_of(clean, **changes)
    assert slopes_of(dirty, **changes) == slopes_of(clean, **changes)


def _padded(values: Tensor, padding: float) -> Tensor:
    return values.masked_fill(~MASK, padding)


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_without_tokens_is_a_sequence_of_loss_0(loss_type: str, level: str) -> None:
    mask = torch.stack([MASK[0], torch.zeros(3, dtype=torch.bool)])
    one = LossInputs(INPUTS.logps[:1], ZEROS[:1], None, None, INPUTS.advantages[:1], MASK[:1])
    changes = {"loss_type": loss_type, "importance_sampling_level": level}
    size = Size(sequences=2, tokens=3)
    assert loss_of(replace(INPUTS, mask=mask), size, **changes)[0] == loss_of(one, size, **changes)[0]
    assert all(map(math.isfinite, slopes_of(replace(INPUTS, mask=mask), **changes)))


def test_parts_of_a_tally_add_up() -> None:
    mask = torch.tensor([[True, True, False]])
    one, other = Tally(), Tally()
    one.mean("mean", torch.tensor([[1.0, 2.0, 99.0]]), mask)
    other.mean("mean", torch.tensor([[9.0, 99.0, 99.0]]), torch.tensor([[True, False, False]]))
    one.mean("sequences", torch.tensor([[1.0], [2.0]]), mask)
    other.mean("nothing", torch.tensor([[1.0, 1.0, 1.0]]), ~mask & mask)
    one.minima["least"], other.minima["least"] = torch.tensor(2.0), torch.tensor(1.0)
    one.maxima["most"], other.maxima["most"] = torch.tensor(2.0), torch.tensor(math.nan)
    one.add(other)
    assert one.values() == {"mean": 4.0, "sequences": 1.5, "least": 1.0, "most": 2.0}
