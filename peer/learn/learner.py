"""The learning side of a peer: everything between a lease and a contribution. For one thread."""

import hashlib
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from hivegrpo.peer.learn.collect import Collector, Sampled
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.evaluation import Evaluation, evaluate
from hivegrpo.peer.learn.gradient import Gradient, rollout_gradient, rollout_logps
from hivegrpo.peer.learn.policy import Layout, Policy, choose_device
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.templates import TemplateRenderer
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.config import PeerConfig, RunConfig


@dataclass(frozen=True)
class LearnedContribution:
    """What came of a lease. Offsets count from the lease's start; each is in exactly one of the three tuples."""

    vector: Tensor
    """(size,) float32 on the CPU; zeros if nothing was used."""
    weight: int
    """0 if nothing was used."""
    used: tuple[int, ...]
    dropped: tuple[int, ...]
    """Prompts that are empty, or longer than max_prompt_length, and groups that dynamic sampling replaced."""
    returned: tuple[int, ...]
    """Prompts that were not looked at: others may take them."""
    metrics: dict[str, float]
    """Under TRL's names."""
    num_tokens: int
    """Tokens of prompts and completions that were sampled."""
    seconds: dict[str, float]
    """rollout and gradient."""
    note: str = ""
    """Why there was nothing to learn, in a line; empty if there was."""
    on_gpu: bool = False
    """Whether a GPU did the work."""


@dataclass(frozen=True)
class Ahead:
    """What was sampled before the version is there whose gradient it is for."""

    lease: int
    sampled: Sampled
    rollout: Rollout | None
    seconds: float


@dataclass(frozen=True)
class Kept:
    """A rollout that is used again, and the offsets that it came from."""

    used: tuple[int, ...]
    rollout: Rollout


