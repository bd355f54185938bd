"""The canonical optimizer step, and the state it advances: the same bits on every machine.

It runs on the CPU, in fp32, and nothing else enters: elementwise, separately rounded additions, subtractions,
products, quotients and square roots, which IEEE 754 defines to the last bit. No fused multiply-add (addcmul, addcdiv,
lerp, add with alpha), no torch.sqrt, no reduction, no torch.optim: their bits depend on the processor and the build.

The step goes chunk by chunk. A chunk is below ATen's parallel grain of 32,768 values (at::internal::GRAIN_SIZE), so
every operation runs in the calling thread, whose floating-point state `keep_subnormals` holds, and never in the
threads of a pool, whose state nobody holds.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals, require_finite
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError
from hivegrpo.protocol.scalars import StepScalars

_STEP_BYTES = 8


class PolicyState:
    """A policy version: the flat fp32 vectors `parameters`, `exp_avg`, `exp_avg_sq`, and the number of steps taken.

    The vectors are views of one buffer, which is the canonical serialisation: parameters | exp_avg | exp_avg_sq |
    step, the values fp32 and the step u64, little-endian, 12 n + 8 bytes.
    """

    def __init__(self, buffer: Tensor) -> None:
        assert buffer.dtype == torch.uint8
        assert buffer.dim() == 1
        self.buffer = buffer
        self.parameters, self.exp_avg, self.exp_avg_sq = buffer[:-_STEP_BYTES].view(torch.float32).view(3, -1)

    @classmethod
    def initial(cls, parameters: Tensor) -> Self:
        """Version 0: the given parameters, both moments zero, no step taken."""
        state = cls(torch.zeros(state_size(parameters.numel()), dtype=torch.uint8))
        state.parameters.copy_(parameters)
        return state

    def empty_like(self) -> Self:
        """Buffers for another version of this policy, with nothing in them yet."""
        return type(self)(torch.empty_like(self.buffer))

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int.from_bytes(self.buffer[-_STEP_BYTES:].numpy().tobytes(), "little")

    @step.setter
    def step(self, step: int) -> None:
        self.buffer[-_STEP_BYTES:] = torch.frombuffer(
            bytearray(step.to_bytes(_STEP_BYTES, "little")), dtype=torch.uint8
        )


def state_size(values: int) -> int:
    """Bytes of the serialised state of a policy with that many trainable values."""
    return 3 * 4 * values + _STEP_BYTES


def state_bytes(state: PolicyState) -> memoryview:
    """The canonical serialisation; a view of the state's own buffer, so nothing is copied."""
    return state.buffer.numpy().data


def state_from_bytes(data: bytes | memoryview, values: int) -> PolicyState:
    """Inverse of `state_bytes`, in a buffer of its own; CommitmentError if `data` has another length."""
    if len(data) != state_size(values):
        raise CommitmentError(f"the state of {values} values has {state_size(values)} bytes, not {len(data)}")
    return PolicyState(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def adamw_step(state: PolicyState, gradient: Tensor, scalars: StepScalars, out: PolicyState) -> None:
    """Write the version after `state` into the buffers of `out`; `state` stays as it is.

    AdamW (Loshchilov & Hutter, arXiv:1711.05101) at step t, for every value, with fp32 g = gradient:

        m' = beta1 m + (1 - beta1) g
        v' = beta2 v + (1 - beta2) (g g)
        p' = decay p - lr ((m' / (1 - beta1^t)) / (sqrt(v') / sqrt(1 - beta2^t) + epsilon))

    where decay = 1 - lr weight_decay, and the divisions by the bias corrections are products with the signed
    reciprocals. NonFiniteError if a value overflows; what is in `out` then means nothing.
    """
    assert gradient.dtype == torch.float32
    assert gradient.shape == state.parameters.shape == out.parameters.shape
    assert out.buffer.data_ptr() != state.buffer.data_ptr()
    keep_subnormals()
    vectors = (
        gradient,
        state.parameters,
        state.exp_avg,
        state.exp_avg_sq,
        out.parameters,
        out.exp_avg,
        out.exp_avg_sq,
    )
    for g, p, m, v, p_out, m_out, v_out in zip(*(torch.split(vector, CHUNK_VALUES) for vector in vectors), strict=True):
        torch.mul(m, scalars.beta1, out=m_out)
        m_out += g * scalars.one_minus_beta1

        square = g * g
        square *= scalars.one_minus_beta2
        torch.mul(v, scalars.beta2, out=v_out)
        v_out += square

        # torch.sqrt is MKL's, off by an ulp in every sixth value; NumPy's is the processor's, correctly rounded.
        denominator = torch.from_numpy(np.sqrt(v_out.numpy()))
        denominator *= scalars.reciprocal_sqrt_bias2
        denominator += scalars.epsilon
        update = m_out * scalars.reciprocal_bias1
        update /= denominator
        update *= scalars.learning_rate
        torch.mul(p, scalars.decay, out=p_out)
        p_out -= update

        require_finite(v_out, "The second moment after the step")
        require_finite(p_out, "The vector of parameters after the step")
    out.step = state.step + 1
