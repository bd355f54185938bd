"""Losses, gradients, advantages and metrics against TRL's GRPOTrainer, from scored completions on."""

import math
from collections.abc import Callable

import pytest
import torch
from support.parity import GENERATIONS, LONGEST, WEIGHTS, Case, Settings, Stage, cases, make_groups, save_base
from support.trl_oracle import FUNCTIONS, Answer, Oracle
from torch import Tensor

from hivegrpo.peer.learn import advantages
from hivegrpo.peer.learn.rollout import Group, compare, rollout_metrics
from hivegrpo.protocol.config import GrpoSection

pytestmark = [pytest.mark.parity, pytest.mark.slow]

# Both compute in float32, in another order: over all cases the losses were at most 4e-7 apart, the gradients 2e-6.
LOSS = 1e-6
GRADIENT = 1e-5
"""Relative, of the norm."""
ADVANTAGE = 1e-6
"""Absolute, and relative above 1."""
METRIC = 1e-5

CASES = cases()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return Stage(folder)


def differences(one: Answer, other: Answer) -> tuple[float, float]:
    """Of the loss, and relative of the gradient."""
    return abs(one.loss - other.loss), float((one.gradient - other.gradient).norm() / other.gradient.norm())


def metrics_differ(one: Answer, other: Answer) -> float:
    """The largest difference of what TRL notes of a loss, relative above 1; infinite if we lack one."""
    names = [name for name in other.metrics if name == "kl" or name.startswith(("clip_ratio/", "cispo_", "sampling/"))]
    assert names
    pairs = [(one.metrics.get(name, math.inf), other.metrics[name]) for name in names]
    return max(abs(mine - value) / max(1.0, abs(value)) for mine, value in pairs)


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics(stage: Stage, name: str) -> None:
    case = CASES[name]
    scene = stage.set(case)
    ours, theirs = scene.ours(), scene.theirs()
    loss, gradient = differences(ours, theirs)
    assert loss <= LOSS
    assert gradient <= GRADIENT
    if case.same_metrics:
        assert metrics_differ(ours, theirs) <= METRIC


@pytest.mark.parametrize("name", ["dapo-token", "grpo-sequence", "cispo-token", "cispo-sequence"])
def test_the_clip_is_at_work(stage: Stage, name: str) -> None:
    """So that the cases compare both of its sides, and what is between them."""
    metrics = stage.set(CASES[name]).ours().metrics
    names = ["cispo_clip_ratio"] if name.startswith("cispo") else ["clip_ratio/low_mean", "clip_ratio/high_mean"]
    assert all(0.05 <= metrics[name] <= 0.6 for name in names)


