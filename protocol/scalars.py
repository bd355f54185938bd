"""The scalars of one optimizer step, computed once by the coordinator and signed as fp32 bit patterns.

libm differs between machines, and CUDA divides by a scalar by multiplying with its reciprocal: so every division
and power is done once, here, and each machine only multiplies.
"""

import math
import struct
from dataclasses import astuple, dataclass, fields
from typing import Self

from hivegrpo.protocol.errors import FrameError


def to_fp32(value: float) -> float:
    """The nearest fp32 value, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def fp32_bits(value: float) -> int:
    """Bit pattern of an fp32 value."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def fp32_from_bits(bits: int) -> float:
    """The fp32 value of a bit pattern, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@dataclass(frozen=True, slots=True)
class StepScalars:
    """AdamW's scalars for one step, each exactly an fp32 value (Loshchilov & Hutter, arXiv:1711.05101)."""

    learning_rate: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    reciprocal_bias1: float
    """1 / (1 - beta1^t)."""
    reciprocal_sqrt_bias2: float
    """1 / sqrt(1 - beta2^t)."""
    epsilon: float
    decay: float
    """1 - learning_rate * weight_decay."""

    @classmethod
    def for_step(
        cls, step: int, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
    ) -> Self:
        """Scalars of optimizer step `step` (the first is 1), computed in double precision and rounded once."""
        assert step >= 1
        values = (
            learning_rate,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / (1.0 - beta1**step),
            1.0 / math.sqrt(1.0 - beta2**step),
            epsilon,
            1.0 - learning_rate * weight_decay,
        )
        return cls(*map(to_fp32, values))

    def to_bits(self) -> list[int]:
        """Bit patterns, in the order of the fields."""
        return [fp32_bits(value) for value in astuple(self)]

    @classmethod
    def from_bits(cls, bits: list[int]) -> Self:
        """Inverse of `to_bits`; FrameError for a wrong count or a value that is not finite."""
        if len(bits) != len(fields(cls)):
            raise FrameError(f"a step has {len(fields(cls))} scalars, the plan gives {len(bits)}")
        values = [fp32_from_bits(bit & 0xFFFFFFFF) for bit in bits]
        if not all(map(math.isfinite, values)):
            raise FrameError("a scalar of the step is not finite")
        return cls(*values)
