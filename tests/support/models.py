"""A small random model in a folder, as transformers saves it, and policies on it."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from hivegrpo.peer.learn.policy import Policy
from hivegrpo.protocol.config import LoraSection, ModelSection

END = 256
LORA = LoraSection(r=4, alpha=8)


def save_model(folder: Path, *, width: int = 32, heads: int = 2, tied: bool = False) -> None:
    """A Qwen2 over bytes."""
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=64,
        eos_token_id=END,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet | {"<end>": END}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)


def load_policy(folder: Path, *, gradient_checkpointing: bool = False, **model: Any) -> Policy:
    """The policy on the model in the folder, with settings of [model]; its adapter is random, as peft leaves it."""
    section = ModelSection(path=folder, **model)
    return Policy.load(folder, section, LORA, "cpu", gradient_checkpointing=gradient_checkpointing)


def spread(policy: Policy) -> Policy:
    """The policy with an adapter in which nothing is zero."""
    policy.load_vector(0.1 * torch.randn(policy.size, generator=torch.Generator().manual_seed(1)))
    return policy
