"""Whether a machine gives the canonical bits, and what a GPU would give in their place. Part of `gpu.py`."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes
from hivegrpo.peer.numerics import differing, integer_floats, known_answers
from hivegrpo.protocol.scalars import StepScalars

STEPS = 3


def scalars(step: int) -> StepScalars:
    return StepScalars.for_step(step, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.01)


def canonical_steps(parameters: Tensor, gradients: Sequence[Tensor]) -> PolicyState:
    """What every peer computes, on the CPU."""
    state = PolicyState.initial(parameters)
    for step, gradient in enumerate(gradients, start=1):
        out = state.empty_like()
        adamw_step(state, gradient, scalars(step), out=out)
        state = out
    return state


def device_steps(parameters: Tensor, gradients: Sequence[Tensor], device: str) -> list[Tensor]:
    """The same operations where nothing holds their bits, with torch's square root: parameters and both moments."""
    p = parameters.to(device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step, gradient in enumerate(gradients, start=1):
        s, g = scalars(step), gradient.to(device)
        m = m * s.beta1 + g * s.one_minus_beta1
        v = v * s.beta2 + g * g * s.one_minus_beta2
        denominator = v.sqrt() * s.reciprocal_sqrt_bias2 + s.epsilon
        p = p * s.decay - m * s.reciprocal_bias1 / denominator * s.learning_rate
    return [vector.cpu() for vector in (p, m, v)]


def accepts_device(device: str) -> str:
    """What becomes of a canonical step whose tensors are all on the device."""
    state = PolicyState(torch.zeros(20, dtype=torch.uint8, device=device))
    try:
        adamw_step(state, torch.ones(1, device=device), scalars(1), out=state.empty_like())
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "taken"


def measure_bits(device: str, values: int) -> dict[str, Any]:
    """Digests, and what differs."""
    threads = torch.get_num_threads()
    parameters = integer_floats("gpu parameters", values, 107, 129)
    gradients = [integer_floats(f"gpu gradient {step}", values, 0, 140) for step in range(STEPS)]
    outcome: dict[str, Any] = {"torch": torch.__version__, "values": values, "canonical step": accepts_device(device)}
    state = canonical_steps(parameters, gradients)
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        answers = known_answers()
        state = canonical_steps(parameters, gradients)
        outcome[f"{count} threads"] = {
            "answers": answers,
            "differing": differing(answers),
            "state": sha256(state_bytes(state)).hexdigest(),
        }
    torch.set_num_threads(threads)
    canonical = {"parameters": state.parameters, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    for (name, ours), theirs in zip(canonical.items(), device_steps(parameters, gradients, device), strict=True):
        outcome[name] = {
            "cpu": sha256(ours.numpy().tobytes()).hexdigest(),
            "device": sha256(theirs.numpy().tobytes()).hexdigest(),
            "values that differ": int((ours.view(torch.int32) != theirs.view(torch.int32)).sum()),
        }
    return outcome


def show_bits(bits: dict[str, Any]) -> None:
    """What differs, and from what."""
    print(f"canonical step with tensors on the device: {bits['canonical step']}")
    for name, part in bits.items():
        if name.endswith(" threads"):
            wrong = ", ".join(part["differing"]) or "none"
            print(f"  {name}: known answers that differ: {wrong}; state {part['state'][:16]}")
        elif isinstance(part, dict):
            of = f"of {bits['values']:,} differ from the CPU's"
            print(f"  {name}: {part['values that differ']:,} {of} by the same operations on the device")
