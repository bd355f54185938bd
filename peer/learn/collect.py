"""From positions of the run's order to scored groups: prompts, completions, rewards, and which of them are used."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import structlog
import torch

from hivegrpo.peer.learn.advantages import Advantages
from hivegrpo.peer.learn.cancel import check
from hivegrpo.peer.learn.data import PROMPT, Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder, as_messages, end_token_ids
from hivegrpo.peer.learn.messages import Prompt
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Group, Rollout, compare, make_rollout, rollout_metrics
from hivegrpo.peer.learn.sampler import Sampling, sample_within
from hivegrpo.peer.rewards.base import Scored
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.permutation import prompt_index

log = structlog.get_logger(__name__)


@dataclass
class Sampled:
    """What was sampled of a lease, by offsets into it."""

    config: RunConfig
    groups: dict[int, Group] = field(default_factory=dict)
    unfit: list[int] = field(default_factory=list)
    """Prompts that are empty, longer than max_prompt_length, or refused by the chat template."""
    untouched: tuple[int, ...] = ()
    """Prompts that were not looked at."""
    failed: dict[str, int] = field(default_factory=dict)
    """Completions that a reward function could not score, by its name."""
    compared: Advantages | None = None
    """Of all groups, in order; None without one."""

    @property
    def used(self) -> tuple[int, ...]:
        """Groups that count: all, or with dynamic sampling those whose rewards differ."""
        if self.compared is None or self.config.grpo.dynamic_sampling_factor == 1.0:
            return tuple(self.groups)
        informative = self.compared.informative.tolist()
        return tuple(offset for offset, differs in zip(self.groups, informative, strict=True) if differs)

    @property
    def metrics(self) -> dict[str, float]:
        """Of all that was sampled, used or not, under TRL's names."""
        counts = {
            "prompts/dropped": float(len(self.unfit)),
            "groups/dropped": float(len(self.groups) - len(self.used)),
            **{f"rewards/{name}/failed": float(count) for name, count in self.failed.items()},
        }
        if self.compared is None:
            return counts
        names = self.config.rewards.functions
        return counts | rollout_metrics(list(self.groups.values()), names, self.compared)

    def rollout(self, version: int) -> Rollout | None:
        """Of the groups that count; None without one."""
        groups = [self.groups[offset] for offset in self.used]
        if not groups or self.compared is None:
            return None
        # Compared once more without the groups that were dropped: they would be in the std of a whole batch.
        compared = self.compared if len(groups) == len(self.groups) else _compare(groups, self.config)
        return make_rollout(groups, compared.values, version, self.config.grpo)

    def why_nothing(self, rollout: Rollout | None) -> str:
        """Why there is nothing to learn, in a line; empty if there is something."""
        if self.compared is None:
            return f"all {len(self.unfit)} prompts are empty, or longer than max_prompt_length"
        if rollout is not None and not any(rollout.counted):
            return f"all {len(rollout.completions)} completions were cut at max_completion_length, and are masked"
        if self.compared.informative.any() or (rollout is not None and self.config.grpo.beta != 0.0):
            return ""
        rewards = self.compared.rewards
        if rewards.isnan().all():
            return f"no reward function could score any of the {len(rewards)} completions"
        values = ", ".join(f"{value:g}" for value in sorted(set(rewards[~rewards.isnan()].tolist()))[:3])
        return f"within each of {len(self.groups)} groups all rewards are equal ({values})"


class Collector:
    """Samples and scores. The rewards that it uses are the pool's, in the order of the run."""

    def __init__(
        self, config: RunConfig, peer: PeerConfig, encoder: PromptEncoder, prompts: Prompts, pool: RewardPool
    ) -> None:
        self.config, self.peer = config, peer
        self.encoder, self.prompts, self.pool = encoder, prompts, pool

    def collect(
        self,
        policy: Policy,
        positions: range,
        wanted: int,
        generator: torch.Generator,
        cancelled: threading.Event | None = None,
    ) -> Sampled:
        """Groups of the prompts at these positions of the run's order, until `wanted` of them count.

        With dynamic sampling, groups whose rewards are all equal are replaced by those of the next positions, as far
        as these go (DAPO, arXiv:2503.14476). Raises Cancelled soon after the event is set.
        """
        sampled = Sampled(self.config)
        fitting = self._fitting(positions, sampled.unfit, cancelled)
        while wave := list(islice(fitting, wanted - len(sampled.used))):
            groups, scored = self._score(policy, wave, generator, cancelled)
            sampled.groups |= zip((offset for offset, _, _ in wave), groups, strict=True)
            for reward, result in zip(self.pool.rewards, scored, strict=True):
                sampled.failed[reward.name] = sampled.failed.get(reward.name, 0) + result.failed
                if result.failed:
                    log.warning("completions not scored", reward=reward.name, failed=result.failed, first=result.why)
            sampled.compared = _compare(list(sampled.groups.values()), self.config)
        seen = {*sampled.groups, *sampled.unfit}
        sampled.untouched = tuple(offset for offset in range(len(positions)) if offset not in seen)
        return sampled

    def _fitting(
        self, positions: range, unfit: list[int], cancelled: threading.Event | None
    ) -> Iterator[tuple[int, dict[str, Any], list[int]]]:
        """Offset, row and token ids of the prompts that can be used; the others are noted as unfit on the way."""
        size, seed = len(self.prompts), self.config.run.seed
        for offset, position in enumerate(positions):
            row = self.prompts.rows[prompt_index(position, size, seed)]
            check(cancelled)
            ids = self._encode(row[PROMPT])
            if 0 < len(ids) <= self.config.grpo.max_prompt_length:
                yield offset, row, ids
            else:
                unfit.append(offset)

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids; none of a prompt that the model's chat template refuses."""
        try:
            return self.encoder.encode(prompt)
        except ConfigError as error:
            log.warning("a prompt cannot be used", reason=error.message)
            return []

    def _score(
        self,
        policy: Policy,
        wave: Sequence[tuple[int, dict[str, Any], list[int]]],
        generator: torch.Generator,
        cancelled: threading.Event | None,
    ) -> tuple[list[Group], list[Scored]]:
        """A group of each prompt, scored; and the scores of all, by reward function."""
        grpo, copies = self.config.grpo, self.config.grpo.num_generations
        completions = sample_within(
            self.peer.sampling_tokens,
            policy.model,
            [ids for _, _, ids in wave],
            copies,
            Sampling(grpo.max_completion_length, grpo.temperature, grpo.top_p, grpo.top_k),
            end_token_ids(self.encoder.tokenizer, policy.model.generation_config),
            generator,
            cancelled,
        )
        token_ids = [completion.token_ids for completion in completions]
        texts = self.encoder.decode(token_ids)
        rows = [row for _, row, _ in wave for _ in range(copies)]
        prompts = [row[PROMPT] for row in rows]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != PROMPT}
        answers = [as_messages(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        scored = self.pool.score(prompts, answers, token_ids, columns, cancelled)
        groups = []
        for number, (_, row, ids) in enumerate(wave):
            part = slice(number * copies, (number + 1) * copies)
            scores = [result.scores[part] for result in scored]
            groups.append(Group(row, ids, completions[part], texts[part], scores))
        return groups, scored


def _compare(groups: Sequence[Group], config: RunConfig) -> Advantages:
    weights = config.rewards.weights or (1.0,) * len(config.rewards.functions)
    return compare(groups, weights, config.grpo)
