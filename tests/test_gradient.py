"""K peers equal one machine: gradients of parts of the groups, averaged by weight, are the gradient of all."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.rollouts import GROUP, LONGEST, VOCABULARY, part, random_base, random_policy, random_rollout
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hivegrpo.peer.learn import gradient
from hivegrpo.peer.learn.batches import make_batch, plan_batches
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.gradient import Gradient, completion_logps, rollout_gradient
from hivegrpo.peer.learn.losses import LossInputs, grpo_loss
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import NumericsError

SPLITS = (slice(0, 1), slice(1, 3), slice(3, 9))
"""Groups of each of three peers: uneven."""

EXACT = 1e-12
"""Relative, of the norm: what is left of float64, when a few thousand terms are added in another order."""

Settings = dict[str, Any]

LOSS_TYPES: dict[str, Settings] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": LONGEST},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
}
SEQUENCE: Settings = {"importance_sampling_level": "sequence", "epsilon": 0.05}
OPTIONS: dict[str, Settings] = {
    "kl": {"beta": 0.04},
    "kl, uncorrected": {"beta": 0.04, "use_bias_correction_kl": False},
    "delta": {"delta": 1.4},
    "off-policy": {"off_policy_mask_threshold": 0.05},
    **{
        mode: {"importance_sampling_correction": True, "importance_sampling_mode": mode}
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    },
}
ADDITIVE: dict[str, Settings] = (
    LOSS_TYPES
    | {f"{name}, sequence": settings | SEQUENCE for name, settings in LOSS_TYPES.items()}
    | {f"{name}, kl, sequence": settings | SEQUENCE | {"beta": 0.04} for name, settings in LOSS_TYPES.items()}
    | OPTIONS
)
"""Settings with which parts of a batch, by whom ever, add up to the batch."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(random_base(torch.float64))


def completions() -> Rollout:
    """Advantages of completions; as old log-probabilities some that are a little off those of the sampler."""
    rollout = random_rollout()
    generator = torch.Generator().manual_seed(4)
    old = [c.logps + 0.1 * torch.randn(len(c.logps), generator=generator).double() for c in rollout.completions]
    return replace(rollout, old_logps=old)


def tokens() -> Rollout:
    """Advantages of tokens, as process supervision gives them."""
    rollout = completions()
    shape = len(rollout.completions), max(len(c.token_ids) for c in rollout.completions)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return replace(rollout, advantages=noise)


def cut() -> Rollout:
    """Each third sequence does not count."""
    rollout = completions()
    return replace(rollout, counted=[number % 3 != 1 for number in range(len(rollout.completions))])


ROLLOUTS: dict[str, Callable[[], Rollout]] = {"completions": completions, "tokens": tokens, "cut": cut}


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    return completions()


def section(settings: Settings) -> GrpoSection:
    return GrpoSection.model_validate({"temperature": 0.9, **settings})


KL = section({"beta": 0.04})


def relative_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def average(peers: list[Gradient]) -> Tensor:
    total = sum(peer.weight for peer in peers)
    return torch.stack([peer.vector * (peer.weight / total) for peer in peers]).sum(dim=0)


def peers_and_one(policy: Policy, rollout: Rollout, grpo: GrpoSection) -> tuple[list[Gradient], Gradient]:
    """Three peers' gradients, with micro-batches of their own sizes, and one machine's."""
    peers = [
        rollout_gradient(policy, part(rollout, groups), grpo, budget)
        for groups, budget in zip(SPLITS, (30, 64, 100), strict=True)
    ]
    return peers, rollout_gradient(policy, rollout, grpo, 10_000)


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("kind", ROLLOUTS)
def test_peers_averaged_by_weight_equal_one_machine(policy: Policy, kind: str, name: str) -> None:
    peers, one = peers_and_one(policy, ROLLOUTS[kind](), section(ADDITIVE[name]))
    assert one.vector.dtype == torch.float64
    assert one.vector.norm() > 1e-3
    assert sum(peer.weight for peer in peers) == one.weight
    assert relative_difference(average(peers), one.vector) <= EXACT


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_peers_averaged_without_weights_do_not(policy: Policy, rollout: Rollout, name: str) -> None:
    peers, one = peers_and_one(policy, rollout, section(LOSS_TYPES[name]))
    assert relative_difference(torch.stack([peer.vector for peer in peers]).mean(dim=0), one.vector) > 1e-3


