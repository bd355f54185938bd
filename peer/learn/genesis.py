"""Version 0: an adapter drawn from the run's seed by integers, so that every machine starts from the same bits, or the
base model's own parameters."""

import math
from collections.abc import Sequence
from hashlib import shake_256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hivegrpo.peer.learn.base import WEIGHTS, model_files
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.scalars import to_fp32


def genesis_parameters(layout: Sequence[tuple[str, Sequence[int]]], seed: int) -> Tensor:
    """The flat fp32 vector of version 0, for the ordered (name, shape) of the trainable tensors.

    LoRA's B is zero, so version 0 is the base model. A, of shape (r, in_features), is uniform in [-b, b) with
    b = 1 / sqrt(in_features), which is kaiming_uniform(a=sqrt(5)), PEFT's default: each value is
    (u - 2^23) 2^-23, exact in fp32, times b rounded to fp32, where u runs through the 24-bit little-endian integers of
    SHAKE-256(seed as 8 bytes little-endian | name).
    ConfigError for a tensor that is neither.
    """
    return torch.cat([_tensor(name, shape, seed) for name, shape in layout])


def _tensor(name: str, shape: Sequence[int], seed: int) -> Tensor:
    count = math.prod(shape)
    parts = name.split(".")
    if "lora_B" in parts:
        return torch.zeros(count)
    if "lora_A" not in parts or len(shape) != 2:
        raise ConfigError(
            f"Version 0 of {name!r}, of shape {tuple(shape)}, is not defined.",
            "The trainable tensors must be the lora_A and lora_B matrices of linear layers.",
        )
    stream = shake_256(seed.to_bytes(8, "little") + name.encode()).digest(3 * count)
    low, middle, high = np.frombuffer(stream, dtype=np.uint8).reshape(count, 3).astype(np.int32).T
    integers = (low | middle << 8 | high << 16) - (1 << 23)
    bound = to_fp32(1.0 / math.sqrt(shape[1]))
    # No value but zero is below 2^-23 b: whatever state a thread is in, there is no subnormal to lose.
    return torch.from_numpy(integers.astype(np.float32) * np.float32(2.0**-23) * np.float32(bound))


def version_zero(layout: Sequence[tuple[str, Sequence[int]]], config: RunConfig, base: Path | None) -> Tensor:
    """The flat fp32 vector that a run begins with: an adapter from the seed, or the base model's own parameters.

    base: folder of the base model, which only a run that trains every parameter needs. ConfigError if a parameter is
    not in its files.
    """
    if config.model.trainable == "lora":
        return genesis_parameters(layout, config.run.seed)
    assert base is not None
    return base_parameters(layout, base)


def base_parameters(layout: Sequence[tuple[str, Sequence[int]]], folder: Path) -> Tensor:
    """The named tensors of a model's safetensors files, flat and in the layout's order, in fp32."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for path in model_files(folder, WEIGHTS[:1]):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    parts = []
    for name, shape in layout:
        if name not in found or tuple(found[name].shape) != tuple(shape):
            raise ConfigError(
                f"{folder} has no parameter {name} of shape {tuple(shape)} in its safetensors files.",
                'Train an adapter instead: [model] trainable = "lora".',
            )
        parts.append(found[name].float().flatten())
    return torch.cat(parts)
