"""The coordinator is killed at every single write of a run: the chain goes on, and nothing acknowledged is lost.

`make bench-crashes` kills it in longer runs, with overlap and with iterations, too.
"""

import tempfile
from pathlib import Path

from support.crashes import MEMORY, play_all

VERSIONS = 2


def test_a_coordinator_that_is_killed_at_any_write_goes_on(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as name:
        moments = play_all(Path(name), peers=2, versions=VERSIONS, snapshot_every=9)
    assert moments["before an append"] == moments["after an append"] >= 10
    assert moments["before a frame"] == moments["after a frame"] >= 40
    assert moments["before a rename"] == moments["after a rename"] >= 5, "anchors and segments"
    assert moments["within an entry of the chain"] == VERSIONS + 1
    assert moments["after a snapshot"] >= 3
