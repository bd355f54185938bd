"""What a run has come to, from its own records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from hivegrpo.cli.output import Record
from hivegrpo.protocol.history import read_history

METRICS_FILE = "metrics.jsonl"
SECONDS = ("seconds/rollout", "seconds/gradient", "seconds/step")
"""What training takes; evaluation and measurements are not in it."""


@dataclass
class Tally:
    """Versions of one run, in order, and what they cost."""

    records: list[Record] = field(default_factory=list)
    """Of versions: {"version": ..., "state_root": ..., "metrics": ...}."""
    accuracy: float | None = None
    """Of the last version, once the run is finished and if it has held-out rows."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the run in a folder."""
        tally = cls()
        for record in read_history(folder / METRICS_FILE):
            tally.take(record)
        return tally

    def take(self, record: Record) -> None:
        """Note one record; kinds that say nothing of versions are left out."""
        match record["kind"]:
            case "version":
                self.records.append(record)
            case "finished":
                self.accuracy = record["metrics"].get("eval/accuracy")

    @property
    def versions(self) -> int:
        """The newest version."""
        return int(self.records[-1]["version"]) if self.records else 0

    @property
    def seconds(self) -> float:
        """That training took: rollouts, gradients and steps."""
        return sum(self.sum(name) for name in SECONDS)

    @property
    def tokens(self) -> float:
        """That were sampled, prompts included."""
        return self.sum("num_tokens")

    @property
    def state_root(self) -> str | None:
        """Of the newest version."""
        return str(self.records[-1]["state_root"]) if self.records else None

    def sum(self, metric: str) -> float:
        """Over all versions."""
        return float(sum(value for _, value in self.curve(metric)))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(version, value) where there is one: a version's metrics were measured on the policy before it."""
        return [
            (record["version"] - 1, record["metrics"][metric]) for record in self.records if metric in record["metrics"]
        ]
