"""K peers equal one machine: gradients of parts of the groups, averaged by weight, are the gradient of all."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from support.rollouts import part, random_policy, random_rollout
from torch import Tensor

from hivegrpo.peer.learn.batches import plan_batches
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.gradient import Gradient, rollout_gradient
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import NumericsError

SPLITS = (slice(0, 1), slice(1, 3), slice(3, 9))
"""Groups of each of three peers: uneven."""

LOSS_TYPES = ("dapo", "grpo", "dr_grpo")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(torch.float64)


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return random_rollout()


def settings(loss_type: str) -> GrpoSection:
    return GrpoSection.model_validate({"loss_type": loss_type, "beta": 0.04, "temperature": 0.9})


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def peers_and_one(policy: Policy, rollout: Rollout, loss_type: str) -> tuple[list[Gradient], Gradient]:
    """Three peers' gradients, with micro-batches of their own sizes, and one machine's."""
    grpo = settings(loss_type)
    peers = [
        rollout_gradient(policy, part(rollout, groups), grpo, budget)
        for groups, budget in zip(SPLITS, (30, 64, 100), strict=True)
    ]
    return peers, rollout_gradient(policy, rollout, grpo, 10_000)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_peers_averaged_by_weight_equal_one_machine(policy: Policy, rollout: Rollout, loss_type: str) -> None:
    peers, one = peers_and_one(policy, rollout, loss_type)
    total = sum(peer.weight for peer in peers)
    average = torch.stack([peer.vector * (peer.weight / total) for peer in peers]).sum(dim=0)
    assert average.dtype == torch.float64
    assert total == one.weight
    assert relative_difference(average, one.vector) <= 1e-12


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_peers_averaged_without_weights_do_not(policy: Policy, rollout: Rollout, loss_type: str) -> None:
    peers, one = peers_and_one(policy, rollout, loss_type)
    average = torch.stack([peer.vector for peer in peers]).mean(dim=0)
    assert relative_difference(average, one.vector) > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_is_the_slope_of_the_loss(policy: Policy, rollout: Rollout, loss_type: str) -> None:
    """Central differences along a random direction; the clip makes kinks, which a small step avoids."""
    grpo, start = settings(loss_type), policy.flatten()
    gradient = rollout_gradient(policy, rollout, grpo, 200)
    direction = torch.randn(policy.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    losses = []
    for sign in (1, -1):
        policy.load_vector(start + sign * step * direction)
        losses.append(rollout_gradient(policy, rollout, grpo, 200).metrics["loss"])
    policy.load_vector(start)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient.vector @ direction), rel=1e-6)


def test_metrics_do_not_depend_on_the_micro_batches(policy: Policy, rollout: Rollout) -> None:
    small = rollout_gradient(policy, rollout, settings("dapo"), 1).metrics
    large = rollout_gradient(policy, rollout, settings("dapo"), 10_000).metrics
    assert small == pytest.approx(large, rel=1e-10)
    assert {"loss", "entropy", "kl", "clip_ratio/region_mean"} <= small.keys()
    assert 0 < small["clip_ratio/low_mean"] < 1
    assert 0 < small["clip_ratio/high_mean"] < 1


def test_a_gradient_leaves_the_policy_as_it_was(policy: Policy, rollout: Rollout) -> None:
    before = policy.flatten()
    rollout_gradient(policy, rollout, settings("dapo"), 200)
    assert torch.equal(policy.flatten(), before)
    assert all(value.grad is None and value.requires_grad for value in policy.parameters)


def test_cancelled_between_micro_batches(policy: Policy, rollout: Rollout) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        rollout_gradient(policy, rollout, settings("dapo"), 200, cancelled)


def test_a_gradient_that_is_not_finite_is_an_error(policy: Policy, rollout: Rollout) -> None:
    broken = replace(rollout, advantages=torch.full_like(rollout.advantages, math.nan))
    with pytest.raises(NumericsError, match="not finite"):
        rollout_gradient(policy, broken, settings("dapo"), 200)


def test_micro_batches_hold_every_sequence_once_within_the_budget() -> None:
    prompts, completions = [3, 9, 4, 4, 50, 1], [7, 2, 2, 8, 60, 1]
    batches = plan_batches(prompts, completions, budget=40)
    assert sorted(member for batch in batches for member in batch) == [0, 1, 2, 3, 4, 5]
    for batch in batches:
        padded = len(batch) * (max(prompts[i] for i in batch) + max(completions[i] for i in batch))
        assert padded <= 40 or len(batch) == 1
    assert [4] in batches
    assert len(batches) < len(prompts)
