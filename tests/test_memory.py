"""Peak memory of log-probabilities and their backward pass, against torch's log_softmax, by benchmarks/memory.py.

The bar is for 4 x 512 tokens, where the plain way takes 3.5 GiB; this is a quarter of them, and the margin is smaller.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
SIZE = ("--rows", "4", "--length", "128", "--vocabulary", "151936", "--width", "32")
BAR = 0.25


def peak_of(way: str) -> int:
    """Bytes, in a process of its own, above what it takes before it computes anything."""
    command = [sys.executable, str(SCRIPT), *SIZE, "--way", way]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["", "_trained"], ids=["frozen head", "trained head"])
def test_peak_is_at_most_a_quarter_of_the_plain_one(head: str) -> None:
    plain, ours = peak_of(f"plain{head}"), peak_of(f"hidden{head}")
    # All logits in float32, three times: log-probabilities, their gradient and the logits'.
    assert plain >= 3 * 4 * 128 * 151_936 * 4
    assert ours <= BAR * plain
