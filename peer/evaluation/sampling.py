"""Completions of a benchmark's problems, sampled and scored batch by batch, as far as the ledger does not have them.

Each row of a batch has a random generator of its own, seeded with SHA-256("seed/problem/sample"). So a completion
depends on neither the batch that it was sampled in, nor the number of samples, nor the limit, nor on where an
evaluation was interrupted; and all models get the same noise, which makes their difference more certain.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from hivegrpo.peer.evaluation.conditions import Conditions
from hivegrpo.peer.evaluation.ledger import Attempt, Ledger
from hivegrpo.peer.learn.data import PROMPT
from hivegrpo.peer.learn.encoding import PromptEncoder, as_messages, end_token_ids
from hivegrpo.peer.learn.sampler import context_of, sample_within
from hivegrpo.peer.learn.sources import Row
from hivegrpo.peer.rewards.base import Score
from hivegrpo.peer.rewards.pool import RewardPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROWS = 1024
"""Completions between two syncs of the ledger, at most, unless one problem has more."""


@dataclass(frozen=True, slots=True)
class Todo:
    """A problem with completions that are missing."""

    problem: int
    row: Row
    ids: list[int]
    """Of its prompt."""
    samples: tuple[int, ...]
    """Those that are missing."""


def sample_missing(
    model: "PreTrainedModel",
    encoder: PromptEncoder,
    rows: Sequence[Row],
    copies: int,
    conditions: Conditions,
    pool: RewardPool,
    ledger: Ledger,
    budget: int,
    on_done: Callable[[int], None],
    cancelled: threading.Event | None = None,
) -> list[int]:
    """Bring the ledger to `copies` completions of each row; the rows (by place) that do not fit are returned.

    A prompt does not fit if it has no token, or with max_completion_length more than the model can look back at.
    budget: tokens, prompts included, that are sampled side by side. `on_done` is told of completions as they are there.
    The pool's only function scores. Raises Cancelled, and NumericsError as `sample`.
    """
    context = context_of(model)
    todo, unfit = list[Todo](), list[int]()
    for problem, row in enumerate(rows):
        ids = encoder.encode(row[PROMPT])
        if not 0 < len(ids) <= context - conditions.max_completion_length:
            unfit.append(problem)
            continue
        missing = tuple(sample for sample in range(copies) if (problem, sample) not in ledger.outcomes)
        on_done(copies - len(missing))
        if missing:
            todo.append(Todo(problem, row, ids, missing))
    on_done(len(unfit) * copies)
    ends = end_token_ids(encoder.tokenizer, model.generation_config)
    for batch in _batches(todo, conditions.max_completion_length, budget):
        owners = [(each, sample) for each in batch for sample in each.samples]
        completions = sample_within(
            budget,
            model,
            [each.ids for each in batch],
            len(batch[0].samples),
            conditions.sampling,
            ends,
            [_generator(conditions.seed, each.problem, sample, model.device) for each, sample in owners],
            cancelled,
        )
        token_ids = [completion.token_ids for completion in completions]
        texts = encoder.decode(token_ids)
        prompts = [each.row[PROMPT] for each, _ in owners]
        answers = [as_messages(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        columns = {name: [each.row[name] for each, _ in owners] for name in batch[0].row if name != PROMPT}
        [scored] = pool.score(prompts, answers, token_ids, columns, cancelled)
        ledger.append(
            Attempt(each.problem, sample, text, len(completion.token_ids), completion.terminated, _number(score))
            for (each, sample), text, completion, score in zip(owners, texts, completions, scored.scores, strict=True)
        )
        on_done(len(owners))
    return unfit


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """Seed of one completion: the first 8 bytes of SHA-256("seed/problem/sample")."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{problem}/{sample}".encode()).digest()[:8])


def _generator(seed: int, problem: int, sample: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(sample_seed(seed, problem, sample))


def _batches(todo: Sequence[Todo], length: int, budget: int) -> Iterator[Sequence[Todo]]:
    """Neighbours that lack the same samples, as many as go within the budget side by side."""
    for samples, group in groupby(todo, key=lambda each: each.samples):
        alike = list(group)
        longest = max(len(each.ids) for each in alike) + length
        step = max(1, min(budget // longest, MAX_ROWS) // len(samples))
        yield from (alike[start : start + step] for start in range(0, len(alike), step))


def _number(score: Score) -> float | None:
    """Rewards of steps say nothing of the whole, as in training's own evaluation."""
    return score if isinstance(score, float) else None
