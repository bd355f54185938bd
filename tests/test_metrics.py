"""Metrics of parts, put together."""

import math

import pytest
import torch

from hivegrpo.peer.learn.metrics import Tally, finite
from hivegrpo.protocol.checks import MAX_METRIC, check_metrics
from hivegrpo.protocol.errors import FrameError


def test_parts_add_up_to_the_whole() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    whole = Tally()
    for row in range(2):
        part = Tally()
        part.mean("mean", values[row : row + 1], mask[row : row + 1])
        part.minima["min"] = values[row, 0]
        part.maxima["max"] = values[row, 0]
        whole.add(part)
    # (1 + 2 + 4) / 3 tokens
    assert whole.values() == {"mean": pytest.approx(7 / 3), "min": 1.0, "max": 4.0}


def test_what_was_counted_over_nothing_is_left_out() -> None:
    tally = Tally()
    tally.mean("none", torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert tally.values() == {}


def test_only_what_a_coordinator_takes_is_reported() -> None:
    metrics = {"kl": 1.1 * MAX_METRIC, "low": -math.inf, "nan": math.nan, "reward": -MAX_METRIC}
    with pytest.raises(FrameError):
        check_metrics(metrics)
    assert finite(metrics) == {"reward": -MAX_METRIC}
    check_metrics(finite(metrics))
