"""The coordinator is killed at every single write of a run: the chain goes on, and nothing acknowledged is lost."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.crashes import play, store_of
from support.virtual import run_virtually

VERSIONS = 2
MEMORY = Path("/dev/shm")  # where it is: runs by the hundred, each with a disk of its own


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as name, capture_logs():
        yield Path(name)


@pytest.mark.parametrize(
    ("peers", "sections"),
    [
        pytest.param(2, {}, id="plain"),
        pytest.param(2, {"averaging": {"audit_rate": 0.0, "overlap": True}}, id="overlap", marks=pytest.mark.slow),
        pytest.param(2, {"grpo": {"num_iterations": 2}}, id="iterations", marks=pytest.mark.slow),
    ],
)
def test_a_coordinator_that_is_killed_at_any_write_goes_on(folder: Path, peers: int, sections: dict[str, Any]) -> None:
    sections = sections | {"run": {"versions": VERSIONS, "start_peers": peers}}
    store = store_of(folder / "blobs", VERSIONS)
    moments: Counter[str] = Counter()
    at = 1
    while (outcome := run_virtually(play(folder / "run", store, at, peers, snapshot_every=9, **sections))).moment:
        assert not outcome.wrong, f"killed {outcome.moment}, the {at}th moment"
        moments[outcome.moment] += 1
        shutil.rmtree(folder / "run")
        at += 1
    assert not outcome.wrong, "it was not killed"
    assert moments["before an append"] == moments["after an append"] >= 10
    assert moments["before a frame"] == moments["after a frame"] >= 40
    assert moments["before a rename"] == moments["after a rename"] >= 5, "anchors and segments"
    assert moments["within an entry of the chain"] == VERSIONS + 1
    assert moments["after a snapshot"] >= 3
