"""The learning side of a peer: everything between a lease and a contribution. For one thread."""

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hivegrpo.peer.learn.data import PROMPT, Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder, end_token_ids, load_tokenizer
from hivegrpo.peer.learn.evaluation import Evaluation, evaluate
from hivegrpo.peer.learn.gradient import rollout_gradient
from hivegrpo.peer.learn.policy import Layout, Policy, choose_device
from hivegrpo.peer.learn.rollout import Rollout, make_rollout
from hivegrpo.peer.learn.sampler import Sampling, sample_within
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.permutation import prompt_index


@dataclass(frozen=True)
class LearnedContribution:
    """What came of a lease. Offsets count from the lease's start; each is in exactly one of the three tuples."""

    vector: Tensor
    """(size,) float32 on the CPU; zeros if nothing was used."""
    weight: int
    """0 if nothing was used."""
    used: tuple[int, ...]
    dropped: tuple[int, ...]
    """Prompts that are empty, or longer than max_prompt_length."""
    returned: tuple[int, ...]
    """Prompts that others may take."""
    metrics: dict[str, float]
    """Under TRL's names."""
    num_tokens: int
    """Tokens of prompts and completions."""
    seconds: dict[str, float]
    """rollout and gradient."""


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
        self.rewards = find_rewards(config.rewards.functions)
        self.weights = config.rewards.weights or (1.0,) * len(self.rewards)
        self.end_ids = end_token_ids(encoder.tokenizer, policy.model.generation_config)

    @classmethod
    def open(
        cls, config: RunConfig, peer: PeerConfig, model: Path, prompts: Prompts, held_out: Prompts | None = None
    ) -> Self:
        """Load the base model in the folder `model`; ConfigError if something of the run cannot work here."""
        device = choose_device(peer.device)
        if peer.threads is not None:
            torch.set_num_threads(peer.threads)
        encoder = PromptEncoder(load_tokenizer(model), config.dataset)
        policy = Policy.load(
            model,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
            lora=config.lora,
            device=device,
        )
        return cls(config, peer, policy, encoder, prompts, held_out)

    @property
    def layout(self) -> Layout:
        """Names and shapes of the vector's parts."""
        return self.policy.layout

    def load(self, vector: Tensor) -> None:
        """Take over the parameters of a version, (size,) float32."""
        self.policy.load_vector(vector)

    def contribute(self, lease: int, start: int, count: int, cancelled: threading.Event) -> LearnedContribution:
        """Work on the prompts at `count` positions of the run's order, from `start`: sample, score, differentiate.

        `lease` seeds the sampling. Raises Cancelled soon after the event is set.
        """
        began = time.monotonic()
        size, seed, grpo = len(self.prompts), self.config.run.seed, self.config.grpo
        rows = [self.prompts.rows[prompt_index(start + offset, size, seed)] for offset in range(count)]
        prompt_ids = [self.encoder.encode(row[PROMPT]) for row in rows]
        used = tuple(offset for offset, ids in enumerate(prompt_ids) if 0 < len(ids) <= grpo.max_prompt_length)
        dropped = tuple(sorted(set(range(count)) - set(used)))
        if not used:
            return LearnedContribution(torch.zeros(self.policy.size), 0, (), dropped, (), {}, 0, {})
        rollout = self._rollout(
            [rows[offset] for offset in used], [prompt_ids[offset] for offset in used], lease, cancelled
        )
        sampled = time.monotonic()
        gradient = rollout_gradient(self.policy, rollout, grpo, self.peer.micro_batch_tokens, cancelled)
        seconds = {"rollout": sampled - began, "gradient": time.monotonic() - sampled}
        return LearnedContribution(
            vector=gradient.vector.float(),
            weight=gradient.weight,
            used=used,
            dropped=dropped,
            returned=(),
            metrics=rollout.metrics | gradient.metrics,
            num_tokens=int(rollout.metrics["num_tokens"]),
            seconds=seconds,
        )

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        """Greedy accuracy on the held-out rows, by the run's first reward function."""
        section = self.config.evaluation
        assert section is not None
        assert self.held_out is not None
        rows = self.held_out.rows[: section.limit]
        length, tokens = self.config.grpo.max_completion_length, self.peer.sampling_tokens
        return evaluate(self.policy, self.encoder, rows, self.rewards[0], length, tokens, cancelled)

    def _rollout(
        self, rows: list[dict[str, Any]], prompt_ids: list[list[int]], lease: int, cancelled: threading.Event
    ) -> Rollout:
        grpo = self.config.grpo
        completions = sample_within(
            self.peer.sampling_tokens,
            self.policy.model,
            prompt_ids,
            grpo.num_generations,
            Sampling(grpo.max_completion_length, grpo.temperature, grpo.top_p, grpo.top_k),
            self.end_ids,
            torch.Generator(self.policy.device).manual_seed(lease_seed(self.config.run.seed, lease)),
            cancelled,
        )
        texts = self.encoder.decode([completion.token_ids for completion in completions])
        return make_rollout(rows, prompt_ids, completions, texts, self.rewards, self.weights, grpo)


def lease_seed(run_seed: int, lease: int) -> int:
    """Seed of a lease's sampling: the first 8 bytes of SHA-256("seed/lease")."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{lease}".encode()).digest()[:8])
