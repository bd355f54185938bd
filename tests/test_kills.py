"""Real processes whose coordinator is killed (-9) at some random writes; `make bench-crashes` takes fifty."""

import asyncio
from pathlib import Path

import pytest
from support.kills import kill_often

POINTS = 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_chain_survives_every_kill_and_goes_on(tmp_path: Path) -> None:
    """How fast it goes on, the benchmark asks: this machine may be busy."""
    kills = asyncio.run(kill_often(tmp_path, seed=3, points=POINTS, show=print))
    assert len(kills) == POINTS
    assert all(kill.seconds < 60.0 for kill in kills)
