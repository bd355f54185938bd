"""From a lease to a contribution, and to the next one of the same rollout."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LORA, load_policy, save_model, spread

from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.learner import LearnedContribution, Learner
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.rewards.registry import BUILT_IN
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.permutation import prompt_index

SEED = 5
GENERATIONS = 4


def starts_with(*, completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """Something that a random policy gets right now and then."""
    return [float(text[:1] < gold) for text, gold in zip(completions, answer, strict=True)]


def as_told(*, completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """The rows say what it gives the completions of a group: equal rewards, different ones, or none."""
    place = {"equal": lambda _: 1.0, "differ": lambda index: float(index % GENERATIONS), "none": lambda _: None}
    return [place[kind](index) for index, kind in enumerate(answer)]


def fails(*, completions: list[str], **_: Any) -> list[float | None]:
    return [1 / 0 for _ in completions]


ROWS = Prompts(tuple({"answer": "a", "prompt": "1" * length} for length in (1, 2, 9, 3, 4, 5)))


def rows_of(*kinds: str) -> Prompts:
    """Rows of these kinds in the order in which the run visits them."""
    places = [prompt_index(position, len(kinds), SEED) for position in range(len(kinds))]
    rows = dict(zip(places, kinds, strict=True))
    return Prompts(tuple({"answer": rows[place], "prompt": "12"} for place in range(len(kinds))))


def run_config(reward: str = "starts_with", model: dict[str, Any] | None = None, **grpo: Any) -> RunConfig:
    shape = {"num_generations": GENERATIONS, "max_prompt_length": 6, "max_completion_length": 5}
    return RunConfig.model_validate(
        {
            "run": {"name": "test", "versions": 1, "seed": SEED},
            "model": {"path": "model", **(model or {})},
            "dataset": {"path": "rows.jsonl"},
            "evaluation": {"path": "rows.jsonl", "limit": 3},
            "rewards": {"functions": [reward]},
            "lora": LORA.model_dump(),
            "grpo": shape | grpo,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return spread(load_policy(folder))


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (starts_with, as_told, fails):
        monkeypatch.setitem(BUILT_IN, function.__name__, Reward(function.__name__, 1, function))


Make = Callable[..., Learner]


@pytest.fixture
def make(folder: Path, policy: Policy) -> Iterator[Make]:
    """Learners at the parameters of `policy`."""
    made: list[Learner] = []

    def make(rows: Prompts = ROWS, reward: str = "starts_with", **grpo: Any) -> Learner:
        peer = PeerConfig(gradient_checkpointing=grpo.pop("gradient_checkpointing", False))
        learner = Learner.open(run_config(reward, **grpo), peer, folder, rows, rows)
        if learner.policy.size == policy.size:
            learner.load(0, policy.flatten())
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()


def contribute(
    learner: Learner, count: int, wanted: int | None = None, *, lease: int = 1, start: int = 0
) -> LearnedContribution:
    wanted = count if wanted is None else wanted
    result = learner.contribute(lease, start, count, wanted, threading.Event())
    assert sorted((*result.used, *result.dropped, *result.returned)) == list(range(count))
    assert result.vector.shape == (learner.policy.size,)
    assert result.vector.dtype == torch.float32
    assert all(map(math.isfinite, result.metrics.values()))
    return result


def again(learner: Learner, lease: int = 1, iteration: int = 1) -> LearnedContribution | None:
    return learner.contribute_again(lease, iteration, threading.Event())


def test_a_lease_becomes_a_contribution(make: Make) -> None:
    learner = make()
    result = contribute(learner, 6)
    assert len(result.used) == 5
    assert len(result.dropped) == 1  # the prompt of 9 tokens
    assert result.returned == ()
    assert result.note == ""
    assert result.vector.norm() > 0
    assert result.weight + 4 * (1 + 2 + 3 + 4 + 5) == result.num_tokens
    wanted = {"loss", "reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length"}
    assert wanted | {"rewards/starts_with/mean", "rewards/starts_with/std"} <= result.metrics.keys()
    assert result.metrics["completions/mean_length"] == result.weight / 20
    assert result.metrics["num_prompts"] == 5
    assert result.metrics["prompts/dropped"] == 1
    assert result.metrics["groups/dropped"] == 0
    assert result.seconds.keys() == {"rollout", "gradient"}


def test_the_same_lease_becomes_the_same_contribution(make: Make) -> None:
    learner = make()
    one, twin, other = (contribute(learner, 3, lease=lease) for lease in (1, 1, 2))
    assert torch.equal(one.vector, twin.vector)
    assert not torch.equal(one.vector, other.vector)


def test_on_policy_nothing_is_clipped(make: Make) -> None:
    assert contribute(make(), 6).metrics["clip_ratio/region_mean"] == 0


def test_a_step_against_the_gradient_raises_the_reward(make: Make, policy: Policy) -> None:
    """One token each, 3,200 of them: the standard error of a mean reward is 0.009, and the step is worth 0.07."""
    learner = make(max_completion_length=1, num_generations=64)
    before = contribute(learner, 60)
    learner.load(1, policy.flatten() - 0.3 * before.vector / before.vector.norm())
    assert contribute(learner, 60).metrics["reward"] > before.metrics["reward"] + 0.05


def test_gradient_checkpointing_changes_nothing(make: Make) -> None:
    learner = make(gradient_checkpointing=True)
    assert learner.policy.body.layers[0].gradient_checkpointing
    plain, saving = contribute(make(), 6), contribute(learner, 6)
    # The same operations in the same order.
    torch.testing.assert_close(saving.vector, plain.vector, rtol=1e-6, atol=1e-8)
    assert saving.metrics == pytest.approx(plain.metrics)


def test_without_an_adapter_the_contribution_is_of_all_parameters(make: Make) -> None:
    learner = make(model={"trainable": "full"})
    assert learner.layout[0][0] == "model.embed_tokens.weight"
    result = contribute(learner, 6)
    assert len(result.vector) == sum(value.numel() for value in learner.policy.model.parameters())
    assert result.vector.norm() > 0


# Two groups are wanted of a lease of six.
@pytest.mark.parametrize(
    ("kinds", "used", "dropped", "returned"),
    [
        (("differ", "differ", "equal", "differ", "equal", "equal"), (0, 1), (), (2, 3, 4, 5)),
        (("equal", "differ", "equal", "differ", "differ", "differ"), (1, 3), (0, 2), (4, 5)),
        (("equal", "equal", "equal", "equal", "differ", "differ"), (4, 5), (0, 1, 2, 3), ()),
        (("equal", "equal", "none", "equal", "differ", "equal"), (4,), (0, 1, 2, 3, 5), ()),
    ],
)
def test_dynamic_sampling_replaces_groups_whose_rewards_are_equal(
    make: Make, kinds: tuple[str, ...], used: tuple[int, ...], dropped: tuple[int, ...], returned: tuple[int, ...]
) -> None:
    learner = make(rows_of(*kinds), "as_told", dynamic_sampling_factor=3.0, loss_type="grpo")
    result = contribute(learner, 6, wanted=2)
    assert (result.used, result.dropped, result.returned) == (used, dropped, returned)
    assert result.weight == GENERATIONS * len(used)  # sequences
    assert result.vector.norm() > 0
    assert result.metrics["num_completions"] == GENERATIONS * (6 - len(returned))  # also those that do not count
    assert result.metrics["groups/dropped"] == len(dropped)
    assert result.note == ""


def test_dynamic_sampling_weighs_what_is_used_only(make: Make) -> None:
    """A contribution is the same whether the groups between those that are used were looked at or not there."""
    # Greedy, but for the temperature that has to be above 0: what is sampled does not depend on what came before.
    near_greedy = {"temperature": 1e-3, "loss_type": "dapo"}
    gaps = make(rows_of("differ", "equal", "none", "differ"), "as_told", dynamic_sampling_factor=2.0, **near_greedy)
    plain = make(rows_of("differ", "differ"), "as_told", **near_greedy)
    one, other = contribute(gaps, 4, wanted=2), contribute(plain, 2)
    assert one.used == (0, 3)
    assert one.weight == other.weight
    torch.testing.assert_close(one.vector, other.vector)


def test_dynamic_sampling_goes_on_after_prompts_that_are_too_long(make: Make) -> None:
    rows = rows_of("differ", "differ", "equal", "differ")
    first = prompt_index(0, 4, SEED)
    long = Prompts(tuple({**row, "prompt": "1" * 9} if n == first else row for n, row in enumerate(rows.rows)))
    result = contribute(make(long, "as_told", dynamic_sampling_factor=2.0), 4, wanted=2)
    assert (result.used, result.dropped, result.returned) == ((1, 3), (0, 2), ())
    assert result.metrics["prompts/dropped"] == 1
    assert result.metrics["groups/dropped"] == 1


def test_a_lease_wraps_around_the_end_of_the_prompts(make: Make) -> None:
    learner = make(rows_of("equal", "differ", "equal"), "as_told", dynamic_sampling_factor=2.0)
    result = contribute(learner, 3, wanted=1, start=3)
    kinds = [learner.prompts.rows[prompt_index(position, 3, SEED)]["answer"] for position in (3, 4, 5)]
    assert result.used == (kinds.index("differ"),)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_equal_rewards_are_told_and_only_dynamic_sampling_gives_them_up(make: Make, factor: float) -> None:
    result = contribute(make(rows_of("equal", "equal"), "as_told", dynamic_sampling_factor=factor), 2)
    assert result.note == "within each of 2 groups all rewards are equal (1)"
    assert not result.vector.any()
    if factor == 1.0:
        assert result.used == (0, 1)
        assert result.weight > 0
    else:
        assert (result.used, result.dropped, result.weight) == ((), (0, 1), 0)


def test_with_a_kl_term_equal_rewards_still_teach(make: Make) -> None:
    result = contribute(make(rows_of("equal", "equal"), "as_told", beta=0.1), 2)
    assert result.note == ""
    assert result.vector.norm() > 0


def test_a_lease_with_only_long_prompts_weighs_nothing(make: Make) -> None:
    result = contribute(make(Prompts((ROWS.rows[2],) * 2)), 2)
    assert (result.weight, result.used, result.dropped) == (0, (), (0, 1))
    assert not result.vector.any()
    assert result.note == "all 2 prompts are empty, or longer than max_prompt_length"
    assert result.num_tokens == 0


@pytest.mark.parametrize("reward", ["as_told", "fails"])
def test_completions_that_nobody_can_score_are_told(make: Make, reward: str) -> None:
    result = contribute(make(rows_of("none", "none"), reward), 2)
    assert result.note == "no reward function could score any of the 8 completions"
    assert result.metrics[f"rewards/{reward}/failed"] == (8 if reward == "fails" else 0)
    assert not result.vector.any()


@pytest.mark.parametrize(("loss_type", "used"), [("dapo", ()), ("grpo", (0, 1))])
def test_completions_that_were_all_cut_are_told(make: Make, loss_type: str, used: tuple[int, ...]) -> None:
    """A loss over tokens has none; one over sequences has a gradient of zero."""
    learner = make(
        rows_of("differ", "differ"),
        "as_told",
        max_completion_length=1,  # the end token comes once in hundreds
        mask_truncated_completions=True,
        loss_type=loss_type,
    )
    result = contribute(learner, 2)
    assert result.metrics["completions/clipped_ratio"] == 1
    assert result.note == "all 8 completions were cut at max_completion_length, and are masked"
    assert result.used == used
    assert not result.vector.any()


def moved(policy: Policy) -> torch.Tensor:
    """Parameters of a later version, so far away that ratios are clipped."""
    noise = torch.randn(policy.size, generator=torch.Generator().manual_seed(9))
    return policy.flatten() + 0.1 * noise


def test_another_update_takes_the_same_rollout_at_the_new_parameters(make: Make, policy: Policy) -> None:
    learner = make(num_iterations=3)
    first = contribute(learner, 6)
    same = again(learner)
    assert same is not None
    # The sampler's log-probabilities and the training pass's differ by rounding.
    torch.testing.assert_close(same.vector, first.vector, rtol=1e-4, atol=1e-6)
    assert (same.used, same.weight, same.dropped, same.returned) == (first.used, first.weight, (), ())
    assert same.num_tokens == 0  # nothing was sampled
    assert same.metrics["num_completion_tokens"] == first.metrics["num_completion_tokens"]

    learner.load(1, moved(policy))
    other = again(learner, iteration=2)
    assert other is not None
    assert other.weight == first.weight
    assert not torch.allclose(other.vector, first.vector, rtol=1e-2, atol=1e-4)
    assert other.metrics["clip_ratio/region_mean"] > 0
    assert again(learner, iteration=3) is None  # that was the last


def test_another_update_compares_with_the_first_training_pass(make: Make, policy: Policy) -> None:
    """This sampler computes as the training pass does: a correction for it changes next to nothing."""
    vectors = []
    for corrected in (False, True):
        learner = make(num_iterations=2, importance_sampling_correction=corrected)
        contribute(learner, 6)
        learner.load(1, moved(policy))
        result = again(learner)
        assert result is not None
        assert result.metrics["clip_ratio/region_mean"] > 0
        vectors.append(result.vector)
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-3, atol=1e-5)


def sample(learner: Learner, count: int, *, lease: int = 1) -> None:
    learner.sample(lease, 0, count, count, threading.Event())


@pytest.mark.parametrize("settings", [{}, {"importance_sampling_correction": True}, {"beta": 0.1}])
def test_what_was_sampled_ahead_is_differentiated_at_the_parameters_of_the_gradient(
    make: Make, policy: Policy, settings: dict[str, Any]
) -> None:
    """As the second of two updates from one rollout is, which has the same ratios."""
    twice, once = make(num_iterations=2, **settings), make(**settings)
    contribute(twice, 6)
    sample(once, 6)
    for learner in (twice, once):
        learner.load(1, moved(policy))
    expected, result = again(twice), contribute(once, 6)
    assert expected is not None
    torch.testing.assert_close(result.vector, expected.vector, rtol=1e-4, atol=1e-6)
    assert (result.used, result.weight) == (expected.used, expected.weight)
    assert result.metrics["clip_ratio/region_mean"] == expected.metrics["clip_ratio/region_mean"] > 0
    assert result.seconds["rollout"] > 0
    fresh = contribute(once, 6)
    assert not torch.allclose(fresh.vector, result.vector, rtol=1e-2, atol=1e-4), "it is used once"


def test_what_was_sampled_ahead_is_for_its_own_lease_and_not_too_old(make: Make, policy: Policy) -> None:
    learner = make(max_staleness=1)
    fresh = contribute(learner, 3, lease=2)
    sample(learner, 3, lease=1)
    assert torch.equal(contribute(learner, 3, lease=2).vector, fresh.vector)
    learner.load(0, moved(policy))
    sample(learner, 3, lease=2)
    learner.load(2, policy.flatten())
    assert torch.equal(contribute(learner, 3, lease=2).vector, fresh.vector), "two versions behind: sampled again"


def test_a_rollout_is_gone_once_it_is_too_old_or_another_came_or_there_was_to_be_one_update(make: Make) -> None:
    learner = make(num_iterations=2, max_staleness=1)
    contribute(learner, 6)
    assert again(learner, lease=2) is None
    learner.load(2, learner.policy.flatten())
    assert again(learner) is None
    learner.load(1, learner.policy.flatten())
    assert again(learner) is not None

    contribute(learner, 6, lease=2)
    contribute(learner, 6, lease=3)
    assert again(learner, lease=2) is None
    assert again(learner, lease=3) is not None

    once = make()
    contribute(once, 6)
    assert again(once) is None


def test_work_is_given_up_on_request(make: Make) -> None:
    learner, cancelled = make(num_iterations=2), threading.Event()
    contribute(learner, 2)
    cancelled.set()
    with pytest.raises(Cancelled):
        learner.contribute(1, 0, 2, 2, cancelled)
    with pytest.raises(Cancelled):
        learner.contribute_again(1, 1, cancelled)
    with pytest.raises(Cancelled):
        learner.evaluate(cancelled)


def test_evaluation_counts_the_limit_s_rows(make: Make) -> None:
    learner = make()
    result = learner.evaluate(threading.Event())
    assert result.problems == 3
    assert result == learner.evaluate(threading.Event())
    assert result.accuracy == result.solved / 3


def test_a_prompt_without_tokens_is_dropped_and_never_solved(make: Make) -> None:
    rows = Prompts(({"answer": "\U0010ffff", "prompt": ""}, {"answer": "\U0010ffff", "prompt": "1"}))
    learner = make(rows)
    assert contribute(learner, 2).metrics["reward"] == 1
    result = learner.evaluate(threading.Event())
    assert (result.solved, result.problems) == (1, 2)


def test_importing_the_learner_imports_neither_peft_nor_datasets() -> None:
    code = "import sys, hivegrpo.peer.learn.learner; print(*{'peft', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_a_prompt_that_cannot_be_encoded_is_dropped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's chat template may refuse a row in the middle; that must not end the peer."""
    learner = make(rows_of("a", "b", "c"))
    encode = learner.encoder.encode
    asked: list[int] = []

    def refuse_the_second(prompt: str) -> list[int]:
        asked.append(1)
        if len(asked) == 2:
            raise ConfigError("The model's chat template refuses a prompt.", "Choose another model.")
        return encode(prompt)

    monkeypatch.setattr(learner.encoder, "encode", refuse_the_second)
    result = contribute(learner, 3)
    assert (result.used, result.dropped) == ((0, 2), (1,))
