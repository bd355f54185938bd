"""benchmarks/wan.py: a bounded run where it can run, a reason where it cannot, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "wan.py"
CANNOT = 77
ABLE = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))
SMALL = ("--peers", "2", "--rounds", "1", "--values", "100000", "--delay", "0.01")


def start(*arguments: str, path: str | None = None) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if path is None else {"PATH": path})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def namespaces(process: subprocess.Popen[str]) -> list[Path]:
    return list(Path("/run/netns").glob(f"hgwan{process.pid}-*"))


def test_without_the_means_it_says_so() -> None:
    process = start(*SMALL, path="/nowhere")
    _, told = process.communicate(timeout=60)
    assert process.returncode == CANNOT
    assert "cannot run here: network namespaces need root" in told


@pytest.mark.slow
def test_a_small_round_over_namespaces_and_none_is_left() -> None:
    process = start(*SMALL)
    told, failed = process.communicate(timeout=170)
    if not ABLE:
        assert process.returncode == CANNOT
        return
    assert process.returncode in (0, 1), failed
    assert "median round over ideal" in told, failed
    assert namespaces(process) == []


@pytest.mark.slow
def test_a_benchmark_that_is_ended_takes_its_namespaces_along() -> None:
    process = start(*SMALL)
    deadline = time.monotonic() + 60.0
    while ABLE and len(namespaces(process)) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if ABLE:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGTERM if ABLE else CANNOT)
    assert namespaces(process) == []
