"""Processes of hivemind that average when the driver says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from processes import Crew
from series import Figures, Size

START_SECONDS = 90.0
ROUND_SECONDS = 45.0
"""For one round; a step of hivemind's gives up the search for a group after ten seconds."""


class HivemindGroup:
    """Workers of one script that have found each other."""

    def __init__(self, crew: Crew, size: Size, script: str, folder: Path, options: Sequence[object] = ()) -> None:
        name = script.removesuffix(".py")
        self._workers = [
            crew.start(script, f"{name}-{rank}", rank, size.peers, size.values, *options) for rank in range(size.peers)
        ]
        self._folder = folder
        for worker in self._workers:
            worker.hear("loaded", START_SECONDS)
        self._group: list[str] = []
        initial_peers: list[str] = []
        for worker in self._workers:
            worker.tell("join", initial_peers=initial_peers)
            joined = worker.hear("joined", START_SECONDS)
            self._group.append(joined["peer"])
            initial_peers = initial_peers or joined["addresses"]

    def together(self, figures: Figures, name: str) -> None:
        """One round: nobody begins before all are prepared."""
        for worker in self._workers:
            worker.tell("arm", group=self._group)
        for worker in self._workers:
            worker.hear("armed", ROUND_SECONDS)
        for worker in self._workers:
            worker.tell("go")
        answers: list[dict[str, Any]] = [worker.hear("stepped", ROUND_SECONDS) for worker in self._workers]
        if not all(answer["averaged"] for answer in answers):
            figures.fail(name)
            return
        figures.add(name, [answer["seconds"] for answer in answers])
        samples = np.stack([np.load(self._folder / answer["sample"]) for answer in answers])
        figures.differ("hivemind", float((samples.max(0) - samples.min(0)).max()))