def test_peers_with_bnpo_are_an_average_over_local_batches(policy: Policy, rollout: Rollout) -> None:
    """As TRL's is over micro-batches: each divided by its own tokens, all with the weight of their sequences."""
    peers, one = peers_and_one(policy, rollout, section({"loss_type": "bnpo"}))
    dapo, _ = peers_and_one(policy, rollout, section({"loss_type": "dapo"}))
    for peer, other in zip(peers, dapo, strict=True):
        assert torch.equal(peer.vector, other.vector)
    assert [peer.weight for peer in peers] == [GROUP, 2 * GROUP, 6 * GROUP]
    assert relative_difference(average(peers), one.vector) > 1e-3


@pytest.mark.parametrize("kind", ROLLOUTS)
@pytest.mark.parametrize(
    "settings",
    [{}, SEQUENCE, {"beta": 0.04}, {"loss_type": "bnpo"}, {"top_entropy_quantile": 0.3}],
    ids=["token", "sequence", "kl", "bnpo", "entropy"],
)
def test_micro_batches_do_not_matter(policy: Policy, kind: str, settings: Settings) -> None:
    rollout, grpo = ROLLOUTS[kind](), section(settings)
    small, large = (rollout_gradient(policy, rollout, grpo, budget) for budget in (30, 10_000))
    assert relative_difference(small.vector, large.vector) <= EXACT
    assert small.metrics == pytest.approx(large.metrics, rel=1e-10)
    assert small.weight == large.weight
    for one, other in zip(small.logps, large.logps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_metrics_are_trl_s(policy: Policy, rollout: Rollout) -> None:
    metrics = rollout_gradient(policy, rollout, KL, 100).metrics
    clip = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    assert metrics.keys() == {"loss", "kl"} | clip
    assert 0 < metrics["clip_ratio/low_mean"] < 1
    assert 0 < metrics["clip_ratio/high_mean"] < 1


@pytest.mark.parametrize("kind", ["adapter", "full", "tied"])
@pytest.mark.parametrize("name", ["dapo", "grpo", "dr_grpo"])
def test_gradient_is_the_slope_of_the_loss(kind: str, name: str) -> None:
    """Central differences along a random direction; the clip makes kinks, which a small step avoids."""
    policy, rollout = (
        random_policy(random_base(torch.float64, tied=kind == "tied"), full=kind != "adapter"),
        completions(),
    )
    grpo = section(LOSS_TYPES[name] | {"beta": 0.04})
    vector, start = rollout_gradient(policy, rollout, grpo, 200).vector, policy.flatten()
    direction = torch.randn(policy.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    losses = []
    for sign in (1, -1):
        policy.load_vector(start + sign * step * direction)
        losses.append(rollout_gradient(policy, rollout, grpo, 200).metrics["loss"])
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(vector @ direction), rel=1e-6)


def members_in_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences that the model gets, as they come."""
    members: list[int] = []

    def watched(rollout: Rollout, some: list[int], device: torch.device) -> Any:
        members.extend(some)
        return make_batch(rollout, some, device)

    monkeypatch.setattr(gradient, "make_batch", watched)
    return members


@pytest.mark.parametrize("name", [*LOSS_TYPES, "bnpo"])
def test_sequences_of_advantage_0_are_skipped_and_change_nothing(
    policy: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    grpo, members = section(LOSS_TYPES.get(name, {"loss_type": name})), members_in_passes(monkeypatch)
    zero = torch.arange(len(rollout.completions)).unsqueeze(1) % 3 == 0
    skipping = rollout_gradient(policy, replace(rollout, advantages=rollout.advantages.masked_fill(zero, 0)), grpo, 100)
    assert sorted(members) == [number for number in range(len(zero)) if number % 3 != 0]
    members.clear()
    # An advantage so small that it disappears beside the others is not skipped.
    tiny = replace(rollout, advantages=rollout.advantages.masked_fill(zero, 1e-200))
    forced = rollout_gradient(policy, tiny, grpo, 100)
    assert len(members) == len(zero)
    assert skipping.weight == forced.weight
    assert relative_difference(skipping.vector, forced.vector) <= EXACT
    assert skipping.metrics["loss"] == pytest.approx(forced.metrics["loss"], rel=1e-12)


@pytest.mark.parametrize("settings", [{"beta": 0.04}, {"top_entropy_quantile": 0.5}], ids=["kl", "entropy"])
def test_sequences_of_advantage_0_count_in_the_kl_and_in_the_entropies(
    policy: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    members = members_in_passes(monkeypatch)
    rollout_gradient(policy, replace(rollout, advantages=0 * rollout.advantages), section(settings), 100)
    assert set(members) == set(range(len(rollout.completions)))


def test_advantages_of_0_everywhere_are_a_gradient_of_0(policy: Policy, rollout: Rollout) -> None:
    result = rollout_gradient(policy, replace(rollout, advantages=0 * rollout.advantages), section({}), 100)
    assert not result.vector.any()
    assert result.weight == rollout.size.tokens
    assert result.metrics == {"loss": 0}


@pytest.mark.parametrize("name", [*LOSS_TYPES, "bnpo"])
def test_what_was_cut_counts_as_a_sequence_without_tokens(
    policy: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    grpo = section(LOSS_TYPES.get(name, {"loss_type": name}))
    without = torch.tensor([not counted for counted in cut().counted]).unsqueeze(1)
    members = members_in_passes(monkeypatch)
    result = rollout_gradient(policy, cut(), grpo, 100)
    assert sorted(members) == [number for number in range(len(without)) if number % 3 != 1]
    silent = rollout_gradient(
        policy, replace(rollout, advantages=rollout.advantages.masked_fill(without, 0)), grpo, 100
    )
    by_tokens = name in ("dapo", "bnpo", "cispo")
    factor = rollout.size.tokens / cut().size.tokens if by_tokens else 1.0
    assert relative_difference(result.vector, factor * silent.vector) <= EXACT
    # bnpo is divided by tokens and weighed by sequences.
    assert result.weight == (cut().size.tokens if name in ("dapo", "cispo") else len(rollout.completions))


@pytest.mark.parametrize("full", [False, True])
def test_gradient_checkpointing_computes_twice_and_the_same(rollout: Rollout, full: bool) -> None:
    plain = random_policy(random_base(torch.float64), full=full)
    saving = random_policy(random_base(torch.float64), full=full, gradient_checkpointing=True)
    calls: list[bool] = []
    saving.body.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    grpo = section({"top_entropy_quantile": 0.5})
    one, other = (rollout_gradient(policy, rollout, grpo, 10_000) for policy in (plain, saving))
    assert relative_difference(other.vector, one.vector) <= EXACT
    # For the entropies, for the loss, and again in the backward pass.
    assert len(calls) == 3
    assert calls[-1]
    assert not saving.model.training


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_is_the_base_or_the_version_whose_vector_was_loaded(rollout: Rollout, full: bool) -> None:
    policy, other = (
        random_policy(random_base(torch.float64), full=full),
        random_policy(random_base(torch.float64), full=full),
    )
    generator = torch.Generator().manual_seed(6)
    later = policy.flatten() + 0.02 * torch.randn(policy.size, generator=generator, dtype=torch.float64)
    base = torch.zeros(other.size) if not full else other._base  # an adapter of zeros does nothing
    before = policy.flatten()
    for loaded, vector in ((None, base), (later, later), (None, base)):
        policy.load_reference(loaded)
        assert vector is not None
        other.load_vector(vector)
        expected = mean_k3(other, policy, rollout)
        assert expected > 1e-4
        assert rollout_gradient(policy, rollout, KL, 100).metrics["kl"] == pytest.approx(expected, rel=1e-10)
        assert torch.equal(policy.flatten(), before)


def mean_k3(reference: Policy, policy: Policy, rollout: Rollout) -> float:
    """Of all tokens, times their ratios."""
    batch = make_batch(rollout, range(len(rollout.completions)), policy.device)
    with torch.no_grad():
        theirs, ours = (completion_logps(model, batch, KL.temperature)[0] for model in (reference, policy))
    k3 = (theirs - ours).exp() - (theirs - ours) - 1
    return ((ours - batch.behaviour_logps).exp() * k3)[batch.completion_mask].mean().item()


def test_a_reference_that_the_caller_changes_afterwards_stays(rollout: Rollout) -> None:
    policy = random_policy(random_base(torch.float64))
    vector = policy.flatten()
    policy.load_reference(vector)
    vector += 1.0
    assert rollout_gradient(policy, rollout, KL, 100).metrics["kl"] == pytest.approx(0, abs=1e-12)


def test_log_probabilities_come_with_the_gradient(policy: Policy) -> None:
    result = rollout_gradient(policy, cut(), section({}), 64)
    batch = make_batch(cut(), range(len(cut().completions)), policy.device)
    with torch.no_grad():
        logps, _ = completion_logps(policy, batch, 0.9)
    for number, row in enumerate(result.logps):
        expected = (
            logps[number, : len(cut().completions[number].token_ids)] if cut().counted[number] else torch.zeros(0)
        )
        torch.testing.assert_close(row, expected.to(row.dtype), rtol=1e-12, atol=1e-12)


def test_without_old_log_probabilities_the_correction_takes_the_current_ones(policy: Policy, rollout: Rollout) -> None:
    grpo = section(OPTIONS["token_truncate"])
    fresh = replace(rollout, old_logps=None)
    first = rollout_gradient(policy, fresh, grpo, 100)
    again = rollout_gradient(policy, replace(rollout, old_logps=first.logps), grpo, 100)
    assert relative_difference(first.vector, again.vector) <= EXACT
    assert first.metrics["clip_ratio/region_mean"] == 0
    assert relative_difference(rollout_gradient(policy, rollout, grpo, 100).vector, first.vector) > 1e-3


def test_without_a_correction_the_sampler_s_word_is_taken(policy: Policy, rollout: Rollout) -> None:
    with_old, without = (
        rollout_gradient(policy, replace(rollout, old_logps=old), section({}), 100) for old in (rollout.old_logps, None)
    )
    assert torch.equal(with_old.vector, without.vector)


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("qwen2", {}, True),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}, False),
        ("gemma2", {"final_logit_softcapping": None, "head_dim": 8}, True),
        ("cohere", {"logit_scale": 0.0625}, False),
        ("granite", {"logits_scaling": 2.0}, False),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_logits_are_the_model_s_own_where_more_is_done_to_them(
    rollout: Rollout, kind: str, settings: Settings, found: bool, full: bool
) -> None:
    """Gemma 2 caps its logits, Cohere and Granite scale theirs: then the head alone does not make them."""
    policy = small_policy(kind, full, settings)
    assert (policy.head is not None) == found
    expected = plain_gradient(policy, rollout)
    # float32, in which these models compute their norms whatever the precision
    assert relative_difference(rollout_gradient(policy, rollout, section({}), 10_000).vector, expected) <= 1e-5
    head = policy.model.get_output_embeddings()
    policy.head = None if found else head
    difference = relative_difference(rollout_gradient(policy, rollout, section({}), 10_000).vector, expected)
    assert difference <= 1e-5 if found else difference > 1e-2


def small_policy(kind: str, full: bool, settings: Settings) -> Policy:
    """A random model of this architecture."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    config = AutoConfig.for_model(kind, **shape, **heads, **ends, **settings)
    torch.manual_seed(0)
    return random_policy(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), full=full)


