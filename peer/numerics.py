"""The known-answer test: does this machine compute the canonical numbers, bit for bit?

Every canonical operation runs on inputs made of integers, subnormals among them, and is compared with the digests
below. Vectors are so long that an operation on a whole one would use the threads of a pool.
`python -m hivegrpo.peer.numerics` prints the outcome as JSON, and exits with 1 if a digest differs.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256, shake_256

import numpy as np
import torch
from torch import Tensor

from hivegrpo.peer.learn.genesis import genesis_parameters
from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import CODECS
from hivegrpo.peer.swarm.codecs.vectors import decode_vector, encode_vector
from hivegrpo.peer.swarm.rules.base import Rule
from hivegrpo.peer.swarm.rules.registry import RULES
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.chunks import CHUNK_VALUES, chunk_values
from hivegrpo.protocol.errors import NumericsError
from hivegrpo.protocol.scalars import StepScalars, fp32_from_bits

EXPECTED = {
    "step": "252856b6aff116911a82e06c71f61f48b9b366843fb43d6f18d4d77481de95f8",
    "genesis": "9032618e21916485984d48796ce703ba14b7e27bc7d8a21f87125aa1f0b3b764",
    "codec fp32": "486fa10ca5c4de767c04c562f5c95b3f08de2aca2b941e2caf19e36085a81187",
    "codec mxfp4": "d2eddf3c808f1447cf8d84b99b69a6a643852b7667febf7e65676c65e650fb27",
    "codec mxfp8": "2da8b8c64924facce787ca14e461e287922e29d4121857737ae89e6472cef627",
    "codec mxint8": "123f9d36596bb45aca9e3e1952a1e9098ba00c4b8fc95009182f07a272bb4485",
    "rule clip": "546b87183481e6a9efc7f15bdb2bd8ffeddd50a75fdbbc7c9a91b9d2b74c1538",
    "rule centered_clip": "259e735c0631c6138fabe877f636261e8e7e63bca5b911f253cf7aa211a7da95",
    "rule mean": "546b87183481e6a9efc7f15bdb2bd8ffeddd50a75fdbbc7c9a91b9d2b74c1538",
    "rule trimmed_mean": "34c7beef3c321af32461acd7f270723ff0aac8b20b00f79e2a9625ad5f506bf4",
}
"""SHA-256 of what every machine must compute, hex."""

_VALUES = 3 * CHUNK_VALUES + 1_001
_STEPS = 3

_SCALARS = StepScalars.from_bits(
    [
        0x3A83126F,  # learning_rate 1e-3
        0x3F666666,  # beta1 0.9
        0x3DCCCCCD,  # one_minus_beta1
        0x3F733333,  # beta2 0.95
        0x3D4CCCCD,  # one_minus_beta2
        0x40A86BCA,  # reciprocal_bias1, of step 2
        0x404CF6CB,  # reciprocal_sqrt_bias2, of step 2
        0x322BCC77,  # epsilon 1e-8
        0x3F7FFF58,  # decay, of weight decay 0.01
    ]
)
"""Bit patterns, because libm may differ; the same ones serve every step of the test."""

_COEFFICIENTS = [
    fp32_from_bits(bits) for bits in (0x3E99999A, 0x3DCCCCCD, 0x3E4CCCCD, 0x3D4CCCCD, 0x3E800000, 0x3DCCCCCD)
]
"""0.3, 0.1, 0.2, 0.05, 0.25, 0.1: of so many contributors that rules that trim do, and that a median has two values."""

_LAYOUT = [("proj.lora_A.weight", (8, 96)), ("proj.lora_B.weight", (40, 8)), ("head.lora_A.weight", (3, 1000))]


def integer_floats(label: str, count: int, low: int, high: int) -> Tensor:
    """fp32 values from SHAKE-256(label): any sign and mantissa, biased exponents low to high (0: subnormals)."""
    assert 0 <= low <= high < 255
    words = np.frombuffer(shake_256(label.encode()).digest(8 * count), dtype="<u4").reshape(count, 2)
    exponents = low + words[:, 0] % (high - low + 1)
    bits = (words[:, 1] & 0x807FFFFF) | (exponents << 23)
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def run_step() -> str:
    """State root after a few optimizer steps."""
    state = PolicyState.initial(integer_floats("parameters", _VALUES, 107, 129))
    for step in range(_STEPS):
        shadow = state.empty_like()
        # Moments of the smaller gradients, and squares of medium ones, are subnormal.
        adamw_step(state, integer_floats(f"gradient {step}", _VALUES, 0, 167), _SCALARS, out=shadow)
        state = shadow
    return blob_root(state_bytes(state)).hex()


def run_codec(codec: Codec) -> str:
    """Digest of a vector's encoding, of what that decodes to, and of its norm."""
    # Exponents rise through the vector, so that the values of a block compare, at every magnitude.
    spread = [integer_floats(f"{codec.name} {low}", 1_001, low, low + 4) for low in range(0, 255, 5)]
    subnormal = integer_floats(f"{codec.name} subnormal", 1_001, 0, 0)
    vector = torch.cat([*spread, torch.zeros(77), subnormal])
    values = vector.numel()
    chunks = encode_vector(codec, vector)
    decoded = decode_vector(codec, b"".join(chunks), values)
    norm = sum(codec.norm_squared(chunk, chunk_values(values, index)) for index, chunk in enumerate(chunks))
    return _digest(*chunks, _fp32_bytes(decoded), norm.to_bytes(128, "little"))


