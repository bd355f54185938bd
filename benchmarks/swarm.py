"""A run of hivegrpo whose rounds begin when the driver says."""

from pathlib import Path
from typing import Any

from loopback import loopback_bytes
from processes import Crew
from series import Figures, Size

START_SECONDS = 90.0
"""For a worker to import what it needs, on a busy machine."""

ROUND_SECONDS = 60.0


class SwarmRounds:
    """A coordinator and peers. `together` is one version: from lease to lease, with step, vote and commit."""

    def __init__(self, crew: Crew, size: Size, versions: int, folder: Path) -> None:
        """At most `versions` - 1 rounds can be asked for: each ends with the next lease."""
        self._size = size
        arguments = (size.peers, size.values)
        coordinator = crew.start("swarm_coordinator.py", "coordinator", folder / "coordinator", *arguments, versions)
        self._workers = [
            crew.start("swarm_peer.py", f"peer-{rank}", folder / f"peer-{rank}", rank, *arguments)
            for rank in range(size.peers)
        ]
        for worker in self._workers:
            worker.hear("loaded", START_SECONDS)
        address = coordinator.hear("serving", START_SECONDS)["address"]
        for worker in self._workers:
            worker.tell("join", address=address)
        self._sent = self._count(START_SECONDS)

    def together(self, figures: Figures) -> None:
        """One round, added to `figures` if every peer has the mean."""
        before, on_loopback = self._sent, loopback_bytes()
        for worker in self._workers:
            worker.tell("go")
        answers = self._hear("averaged", ROUND_SECONDS)
        self._sent = self._count(ROUND_SECONDS)
        on_loopback = loopback_bytes() - on_loopback
        if not all(answer["averaged"] for answer in answers):
            figures.fail("round", "data", "encoding")
            return
        for name in ("round", "data", "encoding"):
            figures.add(name, [answer[name] for answer in answers])
        least = 2 * (self._size.peers - 1) / self._size.peers * answers[0]["encoded"]
        figures.ratios("application", (self._sent - before) / self._size.peers / least)
        figures.ratios("interface", on_loopback / self._size.peers / least)
        figures.differ("hivegrpo", float(len({answer["digest"] for answer in answers}) > 1))

    def _count(self, timeout: float) -> int:
        """Bytes that all peers have sent, once all wait for the next round: until then one may still serve another."""
        self._hear("armed", timeout)
        for worker in self._workers:
            worker.tell("count")
        return sum(answer["sent"] for answer in self._hear("counted", timeout))

    def _hear(self, kind: str, timeout: float) -> list[dict[str, Any]]:
        return [worker.hear(kind, timeout) for worker in self._workers]
