"""Micro-batches: sequences of similar length together, within a budget of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import pad_left


@dataclass(frozen=True)
class Batch:
    """Some sequences of a rollout as tensors: prompts padded on the left, completions on the right."""

    members: list[int]
    """Which sequences, in the rows' order."""
    prompt_ids: Tensor
    """(B, P)"""
    prompt_mask: Tensor
    """(B, P), 1 at tokens."""
    completion_ids: Tensor
    """(B, T)"""
    completion_mask: Tensor
    """(B, T) bool, True at tokens."""
    behaviour_logps: Tensor
    """(B, T), 0 at padding."""
    old_logps: Tensor | None
    """(B, T), 0 at padding, if the rollout has them."""
    advantages: Tensor
    """(B, 1) or (B, T)"""


def make_batch(rollout: Rollout, members: Sequence[int], device: torch.device) -> Batch:
    """The sequences numbered `members`, padded to the longest prompt and the longest completion among them."""
    completions = [rollout.completions[member] for member in members]
    prompt_ids, prompt_mask = pad_left([rollout.prompt_ids[member] for member in members], device)
    tokens = [torch.tensor(completion.token_ids, dtype=torch.long) for completion in completions]
    mask = pad_right([torch.ones(len(row), dtype=torch.bool) for row in tokens], device)
    old = rollout.old_logps
    return Batch(
        list(members),
        prompt_ids,
        prompt_mask,
        pad_right(tokens, device),
        mask,
        pad_right([completion.logps for completion in completions], device),
        pad_right([old[member] for member in members], device) if old is not None else None,
        rollout.advantages[list(members), : mask.shape[1]].to(device),
    )


def pad_right(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """Rows of different lengths as one tensor, with 0 where they have ended."""
    return pad_sequence(list(rows), batch_first=True).to(device)


def plan_batches(
    members: Sequence[int], prompt_lengths: Sequence[int], completion_lengths: Sequence[int], budget: int
) -> list[list[int]]:
    """Which members go together, so that rows x (longest prompt + longest completion) stays within `budget` tokens.

    Sorted by length, so that little is padding. A sequence that is longer than the budget goes alone.
    """
    order = sorted(members, key=lambda i: (completion_lengths[i], prompt_lengths[i], i), reverse=True)
    batches: list[list[int]] = []
    longest_prompt = longest_completion = 0
    for member in order:
        prompt = max(longest_prompt, prompt_lengths[member])
        completion = max(longest_completion, completion_lengths[member])
        if batches and (len(batches[-1]) + 1) * (prompt + completion) <= budget:
            batches[-1].append(member)
            longest_prompt, longest_completion = prompt, completion
        else:
            batches.append([member])
            longest_prompt, longest_completion = prompt_lengths[member], completion_lengths[member]
    return batches
