"""Group-relative advantages of completions and of their steps, against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch

from hivegrpo.peer.learn.advantages import Scale, advantages_of, group_advantages, weighted_rewards

NAN = math.nan
SCALES: tuple[Scale, ...] = ("group", "batch", "none")


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def outcome(values: torch.Tensor, num_generations: int, scale: Scale) -> list[float]:
    result = group_advantages(values, num_generations, scale).values
    assert result.shape == (len(values), 1)
    return result.flatten().tolist()


def test_group_normalisation_uses_the_unbiased_std_and_trl_s_offset() -> None:
    # mean 1/4; squares 9/16 + 3/16 = 3/4; std = sqrt(3/4 / 3) = 1/2
    assert outcome(rewards(1, 0, 0, 0), 4, "group") == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3], rel=1e-12)


def test_batch_divides_by_the_std_of_all_and_centres_in_the_group() -> None:
    # Group means 1 and 5; all: mean 3, squares 9 + 1 + 1 + 9 = 20, std = sqrt(20 / 3)
    std = math.sqrt(20 / 3) + 1e-4
    assert outcome(rewards(0, 2, 4, 6), 2, "batch") == pytest.approx([-1 / std, 1 / std, -1 / std, 1 / std], rel=1e-12)


def test_none_only_centres() -> None:
    assert outcome(rewards(1, 0, 0, 0, 2, 2, 4, 4), 4, "none") == [0.75, -0.25, -0.25, -0.25, -1, -1, 1, 1]


def test_groups_do_not_mix() -> None:
    both = outcome(rewards(1, 0, 5, 7), 2, "group")
    assert both == outcome(rewards(1, 0), 2, "group") + outcome(rewards(5, 7), 2, "group")


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_teach_nothing_and_are_counted(scale: Scale) -> None:
    result = group_advantages(rewards(1, 1, 0, 1, 3, 3), 2, scale)
    assert result.values[[0, 1, 4, 5]].tolist() == [[0], [0], [0], [0]]
    assert result.informative.tolist() == [False, True, False]
    # The std of the batch is not 0; that of a group is for two of three.
    assert result.metrics["frac_reward_zero_std"] == pytest.approx(0 if scale == "batch" else 2 / 3)


def test_metrics_are_of_all_completions() -> None:
    # mean 1, squares 4 * 1, std = sqrt(4/3)
    result = group_advantages(rewards(0, 2, 0, 2), 2, "group")
    assert result.metrics["reward"] == 1
    assert result.metrics["reward_std"] == pytest.approx(math.sqrt(4 / 3))
    assert result.rewards.tolist() == [0, 2, 0, 2]


def test_an_unscored_completion_changes_nothing_for_its_siblings() -> None:
    result = outcome(rewards(1, NAN, 0, 0, 0), 5, "group")
    assert result.pop(1) == 0
    assert result == pytest.approx(outcome(rewards(1, 0, 0, 0), 4, "group"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scored", [(), (3.0,)])
def test_a_group_with_fewer_than_two_scores_gets_zeros_and_finite_metrics(
    scored: tuple[float, ...], scale: Scale
) -> None:
    result = group_advantages(rewards(*scored, *[NAN] * (3 - len(scored))), 3, scale)
    assert result.values.flatten().tolist() == [0, 0, 0]
    assert result.informative.tolist() == [False]
    assert all(map(math.isfinite, result.metrics.values()))
    assert ("reward" in result.metrics) == bool(scored)


def test_weighted_rewards_skip_functions_that_gave_none() -> None:
    scores = torch.tensor([[1.0, 0.5], [NAN, 0.5], [NAN, NAN]], dtype=torch.float64)
    total = weighted_rewards(scores, [1.0, 2.0])
    assert total[:2].tolist() == [2.0, 1.0]
    assert total[2].isnan()


def test_scores_of_functions_are_weighted_and_none_is_skipped() -> None:
    scores = [[1.0, None, 0.0, None], [0.5, 0.5, 1.0, None]]
    result = advantages_of(scores, [1.0, 2.0], [1, 2, 3, 4], 2, "none")
    assert result.values.shape == (4, 1)
    # Rewards 1 + 2 * 0.5 = 2, 2 * 0.5 = 1 | 0 + 2 * 1 = 2, nothing
    assert result.values.flatten().tolist() == [0.5, -0.5, 0, 0]


# Process supervision. A group of two:
#   the first completion, 4 tokens: a step that ends at token 0 with reward 4, one that ends at token 2 with reward 1;
#   the second, 2 tokens: one step, which ends at token 1, with reward 1.
# R = {4, 1, 1}: mean 2, squares 4 + 1 + 1 = 6, std = sqrt(6 / 2) = sqrt(3); r' = 2, -1, -1 over sqrt(3) + 1e-4.
# Tokens of the first: 2 - 1 = 1 at token 0; -1 at tokens 1 and 2; no step ends at or after token 3.
# Tokens of the second: -1 at both.
STEPS: list[Any] = [((0, 4.0), (2, 1.0)), ((1, 1.0),)]
LENGTHS = [4, 2]
UNIT = 1 / (math.sqrt(3) + 1e-4)
BY_HAND = [[UNIT, -UNIT, -UNIT, 0], [-UNIT, -UNIT, 0, 0]]


def process(scores: list[list[Any]], lengths: list[int], scale: Scale = "group", num_generations: int = 2) -> Any:
    return advantages_of(scores, [1.0] * len(scores), lengths, num_generations, scale)


def test_tokens_get_the_normalised_rewards_of_the_steps_that_end_at_or_after_them() -> None:
    result = process([STEPS], LENGTHS)
    torch.testing.assert_close(result.values, torch.tensor(BY_HAND, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert result.rewards.tolist() == [5, 1]  # the sums
    assert result.informative.tolist() == [True]
    assert result.metrics == pytest.approx({"reward": 3, "reward_std": math.sqrt(8), "frac_reward_zero_std": 0})


def test_steps_without_scaling_are_centred() -> None:
    assert process([STEPS], LENGTHS, "none").values.tolist() == [[1, -1, -1, 0], [-1, -1, 0, 0]]


def test_steps_of_a_batch_are_divided_by_the_std_of_all_its_steps() -> None:
    # A second group with steps 0 and 2 at single tokens, mean 1. All: {4, 1, 1, 0, 2}, mean 1.6,
    # squares 2.4^2 + 2 * 0.6^2 + 1.6^2 + 0.4^2 = 9.2, std = sqrt(9.2 / 4)
    result = process([[*STEPS, ((0, 0.0),), ((0, 2.0),)]], [*LENGTHS, 1, 1], "batch").values
    unit = 1 / (math.sqrt(9.2 / 4) + 1e-4)
    expected = [[1, -1, -1, 0], [-1, -1, 0, 0], [-1, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(result, unit * torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_steps_of_groups_do_not_mix() -> None:
    both = process([[*STEPS, ((0, 0.0),), ((0, 2.0),)]], [*LENGTHS, 1, 1])
    torch.testing.assert_close(both.values[:2], process([STEPS], LENGTHS).values)
    # {0, 2}: mean 1, std sqrt(2)
    unit = 1 / (math.sqrt(2) + 1e-4)
    assert both.values[2:, 0].tolist() == pytest.approx([-unit, unit], rel=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_one_step_at_the_end_of_each_completion_is_outcome_supervision(scale: Scale) -> None:
    values, lengths = [1.0, 0.0, 0.5, 2.0, 2.0, 0.0], [3, 1, 5, 2, 2, 4]
    steps = [((length - 1, value),) for value, length in zip(values, lengths, strict=True)]
    result, expected = process([steps], lengths, scale, 3), group_advantages(rewards(*values), 3, scale)
    for row, value, length in zip(result.values.tolist(), expected.values.flatten().tolist(), lengths, strict=True):
        assert row == pytest.approx([value] * length + [0.0] * (5 - length), rel=1e-12)
    assert result.metrics == pytest.approx(expected.metrics)
    assert result.informative.tolist() == expected.informative.tolist()


def test_a_plain_score_beside_steps_is_one_more_step_at_the_last_token() -> None:
    # The second function says 1 and 0 of the completions. At token 3 of the first and 1 of the second, where a step
    # of the first function ends as well and the rewards add up: 1 + 2 * 0.
    # R = {4, 1, 2 * 1, 1 + 0}: mean 2; tokens of the first: 2 - 1 + 0, -1 + 0, -1 + 0, 0; of the second: -1.
    result = advantages_of([STEPS, [1.0, 0.0]], [1.0, 2.0], LENGTHS, 2, "none")
    assert result.values.tolist() == [[1, -1, -1, 0], [-1, -1, 0, 0]]
    assert result.rewards.tolist() == [7, 1]
    # With 3 and -1: R = {4, 1, 6, 1 - 2 = -1}, mean 2.5; 1.5 - 1.5 + 3.5, -1.5 + 3.5 twice, 3.5 | -3.5.
    result = advantages_of([STEPS, [3.0, -1.0]], [1.0, 2.0], LENGTHS, 2, "none")
    assert result.values.tolist() == [[3.5, 2, 2, 3.5], [-3.5, -3.5, 0, 0]]


def test_a_completion_without_steps_changes_nothing_for_its_siblings() -> None:
    result = process([[STEPS[0], None, STEPS[1]]], [4, 3, 2], num_generations=3)
    torch.testing.assert_close(result.values[[0, 2]], torch.tensor(BY_HAND, dtype=torch.float64))
    assert not result.values[1].any()
    assert result.rewards[1].isnan()


def test_steps_of_equal_rewards_teach_nothing() -> None:
    result = process([[((0, 1.0), (1, 1.0)), ((0, 1.0),)]], [2, 2])
    assert not result.values.any()
    assert result.informative.tolist() == [False]
    assert result.metrics["frac_reward_zero_std"] == 1