def plain_gradient(policy: Policy, rollout: Rollout) -> Tensor:
    """Of the loss over the model's logits and torch's log_softmax, in one batch."""
    grpo = section({})
    batch = make_batch(rollout, range(len(rollout.completions)), policy.device)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask.long()], dim=1)
    logits = policy.model(
        input_ids=torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
    ).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
    logps = (logits / grpo.temperature).log_softmax(-1).gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    inputs = LossInputs(logps, batch.behaviour_logps, None, None, batch.advantages, batch.completion_mask)
    loss = grpo_loss(inputs, grpo, rollout.size).loss
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, policy.parameters)])


def test_a_gradient_leaves_the_policy_as_it_was(policy: Policy, rollout: Rollout) -> None:
    before = policy.flatten()
    rollout_gradient(policy, rollout, KL, 200)
    assert torch.equal(policy.flatten(), before)
    assert all(value.grad is None and value.requires_grad for value in policy.parameters)


@pytest.mark.parametrize("settings", [{}, {"top_entropy_quantile": 0.5}], ids=["loss", "entropy"])
def test_cancelled_between_micro_batches(
    policy: Policy, rollout: Rollout, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    cancelled, batches = threading.Event(), []

    def watched(rollout: Rollout, members: list[int], device: torch.device) -> Any:
        batches.append(members)
        cancelled.set()
        return make_batch(rollout, members, device)

    monkeypatch.setattr(gradient, "make_batch", watched)
    with pytest.raises(Cancelled):
        rollout_gradient(policy, rollout, section(settings), 200, cancelled)
    assert len(batches) == 1


def test_a_gradient_that_is_not_finite_is_an_error(policy: Policy, rollout: Rollout) -> None:
    broken = replace(rollout, advantages=torch.full_like(rollout.advantages, math.nan))
    with pytest.raises(NumericsError, match="not finite"):
        rollout_gradient(policy, broken, section({}), 200)


def test_micro_batches_hold_every_member_once_within_the_budget() -> None:
    prompts, completions = [3, 9, 4, 4, 50, 1, 7], [7, 2, 2, 8, 60, 1, 7]
    batches = plan_batches([0, 1, 2, 3, 4, 5], prompts, completions, budget=40)
    assert sorted(member for batch in batches for member in batch) == [0, 1, 2, 3, 4, 5]
    for batch in batches:
        padded = len(batch) * (max(prompts[i] for i in batch) + max(completions[i] for i in batch))
        assert padded <= 40 or len(batch) == 1
    assert [4] in batches
    assert len(batches) < 6