def run_rule(rule: Rule) -> str:
    """Digest of the reduction of spans of two chunks, of many magnitudes, subnormal ones among them."""
    parts = []
    for low in (0, 30, 100, 180):
        span = [
            [integer_floats(f"chunk {low} {peer} {index}", count, low, low + 20) for peer in range(len(_COEFFICIENTS))]
            for index, count in enumerate((CHUNK_VALUES, 1_001))
        ]
        for result in rule.reduce(range(2), span.__getitem__, _COEFFICIENTS):
            parts.append(_fp32_bytes(result))
    return _digest(*parts)


def run_genesis() -> str:
    """Digest of version 0 of a small layout."""
    return _digest(_fp32_bytes(genesis_parameters(_LAYOUT, seed=7)))


ANSWERS: dict[str, Callable[[], str]] = {
    "step": run_step,
    "genesis": run_genesis,
    **{f"codec {name}": partial(run_codec, codec) for name, codec in CODECS.items()},
    **{f"rule {name}": partial(run_rule, rule) for name, rule in RULES.items()},
}
"""Every canonical operation: computes its digest on this machine, hex."""


def known_answers() -> dict[str, str]:
    """Digests of all canonical operations, by name."""
    return {name: answer() for name, answer in ANSWERS.items()}


def differing(answers: dict[str, str]) -> list[str]:
    """Names of the answers that are not the expected ones."""
    return sorted(name for name in answers.keys() | EXPECTED.keys() if answers.get(name) != EXPECTED.get(name))


def check_numerics() -> str:
    """Digest over all known answers, hex: what a peer shows to be admitted. NumericsError names those that differ."""
    answers = known_answers()
    if wrong := differing(answers):
        raise NumericsError(
            f"This machine does not reproduce the canonical numbers: {', '.join(wrong)}.",
            "Reinstall the tested versions of torch and numpy, and look for a library or an environment variable that "
            "changes floating-point arithmetic; `python -m hivegrpo.peer.numerics` shows the details.",
        )
    return _digest(*(f"{name} {answers[name]}\n".encode() for name in sorted(answers)))


def main() -> int:
    """Print what this machine computes, and with what."""
    answers = known_answers()
    wrong = differing(answers)
    outcome = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "answers": answers,
        "differing": wrong,
    }
    print(json.dumps(outcome, indent=2))
    return 1 if wrong else 0


def _fp32_bytes(values: Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()


def _digest(*parts: bytes) -> str:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
