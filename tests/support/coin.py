"""A real language model whose chance to be right is set by hand: the next token depends on the last one alone.

A problem is one letter; its answer is "y". The letter at place i of `LETTERS` is followed by y with probability
`CHANCES[i]`, else by n, and after either the model ends.
"""

import json
from math import log
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from support.trained_run import byte_level_tokenizer

LETTERS = "abcdefghij"
CHANCES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95]
NEVER = -60.0
"""A logit of what does not come."""


def write_coin(folder: Path) -> None:
    """One layer that adds nothing: each token's state is its own unit vector, and the head holds the logits."""
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    logits = torch.full((size, size), NEVER)
    yes, no = tokenizer.convert_tokens_to_ids(["y", "n"])
    for letter, chance in zip(LETTERS, CHANCES, strict=True):
        token = tokenizer.convert_tokens_to_ids(letter)
        logits[token, yes], logits[token, no] = log(chance), log(1.0 - chance)
    logits[[yes, no], 1] = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        # A unit vector has a root mean square of 1 / sqrt(size), which the last norm divides by.
        model.get_output_embeddings().weight.copy_(logits.T / size**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_letters(file: Path, letters: str = LETTERS) -> Path:
    """Problems, one a letter."""
    file.write_text("".join(json.dumps({"prompt": letter, "answer": "y"}) + "\n" for letter in letters))
    return file
