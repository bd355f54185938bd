"""What a swarm on this machine has left of one run: its policies, to be measured, and the metrics that were signed."""

import json
import threading
from pathlib import Path

from hivegrpo.cli.sweep.tally import METRICS_FILE
from hivegrpo.peer.inference.locate import open_run
from hivegrpo.peer.inference.states import choose, policy_vector
from hivegrpo.peer.learn.base import resolve_model
from hivegrpo.peer.learn.data import Prompts, canonical_rows
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import write_whole


class SwarmRecord:
    """A finished run's folder, with the model in memory. For one thread."""

    def __init__(self, folder: Path, config: RunConfig, settings: PeerConfig) -> None:
        """ConfigError if the run has not made its last version."""
        self._run = open_run(folder)
        self.last = choose(self._run, "latest")
        if self.last < config.run.versions:
            raise ConfigError(
                f"Only version {self.last} of {config.run.versions} can be had from {folder}.",
                "Move the folder away, and start the sweep again with --retry-failed.",
            )
        self._model = resolve_model(config.model)
        prompts = Prompts.from_jsonl(canonical_rows(config.dataset))
        rows = canonical_rows(config.dataset, config.evaluation) if config.evaluation is not None else None
        held_out = Prompts.from_jsonl(rows) if rows is not None else None
        self.learner = Learner.open(config, settings, self._model, prompts, held_out)

    def load(self, version: int) -> None:
        """Let the learner have a version's parameters."""
        self.learner.load(version, policy_vector(self._run, version, self._model))

    def write_metrics(self, folder: Path, cancelled: threading.Event) -> None:
        """Every version's signed metrics, and the accuracy of the policy that is loaded, as a run on one machine has
        them. Raises Cancelled."""
        records = [
            {
                "kind": "version",
                "version": version,
                "state_root": entry.manifest.message.state.root.hex(),
                "metrics": dict(entry.manifest.message.metrics),
            }
            for version, entry in enumerate(self._run.chain.entries)
            if version > 0
        ]
        measured = {}
        if self.learner.config.evaluation is not None:
            measured = {"eval/accuracy": self.learner.evaluate(cancelled).accuracy}
        records.append({"kind": "finished", "version": self.last, "metrics": measured})
        lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in records)
        write_whole(folder / METRICS_FILE, "".join(lines).encode())

    def close(self) -> None:
        """End the processes that score."""
        self.learner.close()
