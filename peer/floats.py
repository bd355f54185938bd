"""What canonical arithmetic needs of floating point: subnormals kept, and finite values."""

import numpy as np
import torch
from torch import Tensor

from hivegrpo.protocol.errors import HiveError, NumericsError

# Made of bits: a conversion would already lose the subnormal in a thread that flushes.
_PROBES = np.array([1 << 23, 1], np.int32).view(np.float32)
"""The smallest normal and the smallest subnormal value."""
_FACTORS = np.array([0.5, 2.0**23], np.float32)
_PRODUCTS = np.array([1 << 22, 1 << 23], np.int32).tobytes()
"""The first has a subnormal result and a normal operand, the second the other way round."""


class NonFiniteError(HiveError, ValueError):
    """A NaN or an infinity where only finite values have a meaning."""


def keep_subnormals() -> None:
    """Switch flush-to-zero and denormals-are-zero off in the calling thread, and check by arithmetic that they are.

    Any library built with fast-math may have switched them on, for this thread or for the process. The state is the
    thread's own (MXCSR, FPCR): call this at the start of every canonical operation, in the thread that computes.
    NumericsError if subnormals are still lost.
    """
    torch.set_flush_denormal(False)
    if (_PROBES * _FACTORS).tobytes() != _PRODUCTS:
        raise NumericsError(
            "This thread flushes subnormal numbers to zero, and that cannot be switched off.",
            "Look for a library built with fast-math, or a processor without IEEE subnormals; try another machine.",
        )


def require_finite(values: Tensor, what: str) -> None:
    """NonFiniteError unless every fp32 value is finite; decided on the bits, so no floating-point state matters."""
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    if int(magnitude.amax()) >= 0x7F800000:
        raise NonFiniteError(f"{what} holds a NaN or an infinity.")


MAX_MAGNITUDE = 2.0**52
"""Above this, reducers may refuse a chunk of 16,384 values: they bound norms by 2^60, so that the step is finite."""


def require_moderate(values: Tensor, what: str) -> None:
    """NonFiniteError if a value is so large that others would refuse it, and take its sender for a liar."""
    if float(values.abs().amax()) > MAX_MAGNITUDE:
        raise NonFiniteError(f"{what} holds a value above 2^52.")
