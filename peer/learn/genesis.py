"""Version 0's adapter, drawn from the run's seed by integers, so that every machine starts from the same bits."""

import math
from collections.abc import Sequence
from hashlib import shake_256

import numpy as np
import torch
from torch import Tensor

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
