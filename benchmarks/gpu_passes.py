"""Models of real shapes with random weights, and whether gradients on a device are the CPU's. Part of `gpu.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hivegrpo.peer.learn.gradient import rollout_gradient
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.learn.sampler import Sampling, sample
from hivegrpo.peer.learn.weights import ONE_AT_A_TIME
from hivegrpo.protocol.config import GrpoSection, LoraSection

GENERATIONS = 8


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    tied: bool
    vocabulary: int = 151_936


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, tied=True, vocabulary=512),
    "0.5B": Shape(896, 24, 14, 2, 4864, tied=True),
    "1.5B": Shape(1536, 28, 12, 2, 8960, tied=True),
    "7B": Shape(3584, 28, 28, 4, 18_944, tied=False),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "kl": {"beta": 0.1},
    "gspo, corrected": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "importance_sampling_correction": True,
        "importance_sampling_mode": "token_truncate",
        "off_policy_mask_threshold": 0.5,
    },
    "cispo": {"loss_type": "cispo"},
    "high entropy": {"top_entropy_quantile": 0.5},
    "narrowed": {"top_p": 0.9, "top_k": 20},
}


def random_base(shape: Shape, device: str, dtype: torch.dtype, *, spread: float = 0.02) -> Any:
    """A model with random weights, of that standard deviation, made where it is to be."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        initializer_range=spread,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device), ONE_AT_A_TIME:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def measure_passes(device: str) -> dict[str, Any]:
    """For each setting, a rollout that the device samples, and the difference of its gradient there and on the CPU."""
    outcome: dict[str, Any] = {}
    for trained, lora in (("adapter", LoraSection()), ("all", None)):
        # So large that no two tokens have nearly the same entropy.
        bases = [random_base(SHAPES["tiny"], "cpu", torch.float32, spread=0.2) for _ in range(2)]
        there, here = (Policy(base.to(at), lora) for base, at in zip(bases, (device, "cpu"), strict=True))
        vector = there.flatten()
        vector += 0.02 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(1))
        for policy in (there, here):
            policy.load_vector(vector)
        for name, settings in SETTINGS.items():
            outcome[f"{name}, {trained}"] = gradient_difference(there, here, GrpoSection(**settings))
    return outcome


def gradient_difference(there: Policy, here: Policy, grpo: GrpoSection) -> float | str:
    """|a - b| / |b| of the gradients of what is sampled by `there`; or what went wrong."""
    numbers = torch.Generator().manual_seed(2)
    prompts = [torch.randint(500, (length,), generator=numbers).tolist() for length in (5, 9, 7, 5)]
    sampling = Sampling(24, grpo.temperature, grpo.top_p, grpo.top_k)
    rows = len(prompts) * GENERATIONS
    noise = [torch.Generator(there.device).manual_seed(row) for row in range(rows)]
    try:
        completions = sample(there.model, prompts, GENERATIONS, sampling, frozenset(range(20)), noise)
        rollout = Rollout(
            version=0,
            prompt_ids=[ids for ids in prompts for _ in range(GENERATIONS)],
            completions=completions,
            advantages=torch.randn(rows, 1, generator=numbers, dtype=torch.float64),
            counted=[True] * rows,
        )
        ours, theirs = (rollout_gradient(policy, rollout, grpo, 256).vector for policy in (there, here))
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return float((ours - theirs).norm() / theirs.norm())