class Learner:
    """Owns policy, prompts and rewards."""

    def __init__(
        self,
        config: RunConfig,
        peer: PeerConfig,
        policy: Policy,
        encoder: PromptEncoder,
        prompts: Prompts,
        held_out: Prompts | None,
    ) -> None:
        """ConfigError if a reward function of the run is not installed."""
        self.config, self.peer = config, peer
        self.policy, self.encoder = policy, encoder
        self.prompts, self.held_out = prompts, held_out
        self.pool = RewardPool.of(find_rewards(config.rewards.functions, config.rewards.options), peer)
        self.collector = Collector(config, peer, encoder, prompts, self.pool)
        self.version = 0
        self._kept: dict[int, Kept] = {}
        self._ahead: Ahead | None = None

    @classmethod
    def open(
        cls, config: RunConfig, peer: PeerConfig, model: Path, prompts: Prompts, held_out: Prompts | None = None
    ) -> Self:
        """Load the base model in the folder `model`; ConfigError if something of the run cannot work here."""
        device = choose_device(peer.device)
        if peer.threads is not None:
            torch.set_num_threads(peer.threads)
        tokenizer = load_tokenizer(model)
        chat = tokenizer.chat_template is not None and config.dataset.prompt_template is None
        encoder = PromptEncoder(tokenizer, config.dataset, TemplateRenderer(tokenizer) if chat else None)
        policy = Policy.load(
            model, config.model, config.lora, device, gradient_checkpointing=peer.gradient_checkpointing
        )
        return cls(config, peer, policy, encoder, prompts, held_out)

    def close(self) -> None:
        """End the processes that score, and that of the chat template."""
        self.pool.close()
        self.encoder.close()

    @property
    def layout(self) -> Layout:
        """Names and shapes of the vector's parts."""
        return self.policy.layout

    def load(self, version: int, vector: Tensor) -> None:
        """Take over the parameters of a version, (size,) float32."""
        self.policy.load_vector(vector)
        self.version = version

    def load_reference(self, vector: Tensor | None) -> None:
        """Take over the parameters of the KL reference; None is version 0, the base."""
        self.policy.load_reference(vector)

    def sample(self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event) -> None:
        """The first half of `contribute`, under the parameters that are loaded now; `contribute` goes on from it.

        So the rollout lies behind the gradient by the versions that are loaded in between.
        """
        self._ahead = None
        ahead = self._sample(lease, range(start, start + count), wanted, cancelled)
        grpo = self.config.grpo
        if ahead.rollout is not None and grpo.importance_sampling_correction:
            began, tokens = time.monotonic(), self.peer.micro_batch_tokens
            # The ratio of the loss is to these, and they cannot be had any more once another version is loaded.
            old_logps = rollout_logps(self.policy, ahead.rollout, grpo, tokens, cancelled)
            rollout = replace(ahead.rollout, old_logps=old_logps)
            ahead = replace(ahead, rollout=rollout, seconds=ahead.seconds + time.monotonic() - began)
        self._ahead = ahead

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        """Work on `count` positions of the run's order, from `start`: sample, score, differentiate.

        At most `wanted` groups are used; the other positions are there for dynamic sampling. `lease` seeds the
        sampling. What `sample` has left of this lease is used, unless it lies more than max_staleness versions behind.
        Raises Cancelled soon after the event is set.
        """
        grpo, policy = self.config.grpo, self.policy
        ahead = self._taken_ahead(lease) or self._sample(lease, range(start, start + count), wanted, cancelled)
        sampled, rollout = ahead.sampled, ahead.rollout
        seconds, began = {"rollout": ahead.seconds}, time.monotonic()
        if rollout is None or rollout.size.weight(grpo) == 0:
            vector, weight, metrics = torch.zeros(policy.size), 0, sampled.metrics
        else:
            gradient = self._first_gradient(lease, sampled.used, rollout, cancelled)
            vector, weight, metrics = gradient.vector.float(), gradient.weight, sampled.metrics | gradient.metrics
            seconds["gradient"] = time.monotonic() - began
        used = sampled.used if weight else ()
        return LearnedContribution(
            vector=vector,
            weight=weight,
            used=used,
            dropped=tuple(sorted(set(range(count)) - {*used, *sampled.untouched})),
            returned=sampled.untouched,
            metrics=metrics,
            num_tokens=int(metrics.get("num_tokens", 0)),
            seconds=seconds,
            note=sampled.why_nothing(rollout),
            on_gpu=policy.device.type == "cuda",
        )

    def _sample(self, lease: int, positions: range, wanted: int, cancelled: threading.Event) -> Ahead:
        began = time.monotonic()
        generator = torch.Generator(self.policy.device).manual_seed(lease_seed(self.config.run.seed, lease))
        sampled = self.collector.collect(self.policy, positions, wanted, generator, cancelled)
        return Ahead(lease, sampled, sampled.rollout(self.version), time.monotonic() - began)

    def _taken_ahead(self, lease: int) -> Ahead | None:
        """What was sampled ahead for a lease, once."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.lease != lease:
            return None
        stale = ahead.rollout is not None and self.version - ahead.rollout.version > self.config.grpo.max_staleness
        return None if stale else ahead

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        """Another gradient of the lease's rollout, at the parameters that are loaded now (num_iterations).

        None if the rollout is gone, or its version is more than max_staleness behind.
        """
        grpo, kept = self.config.grpo, self._kept.get(lease)
        if kept is None or self.version - kept.rollout.version > grpo.max_staleness:
            return None
        began = time.monotonic()
        gradient = rollout_gradient(self.policy, kept.rollout, grpo, self.peer.micro_batch_tokens, cancelled)
        if iteration + 1 >= grpo.num_iterations:
            del self._kept[lease]
        return LearnedContribution(
            vector=gradient.vector.float(),
            weight=gradient.weight,
            used=kept.used,
            dropped=(),
            returned=(),
            metrics=gradient.metrics | {"num_completion_tokens": float(kept.rollout.size.tokens)},
            num_tokens=0,
            seconds={"gradient": time.monotonic() - began},
            on_gpu=self.policy.device.type == "cuda",
        )

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        """Greedy accuracy on the held-out rows, by the run's first reward function."""
        section = self.config.evaluation
        assert section is not None
        assert self.held_out is not None
        rows = self.held_out.rows[: section.limit]
        length, tokens = self.config.grpo.max_completion_length, self.peer.sampling_tokens
        return evaluate(self.policy, self.encoder, rows, self.pool, length, tokens, cancelled)

    def _first_gradient(
        self, lease: int, used: tuple[int, ...], rollout: Rollout, cancelled: threading.Event
    ) -> Gradient:
        """The first gradient of a rollout, which is kept if there are to be more."""
        grpo = self.config.grpo
        gradient = rollout_gradient(self.policy, rollout, grpo, self.peer.micro_batch_tokens, cancelled)
        if grpo.num_iterations > 1:
            old_logps = gradient.logps if grpo.importance_sampling_correction else None
            # One lease is outstanding at a time: what an earlier one left is never asked for again.
            self._kept = {lease: Kept(used, replace(rollout, old_logps=old_logps))}
        return gradient


def lease_seed(run_seed: int, lease: int) -> int:
    """Seed of a lease's sampling: the first 8 bytes of SHA-256("seed/lease")."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{lease}".encode()).digest()[:8])
