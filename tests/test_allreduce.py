"""A bounded run of benchmarks/allreduce.py: what does not depend on how fast the machine is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "allreduce.py"


@pytest.mark.slow
def test_a_round_sends_little_more_than_the_least_and_ends_alike_everywhere(tmp_path: Path) -> None:
    """Application bytes have no noise. What else this machine sends to itself meanwhile would be in interface bytes."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode in (0, 1), done.stderr
    assert figures.is_file(), done.stderr
    found = json.loads(figures.read_text())
    [size] = found["sizes"]
    assert [len(size["series"][name]["seconds"]) for name in ("round", "data", "runner")] == [3, 3, 3]
    ratios = size["bytes_over_least"]["application"]
    assert all(1.0 < ratio <= 1.03 for ratio in ratios), ratios
    assert size["differences"]["hivegrpo"] == 0.0
    assert size["differences"]["hivemind"] > 0.0
    met = {bar["what"].partition(", ")[2]: bar["met"] for bar in found["bars"]}
    assert met["application bytes / least"]
    assert met["largest difference between peers"]
