"""The known-answer test gives its committed digests whatever the processor's path, threads and flush-to-zero state."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hivegrpo.peer import numerics
from hivegrpo.protocol.errors import NumericsError

FLAGS = {"default": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "fma"}}
THREADS = [1, 2, 4]
MX = ("swarm.codecs.mxfloat", "swarm.codecs.mxint8")

# One process for every processor path: the path is fixed when torch starts.
SCRIPT = """
import json, sys
import torch
from torch.optim.adamw import adamw

flushing, threads = json.loads(sys.argv[1])
torch.set_flush_denormal(flushing)

def start_pool(count):
    '''Let `count` threads compute, as any library may have; the new ones inherit this thread's flush-to-zero state.'''
    torch.set_flush_denormal(flushing)
    torch.set_num_threads(count)
    torch.ones(1 << 20) + 1

def pool_flushes():
    subnormal = torch.tensor([1 << 22], dtype=torch.int32).view(torch.float32).repeat(1 << 20)
    torch.set_flush_denormal(False)
    return bool((subnormal * 1.0).view(torch.int32).eq(0).any())

start_pool(max(threads))
from hivegrpo.peer import numerics

def answer(name):
    torch.set_flush_denormal(flushing)
    return numerics.ANSWERS[name]()

outcome = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": {}}
for count in threads:
    start_pool(count)
    outcome["threads"][torch.get_num_threads()] = {
        "pool flushes": pool_flushes(),
        "answers": {name: answer(name) for name in numerics.ANSWERS},
        "digest": numerics.check_numerics(),
    }

def optim_step(state, gradient, scalars, out):
    for vector, parent in zip([out.parameters, out.exp_avg, out.exp_avg_sq],
                              [state.parameters, state.exp_avg, state.exp_avg_sq]):
        vector.copy_(parent)
    # What torch.optim.AdamW calls; the class would import the compiler, which takes seconds.
    adamw(
        [out.parameters], [gradient], [out.exp_avg], [out.exp_avg_sq], [], [torch.tensor(1.0)],
        foreach=False, amsgrad=False, maximize=False,
        beta1=scalars.beta1, beta2=scalars.beta2, lr=scalars.learning_rate, weight_decay=0.01, eps=scalars.epsilon,
    )
    out.step = state.step + 1

numerics.adamw_step = optim_step
outcome["torch.optim.AdamW"] = numerics.ANSWERS["step"]()
try:
    numerics.check_numerics()
except numerics.NumericsError as error:
    outcome["refused"] = error.message
print(json.dumps(outcome))
"""


def processor_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


@cache
def outcome(capability: str, flushing: bool) -> Any:
    """What a fresh process computes on that path of ATen."""
    if not processor_flags() >= FLAGS[capability]:
        pytest.skip(f"host lacks {capability}")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps([flushing, THREADS])],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["capability"] == capability.upper()
    return outcome


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("flushing", [False, True], ids=["ieee", "flush-to-zero"])
@pytest.mark.parametrize("capability", FLAGS)
def test_digests_are_the_committed_ones(capability: str, flushing: bool, threads: int) -> None:
    result = outcome(capability, flushing)["threads"][str(threads)]
    assert result["pool flushes"] == (flushing and threads > 1)
    assert result["answers"] == numerics.EXPECTED
    assert result["digest"] == numerics.check_numerics()


@pytest.mark.parametrize("capability", FLAGS)
def test_torch_optim_adamw_does_not_pass(capability: str) -> None:
    result = outcome(capability, False)
    assert result["torch.optim.AdamW"] != numerics.EXPECTED["step"]
    assert result["refused"].endswith("canonical numbers: step.")


def test_torch_optim_adamw_differs_from_one_processor_path_to_another() -> None:
    digests = [outcome(capability, False)["torch.optim.AdamW"] for capability in ("default", "avx2")]
    assert digests[0] != digests[1]


def test_a_machine_that_flushes_subnormals_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `keep_subnormals`, flush-to-zero changes the step, the rules and MX decoding: the inputs reach there."""
    for module in ("learn.step", "swarm.rules.base", "swarm.rules.centered_clip", *MX):
        monkeypatch.setattr(f"hivegrpo.peer.{module}.keep_subnormals", lambda: None)
    torch.set_flush_denormal(True)
    try:
        kept = {"codec fp32", "genesis"}  # which move bits, and compute with integers
        assert numerics.differing(numerics.known_answers()) == sorted(numerics.EXPECTED.keys() - kept)
    finally:
        torch.set_flush_denormal(False)


def test_a_missing_answer_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(numerics.EXPECTED, "codec mxint4", "00")
    with pytest.raises(NumericsError, match=r"canonical numbers: codec mxint4\. Reinstall"):
        numerics.check_numerics()


def test_the_command_prints_what_was_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert numerics.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["answers"], printed["differing"]) == (numerics.EXPECTED, [])
    monkeypatch.setitem(numerics.EXPECTED, "genesis", "00")
    assert numerics.main() == 1
    assert json.loads(capsys.readouterr().out)["differing"] == ["genesis"]
