"""A small random policy and a random rollout for it, in any precision."""

import math
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Completion
from hivegrpo.protocol.config import LoraSection

VOCABULARY = 40
GROUP = 4
GROUPS = 9
LONGEST = 3 + GROUPS
"""No completion is longer, tokens."""


def random_base(dtype: torch.dtype, *, tied: bool = False) -> PreTrainedModel:
    """A random Qwen2, which computes in the given precision throughout; tied: embeddings are the head's weight."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Qwen2RMSNorm):  # it computes in float32 whatever its dtype; torch's does not
                setattr(module, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype))
    return model


def random_policy(base: PreTrainedModel, *, full: bool = False, gradient_checkpointing: bool = False) -> Policy:
    """A policy with an adapter in which nothing is zero; if `full`, one whose own parameters are all off the base's."""
    policy = Policy(base, None if full else LoraSection(r=4, alpha=8), gradient_checkpointing=gradient_checkpointing)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(policy.size, generator=generator, dtype=torch.float64)
    policy.load_vector(policy.flatten().double() + 0.05 * noise if full else 0.3 * noise)
    return policy


def random_rollout() -> Rollout:
    """Random tokens of many lengths (later groups are longer), rewarded at random, sampled by no policy at all."""
    generator = torch.Generator().manual_seed(2)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=generator).tolist()

    prompt_ids, completions = [], []
    for group in range(GROUPS):
        prompt_ids += [ids(number(2, 8))] * GROUP
        for _ in range(GROUP):
            length = number(1, 4 + group)
            # A uniform distribution's, roughly: the ratios are on both sides of the clip range.
            logps = -math.log(VOCABULARY) + 0.3 * torch.randn(length, generator=generator, dtype=torch.float64)
            completions.append(Completion(ids(length), logps, torch.zeros(length), terminated=True))
    advantages = torch.randn(GROUPS * GROUP, 1, generator=generator, dtype=torch.float64)
    return Rollout(0, prompt_ids, completions, advantages, [True] * len(completions))


def part(rollout: Rollout, groups: slice) -> Rollout:
    """Some of a rollout's groups."""
    members = slice(groups.start * GROUP, groups.stop * GROUP)
    return replace(
        rollout,
        prompt_ids=rollout.prompt_ids[members],
        completions=rollout.completions[members],
        advantages=rollout.advantages[members],
        counted=rollout.counted[members],
        old_logps=rollout.old_logps[members] if rollout.old_logps is not None else None,
    )
