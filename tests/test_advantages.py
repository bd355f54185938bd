"""Group-relative advantages, against numbers worked out by hand."""

import math

import pytest
import torch

from hivegrpo.peer.learn.advantages import group_advantages, weighted_rewards

NAN = math.nan


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_normalisation_uses_the_unbiased_std_and_trl_s_offset() -> None:
    # mean 1/4; squares 9/16 + 3/16 = 3/4; std = sqrt(3/4 / 3) = 1/2
    result = group_advantages(rewards(1, 0, 0, 0), 4, "group").values
    assert result.tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], rel=1e-12)


def test_none_only_centres() -> None:
    result = group_advantages(rewards(1, 0, 0, 0, 2, 2, 4, 4), 4, "none").values
    assert result.tolist() == [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1]


def test_groups_do_not_mix() -> None:
    both = group_advantages(rewards(1, 0, 5, 7), 2, "group").values
    assert both[:2].tolist() == group_advantages(rewards(1, 0), 2, "group").values.tolist()
    assert both[2:].tolist() == group_advantages(rewards(5, 7), 2, "group").values.tolist()


def test_equal_rewards_teach_nothing_and_are_counted() -> None:
    result = group_advantages(rewards(1, 1, 0, 1, 3, 3), 2, "group")
    assert result.values[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]
    assert result.metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)


def test_metrics_are_of_all_completions() -> None:
    # mean 1, squares 4 * 1, std = sqrt(4/3)
    metrics = group_advantages(rewards(0, 2, 0, 2), 2, "group").metrics
    assert metrics["reward"] == 1
    assert metrics["reward_std"] == pytest.approx(math.sqrt(4 / 3))


def test_an_unscored_completion_changes_nothing_for_its_siblings() -> None:
    result = group_advantages(rewards(1, NAN, 0, 0, 0), 5, "group").values
    assert result[1] == 0
    assert result[[0, 2, 3, 4]].tolist() == pytest.approx(group_advantages(rewards(1, 0, 0, 0), 4, "group").values)


@pytest.mark.parametrize("scored", [(), (3.0,)])
def test_a_group_with_fewer_than_two_scores_gets_zeros_and_finite_metrics(scored: tuple[float, ...]) -> None:
    result = group_advantages(rewards(*scored, *[NAN] * (3 - len(scored))), 3, "group")
    assert result.values.tolist() == [0, 0, 0]
    assert all(map(math.isfinite, result.metrics.values()))


def test_weighted_rewards_skip_functions_that_gave_none() -> None:
    scores = torch.tensor([[1.0, 0.5], [NAN, 0.5], [NAN, NAN]], dtype=torch.float64)
    total = weighted_rewards(scores, [1.0, 2.0])
    assert total[:2].tolist() == [2.0, 1.0]
    assert total[2].isnan()
