"""The canonical optimizer step, the mean, version 0, and the state that a root commits to."""

import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import shake_256

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hivegrpo.peer.floats import NonFiniteError, keep_subnormals
from hivegrpo.peer.learn.genesis import genesis_parameters
from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes, state_from_bytes, state_size
from hivegrpo.peer.numerics import integer_floats
from hivegrpo.peer.swarm.rules.registry import get_rule
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError, ConfigError, NumericsError
from hivegrpo.protocol.scalars import StepScalars, to_fp32

SCALARS = [
    StepScalars.for_step(step, learning_rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    for step in (1, 2, 3)
]


@pytest.fixture
def flushing() -> Iterator[None]:
    """Some library has switched flush-to-zero on in this thread."""
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def reference_step(p: float, m: float, v: float, g: float, s: StepScalars) -> tuple[float, float, float]:
    """One value's step; every operation in double precision, then rounded to fp32, which rounds as fp32 itself does."""
    r = to_fp32
    m = r(r(s.beta1 * m) + r(s.one_minus_beta1 * g))
    v = r(r(s.beta2 * v) + r(s.one_minus_beta2 * r(g * g)))
    denominator = r(r(r(math.sqrt(v)) * s.reciprocal_sqrt_bias2) + s.epsilon)
    update = r(s.learning_rate * r(r(m * s.reciprocal_bias1) / denominator))
    return r(r(p * s.decay) - update), m, v


def steps(parameters: Tensor, gradients: list[Tensor]) -> PolicyState:
    state = PolicyState.initial(parameters)
    for gradient, scalars in zip(gradients, SCALARS, strict=True):
        out = state.empty_like()
        adamw_step(state, gradient, scalars, out=out)
        state = out
    return state


def test_every_operation_of_the_step_is_rounded_separately() -> None:
    count = 2_000
    parameters = integer_floats("p", count, 107, 129)
    # Exponents 53 to 64 have subnormal squares, those up to 4 subnormal first moments.
    gradients = [integer_floats(f"g{step}", count, 0, 140) for step in range(3)]
    state = steps(parameters, gradients)
    assert state.step == 3
    expected = []
    for index in range(count):
        value = (parameters[index].item(), 0.0, 0.0)
        for gradient, scalars in zip(gradients, SCALARS, strict=True):
            value = reference_step(*value, gradient[index].item(), scalars)
        expected.append(value)
    assert list(zip(state.parameters.tolist(), state.exp_avg.tolist(), state.exp_avg_sq.tolist(), strict=True)) == (
        expected
    )


def test_the_step_agrees_with_adamw_of_torch_in_double_precision() -> None:
    """The same formula: what differs is rounding, a few units of fp32's 6e-8 after three steps."""
    start = integer_floats("p", 1_000, 120, 127)
    gradients = [integer_floats(f"g{i}", 1_000, 110, 125) for i in range(3)]
    parameter, step = start.double(), torch.tensor(0.0)
    moments = [torch.zeros_like(parameter)], [torch.zeros_like(parameter)]
    for gradient in gradients:
        # What torch.optim.AdamW calls; the class would import the compiler, which takes seconds.
        adamw([parameter], [gradient.double()], *moments, [], [step], foreach=False, amsgrad=False, maximize=False,
              beta1=0.9, beta2=0.95, lr=1e-3, weight_decay=0.1, eps=1e-8)  # fmt: skip
    got = steps(start, gradients).parameters.double()
    torch.testing.assert_close(got, parameter, rtol=5e-7, atol=5e-9)


def test_the_parent_state_stays_as_it_is() -> None:
    state = steps(integer_floats("p", CHUNK_VALUES + 5, 110, 127), [torch.ones(CHUNK_VALUES + 5)] * 3)
    before = bytes(state_bytes(state))
    adamw_step(state, torch.ones(CHUNK_VALUES + 5), SCALARS[0], out=state.empty_like())
    assert bytes(state_bytes(state)) == before


@pytest.mark.usefixtures("flushing")
def test_a_thread_that_flushes_subnormals_steps_alike() -> None:
    gradients = [integer_floats(f"g{i}", 100, 0, 64) for i in range(3)]
    flushed = bytes(state_bytes(steps(torch.ones(100), gradients)))
    torch.set_flush_denormal(False)
    assert flushed == bytes(state_bytes(steps(torch.ones(100), gradients)))


@pytest.mark.usefixtures("flushing")
def test_flush_to_zero_that_stays_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_flush_denormal", lambda mode: False)
        with pytest.raises(NumericsError, match=r"flushes subnormal.*fast-math"):
            keep_subnormals()
    keep_subnormals()


@pytest.mark.parametrize("size", [2e19, 3e38])
def test_a_step_that_overflows_is_refused(size: float) -> None:
    state = PolicyState.initial(torch.zeros(CHUNK_VALUES + 1))
    gradient = torch.zeros(CHUNK_VALUES + 1)
    gradient[-1] = size
    with pytest.raises(NonFiniteError, match="second moment"):
        adamw_step(state, gradient, SCALARS[0], out=state.empty_like())


def test_a_step_that_divides_zero_by_zero_is_refused() -> None:
    state = PolicyState.initial(torch.ones(3))
    with pytest.raises(NonFiniteError, match="parameters"):
        adamw_step(state, torch.zeros(3), replace(SCALARS[0], epsilon=0.0), out=state.empty_like())


def test_the_state_is_serialised_as_documented() -> None:
    state = PolicyState.initial(torch.tensor([1.0, -2.0, 3.0]))
    state.exp_avg.fill_(0.5)
    state.exp_avg_sq.fill_(0.25)
    state.step = 2**40 + 7
    data = struct.pack("<9fQ", 1.0, -2.0, 3.0, *[0.5] * 3, *[0.25] * 3, 2**40 + 7)
    assert bytes(state_bytes(state)) == data
    assert len(data) == state_size(3)
    restored = state_from_bytes(data, 3)
    assert (restored.step, restored.parameters.tolist()) == (2**40 + 7, [1.0, -2.0, 3.0])
    assert bytes(state_bytes(restored)) == data
    with pytest.raises(CommitmentError, match="has 44 bytes, not 45"):
        state_from_bytes(data + b"\0", 3)


def test_a_restored_state_has_its_own_memory() -> None:
    state = PolicyState.initial(torch.ones(4))
    restored = state_from_bytes(state_bytes(state), 4)
    restored.parameters.zero_()
    assert state.parameters.tolist() == [1.0] * 4


def mean(chunks: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    (result,) = get_rule("mean").reduce(range(1), lambda _: chunks, coefficients)
    return result


def test_the_mean_adds_from_left_to_right() -> None:
    big, one = torch.full((5,), 2.0**24), torch.ones(5)
    # 2^24 + 1 is a tie that goes to 2^24, twice; 1 + 1 + 2^24 is exact.
    assert mean([big, one, one], [1.0, 1.0, 1.0]).tolist() == [2.0**24] * 5
    assert mean([one, one, big], [1.0, 1.0, 1.0]).tolist() == [2.0**24 + 2] * 5


def test_the_mean_rounds_each_product() -> None:
    ulp = 2.0**-23
    x = torch.full((100,), 1 + ulp)
    # (1 + ulp)^2 = 1 + 2 ulp + ulp^2 rounds to 1 + 2 ulp; a fused multiply-add would leave ulp^2 behind.
    assert mean([torch.full((100,), -1 - 2 * ulp), x], [1.0, 1 + ulp]).tolist() == [0.0] * 100


@pytest.mark.usefixtures("flushing")
def test_the_mean_keeps_subnormals() -> None:
    smallest = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    result = mean([smallest, smallest], [1.0, 1.0])
    assert result.view(torch.int32).tolist() == [2]


def test_the_mean_leaves_the_contributions_as_they_are() -> None:
    chunks = [torch.ones(3), torch.ones(3)]
    mean(chunks, [1.0, 1.0])
    assert [chunk.tolist() for chunk in chunks] == [[1.0] * 3] * 2


def test_an_unknown_rule_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"'median'.*mean"):
        get_rule("median")


def test_version_0_is_the_documented_stream() -> None:
    layout = [("m.q.lora_A.default.weight", (2, 7)), ("m.q.lora_B.default.weight", (3, 2)), ("lora_A.weight", (1, 5))]
    vector = genesis_parameters(layout, seed=258)
    assert vector.dtype == torch.float32
    expected: list[float] = []
    for name, inputs, count in (("m.q.lora_A.default.weight", 7, 14), ("", 1, 0), ("lora_A.weight", 5, 5)):
        stream = shake_256(b"\x02\x01" + bytes(6) + name.encode()).digest(3 * count)
        bound = np.float32(1 / math.sqrt(inputs))
        for start in range(0, 3 * count, 3):
            unit = (int.from_bytes(stream[start : start + 3], "little") - 2**23) / 2**23
            expected.append(float(np.float32(unit * float(bound))))
        expected += [0.0] * 6 if not name else []
    assert vector.tolist() == expected


def test_version_0_is_uniform_and_bounded() -> None:
    values = genesis_parameters([("x.lora_A.weight", (64, 400))], seed=0)
    bound = 1 / math.sqrt(400)
    assert values.abs().max() <= bound
    # A uniform distribution's standard deviation is bound / sqrt(3); that of the mean of 25,600 values 1/160 of it.
    assert abs(values.mean().item()) < 4 * bound / math.sqrt(3) / 160
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "x.lora_embedding_A.default", "x.my_lora_A.weight"])
def test_version_0_of_anything_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not defined.*lora_A and lora_B"):
        genesis_parameters([(name, (4, 4))], seed=0)
