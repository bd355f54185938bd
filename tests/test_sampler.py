"""Sampling from the policy."""

from typing import Any

import pytest
import torch
from support.models import END, load_policy, save_model, spread

from hivegrpo.peer.learn.batches import make_batch
from hivegrpo.peer.learn.gradient import completion_logps
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Completion, Sampling, narrow, sample, sample_within, stream
from hivegrpo.protocol.errors import NumericsError

PROMPTS = [[49, 43, 50, 61], [55, 61], [50, 43, 50, 43, 50, 61]]

FOURTH = frozenset(range(0, 257, 4))
"""Ends: about every fourth token is one of them."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return spread(load_policy(folder))


def draw(
    policy: Policy, copies: int = 3, seed: int = 0, ends: frozenset[int] = frozenset({END}), **changes: Any
) -> list[Completion]:
    sampling = Sampling(**{"max_completion_length": 8, **changes})
    return sample(policy.model, PROMPTS, copies, sampling, ends, torch.Generator().manual_seed(seed))


def test_sampling_is_seeded(policy: Policy) -> None:
    tokens = [completion.token_ids for completion in draw(policy)]
    assert tokens == [completion.token_ids for completion in draw(policy)]
    assert tokens != [completion.token_ids for completion in draw(policy, seed=1)]
    assert len({tuple(ids) for ids in tokens}) > 1


def test_completions_stop_at_the_end_token_or_at_the_limit(policy: Policy) -> None:
    completions = draw(policy, 40, max_completion_length=6, ends=FOURTH)
    for completion in completions:
        ends = [token % 4 == 0 for token in completion.token_ids]
        assert not any(ends[:-1])
        assert completion.terminated == ends[-1]
        assert completion.terminated or len(ends) == 6
        assert completion.logps.shape == completion.entropies.shape == (len(ends),)
    assert {len(completion.token_ids) for completion in completions} == {1, 2, 3, 4, 5, 6}
    assert {completion.terminated for completion in completions} == {True, False}


def test_behaviour_logps_and_entropies_are_those_of_the_loss(policy: Policy) -> None:
    """Whatever the padding, the cache, the rows that have ended, and top_k: float32 in another order."""
    completions = draw(policy, 20, max_completion_length=6, temperature=0.7, top_k=50, ends=FOURTH)
    prompt_ids = [ids for ids in PROMPTS for _ in range(20)]
    rollout = Rollout(0, prompt_ids, completions, torch.zeros(60, 1), [True] * 60)
    batch = make_batch(rollout, range(60), policy.device)
    with torch.no_grad():
        logps, entropies = completion_logps(policy, batch, 0.7)
    assert (logps - batch.behaviour_logps)[batch.completion_mask].abs().max() < 1e-5
    for row, completion in zip(entropies, completions, strict=True):
        torch.testing.assert_close(row[: len(completion.entropies)], completion.entropies, rtol=1e-5, atol=1e-5)


def test_samples_have_the_frequencies_of_the_softmax(policy: Policy) -> None:
    """20,000 first tokens at temperature 0.5: each frequency within 5 standard errors of its probability."""
    count = 20_000
    completions = sample(
        policy.model,
        PROMPTS[:1],
        count,
        Sampling(max_completion_length=1, temperature=0.5),
        frozenset(),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1)
    found = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=257) / count
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def test_greedy_equals_generate(policy: Policy) -> None:
    for prompt, completion in zip(PROMPTS, draw(policy, copies=1, temperature=0.0), strict=True):
        expected = policy.model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_batches_within_a_budget_hold_all_prompts_in_order(policy: Policy) -> None:
    sampling = Sampling(max_completion_length=4, temperature=0.0)
    arguments = (policy.model, PROMPTS, 2, sampling, frozenset({END}), torch.Generator())
    small, large = sample_within(1, *arguments), sample_within(10_000, *arguments)
    assert [completion.token_ids for completion in small] == [completion.token_ids for completion in large]


@pytest.mark.parametrize(
    ("top_p", "top_k", "expected"),
    [
        (1.0, 0, [0.0625, 0.5, 0.25, 0.1875]),
        (1.0, 2, [0.0, 0.5, 0.25, 0.0]),
        (0.75, 0, [0.0, 0.5, 0.25, 0.0]),
        (0.76, 0, [0.0, 0.5, 0.25, 0.1875]),
        (0.5, 2, [0.0, 0.5, 0.0, 0.0]),  # more than half of the 0.75 that top_k left
        (1e-9, 0, [0.0, 0.5, 0.0, 0.0]),
    ],
)
def test_narrow(top_p: float, top_k: int, expected: list[float]) -> None:
    probabilities = torch.tensor([[0.0625, 0.5, 0.25, 0.1875]], dtype=torch.float64)
    assert narrow(probabilities, top_p, top_k).tolist() == [expected]


def test_a_stream_gives_the_tokens_of_a_sample(policy: Policy) -> None:
    for settings in (Sampling(8, temperature=0.0), Sampling(8, 0.9, top_p=0.9, top_k=20)):
        for seed in range(4):
            [expected] = sample(policy.model, PROMPTS[:1], 1, settings, FOURTH, torch.Generator().manual_seed(seed))
            generator = torch.Generator().manual_seed(seed)
            assert list(stream(policy.model, PROMPTS[0], settings, FOURTH, generator)) == expected.token_ids


def test_a_stream_ends_at_logits_that_are_not_finite(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivegrpo.peer.learn.sampler._forward", lambda *_: torch.full((1, 257), torch.nan))
    with pytest.raises(NumericsError):
        next(stream(policy.model, PROMPTS[0], Sampling(2), FOURTH, torch.Generator()))
