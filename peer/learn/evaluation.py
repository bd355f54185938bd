"""Accuracy on held-out rows, greedily."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hivegrpo.peer.learn.data import PROMPT
from hivegrpo.peer.learn.encoding import PromptEncoder, as_messages, end_token_ids
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.sampler import Sampling, sample_within
from hivegrpo.peer.rewards.pool import RewardPool


@dataclass(frozen=True)
class Evaluation:
    """How many of the problems the policy solves when it always takes the most probable token."""

    solved: int
    problems: int

    @property
    def accuracy(self) -> float:
        return self.solved / self.problems

    @property
    def metrics(self) -> dict[str, float]:
        """As they go into a version's manifest: the share, and of how many, without which it has no interval."""
        return {"eval/accuracy": self.accuracy, "eval/problems": float(self.problems)}


def evaluate(
    policy: Policy,
    encoder: PromptEncoder,
    rows: Sequence[dict[str, Any]],
    pool: RewardPool,
    max_completion_length: int,
    sampling_tokens: int,
    cancelled: threading.Event | None = None,
) -> Evaluation:
    """One greedy completion of each row; solved are those that the pool's first reward function gives 1 or more.

    A prompt without a single token can't be completed, and is not solved. NumericsError as `sample`.
    """
    assert rows
    problems, encoded = len(rows), [encoder.encode(row[PROMPT]) for row in rows]
    rows = [row for row, ids in zip(rows, encoded, strict=True) if ids]
    if not rows:
        return Evaluation(0, problems)
    completions = sample_within(
        sampling_tokens,
        policy.model,
        [ids for ids in encoded if ids],
        1,
        Sampling(max_completion_length, temperature=0.0),
        end_token_ids(encoder.tokenizer, policy.model.generation_config),
        torch.Generator(policy.device),
        cancelled,
    )
    token_ids = [completion.token_ids for completion in completions]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != PROMPT}
    prompts = [row[PROMPT] for row in rows]
    answers = [as_messages(prompt, text) for prompt, text in zip(prompts, encoder.decode(token_ids), strict=True)]
    scores = pool.score(prompts, answers, token_ids, columns, cancelled)[0].scores
    return Evaluation(sum(isinstance(score, float) and score >= 1.0 for score in scores), problems)
