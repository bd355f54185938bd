"""What a coordinator has told of its run so far."""

import time
from collections import defaultdict
from collections.abc import Callable

from hivegrpo.cli.output import Record, accuracy_interval

SPEED_VERSIONS = 5
"""Versions over which the speed is measured."""


class Progress:
    """Collects the coordinator's JSON lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.status: Record = {}
        self.versions: list[Record] = []
        self.roots: dict[int, dict[str, str]] = defaultdict(dict)
        """Of each version, by peer: the state root that it reported."""
        self.votes: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        """Of each version, by peer: the metrics that came with its vote."""
        self._clock = clock
        self._times: list[float] = []

    def take(self, record: Record) -> None:
        """Note a line; kinds that say nothing about progress are left out."""
        match record["kind"]:
            case "status" | "stopped":
                self.status = record
            case "version":
                self.versions.append(record)
                self._times.append(self._clock())
            case "root":
                self.roots[record["version"]][record["peer"]] = record["state_root"]
                if record["metrics"]:
                    self.votes[record["version"]][record["peer"]] = record["metrics"]

    @property
    def finished(self) -> bool:
        """Whether the last version is committed."""
        return bool(self.versions) and self.versions[-1]["version"] == self.versions[-1]["versions"]

    def latest(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return next((value for _, value in reversed(self.curve(metric))), None)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(version, value) wherever there is one: a version's metrics were measured on the policy before it."""
        return [
            (record["version"] - 1, record["metrics"][metric])
            for record in self.versions
            if metric in record["metrics"]
        ]

    def accuracy_errors(self) -> list[tuple[float, float]]:
        """How far the interval of each measured accuracy reaches below it and above; 0 where it is not known."""
        errors: list[tuple[float, float]] = []
        for metrics in (record["metrics"] for record in self.versions if "eval/accuracy" in record["metrics"]):
            found = accuracy_interval(metrics)
            errors.append((0.0, 0.0) if found is None else (found.value - found.low, found.high - found.value))
        return errors

    @property
    def tokens_per_second(self) -> float:
        """Of the whole swarm, over the last few versions."""
        count = min(SPEED_VERSIONS, len(self.versions) - 1)
        if count < 1:
            return 0.0
        tokens = sum(record["metrics"].get("num_tokens", 0.0) for record in self.versions[-count:])
        return float(tokens / max(self._times[-1] - self._times[-1 - count], 1e-9))

    @property
    def bytes_exchanged(self) -> int:
        """Received by all peers in all rounds."""
        votes = (vote for peers in self.votes.values() for vote in peers.values())
        return int(sum(vote.get("bytes_received", 0.0) for vote in votes))
