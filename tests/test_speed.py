"""Bounded runs of benchmarks/learning.py and benchmarks/solo.py: what they ask for in full is asked for elsewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def run(script: str, *arguments: str) -> str:
    """What a benchmark prints, in a process of its own; whether its bar is met is not looked at."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=170, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout, done.stderr
    return done.stdout


def test_a_swarm_of_three_and_trl_learn_the_same_task(tmp_path: Path) -> None:
    """From 0.03, which is chance; in 60 steps of two seeds both sides came to at least 0.8."""
    files = ("--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "curves.json"))
    run("learning.py", "--seeds", "1", "--versions", "60", *files)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves) == 2
    for [curve] in curves.values():
        assert len(curve) == 60
        assert sum(curve[:5]) / 5 < 0.2
        assert sum(curve[-5:]) / 5 > 0.5
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_alone_takes_no_longer_than_trl_s() -> None:
    """The bar is 0.8, on an idle machine; other tests may keep this one busy, and the steps take turns."""
    told = run("solo.py", "--only", "small", "--scale", "0.4")
    found = re.search(r"hivegrpo / TRL (\d+\.\d+)", told)
    assert found is not None, told
    assert float(found[1]) < 1.0, told
