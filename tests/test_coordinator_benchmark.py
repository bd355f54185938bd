"""A bounded run of benchmarks/coordinator.py: what holds on a busy machine, too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "coordinator.py"
BOUNDED = ("--events", "12000", "--starts", "1", "--peers", "50", "--nodes", "2", "--rate", "100", "--seconds", "1")


@pytest.mark.slow
def test_a_start_and_heartbeats_are_as_fast_as_they_have_to_be(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), *BOUNDED, "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode in (0, 1), done.stderr
    assert "p99" in done.stdout, done.stderr
    start, machine, network = json.loads(figures.read_text())
    assert start["met"], "of 12,000 events, of which 10,000 are replayed, as of a million"
    assert machine["met"]
    assert network["found"] > 0, "none failed"