MUTATIONS: dict[str, tuple[str, Settings]] = {
    "epsilon": ("dapo-token", {"epsilon": 0.19}),
    "epsilon_high": ("dapo-token", {"epsilon_high": 0.27}),
    "epsilon of a sequence": ("grpo-sequence", {"epsilon": 0.029}),
    "epsilon_high of cispo": ("cispo-token", {"epsilon_high": 1.09}),
    "no bias correction of the KL": ("dapo-token-kl", {"use_bias_correction_kl": False}),
    "a bias correction of the KL": ("grpo-kl-uncorrected", {"use_bias_correction_kl": True}),
    "beta": ("grpo-lora", {"beta": 0.299}),
    "no delta": ("delta", {"delta": None}),
    "no delta of a sequence": ("delta-sequence", {"delta": None}),
    "grpo for dapo": ("dapo-token", {"loss_type": "grpo"}),
    "dapo for bnpo": ("bnpo-4-batches-4-peers", {"loss_type": "dapo"}),
    "bnpo for dapo": ("dapo-4-batches-4-peers", {"loss_type": "bnpo"}),
    "another length for dr_grpo": ("dr_grpo-token", {"max_completion_length": LONGEST + 1}),
    "token for sequence": ("grpo-sequence", {"importance_sampling_level": "token"}),
    "sequence for token": ("cispo-token", {"importance_sampling_level": "sequence"}),
    "cut completions count": ("dapo-masked", {"mask_truncated_completions": False}),
    "cut completions count in grpo": ("grpo-masked", {"mask_truncated_completions": False}),
    "temperature": ("dapo-token", {"temperature": 1.0}),
    "temperature of the first update": ("grpo-first-update", {"temperature": 1.0}),
    "all entropies": ("entropy-0.5", {"top_entropy_quantile": 1.0}),
    "quantile": ("entropy-0.5", {"top_entropy_quantile": 0.55}),
    "no off-policy mask": ("off-policy", {"off_policy_mask_threshold": None}),
    "no correction": ("token_truncate-first-update", {"importance_sampling_correction": False}),
    "mask for truncate": ("token_truncate", {"importance_sampling_mode": "token_mask"}),
    "truncate for mask": ("sequence_mask", {"importance_sampling_mode": "sequence_truncate"}),
    "tokens' correction for a sequence's": ("sequence_truncate", {"importance_sampling_mode": "token_truncate"}),
    "no lower bound": ("sequence_mask-bounds", {"importance_sampling_clip_min": None}),
    "no upper bound": ("token_truncate", {"importance_sampling_clip_max": None}),
    "unscaled rewards": ("batch", {"scale_rewards": "none"}),
    "a group's std for the batch's": ("batch", {"scale_rewards": "group"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(stage: Stage, name: str) -> None:
    original, changes = MUTATIONS[name]
    scene = stage.set(CASES[original])
    loss, gradient = differences(scene.ours(**changes), scene.theirs())
    assert loss > 10 * LOSS or gradient > 10 * GRADIENT


Score = Callable[[int, int], float | None]
"""Of a function and a completion, by their numbers."""

COMPARISONS: dict[str, tuple[tuple[float, ...], int, Score | None]] = {
    # Weights, TRL's micro-batches of a step, and scores: at random with some None, if no function is given.
    "weighted": (WEIGHTS, 1, None),
    "accumulated": (WEIGHTS, 4, None),
    "one function": ((1.0, 0.0, 0.0), 1, None),
    "equal rewards": (WEIGHTS, 1, lambda function, i: 1.0 if i < GENERATIONS else float(i)),
    "nearly equal": (WEIGHTS, 1, lambda function, i: 1e-4 * (i % 3)),
    "correct or not": ((1.0, 0.2, 0.0), 1, lambda function, i: float(i % (3 + function) == 0)),
    "one scored": (WEIGHTS, 1, lambda function, i: 1.0 if i == 0 or i >= GENERATIONS else None),
    "none scored": (WEIGHTS, 1, lambda function, i: None if i < GENERATIONS else float(i * function)),
}


def scored_by_trl(stage: Stage, name: str, scale: str) -> tuple[GrpoSection, list[Group], Oracle, Tensor]:
    """Groups of completions, and TRL's advantages."""
    weights, accumulation, score = COMPARISONS[name]
    grpo, groups = Case().grpo(scale_rewards=scale), make_groups(4, unscored=score is None)
    if score is not None:
        for number, group in enumerate(groups):
            places = range(number * GENERATIONS, (number + 1) * GENERATIONS)
            group.scores[:] = [[score(function, place) for place in places] for function in range(len(FUNCTIONS))]
    oracle = Oracle(stage.base, grpo, weights, accumulation=accumulation)
    return grpo, groups, oracle, oracle.prepare(groups)["advantages"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_advantages_and_metrics_of_a_rollout(stage: Stage, name: str, scale: str) -> None:
    grpo, groups, oracle, theirs = scored_by_trl(stage, name, scale)
    ours = compare(groups, COMPARISONS[name][0], grpo)
    torch.testing.assert_close(ours.values.squeeze(1).float(), theirs, rtol=ADVANTAGE, atol=ADVANTAGE)
    metrics = rollout_metrics(groups, FUNCTIONS, ours)
    expected = {name: value for name, value in oracle.metrics.items() if math.isfinite(value)}
    if name == "one scored":
        del expected["frac_reward_zero_std"]  # TRL's std of one number is NaN, ours 0: the group teaches nothing
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=METRIC, abs=METRIC)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_another_divisor_of_the_variance_is_caught(stage: Stage, monkeypatch: pytest.MonkeyPatch, scale: str) -> None:
    grpo, groups, _, theirs = scored_by_trl(stage, "weighted", scale)
    unbiased = advantages._nanstd

    def biased(values: Tensor) -> Tensor:
        count = (~values.isnan()).sum(dim=1, keepdim=True)
        return unbiased(values) * ((count - 1) / count).sqrt()

    monkeypatch.setattr(advantages, "_nanstd", biased)
    ours = compare(groups, WEIGHTS, grpo).values.squeeze(1).float()
    assert (ours - theirs).abs().max() > 10 * ADVANTAGE
