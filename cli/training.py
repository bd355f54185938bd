"""Training on this machine alone, in a home of its own: what it began with, its state, and its metrics."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, Self

from hivegrpo.cli.output import Record
from hivegrpo.peer.inference.cost import Cost, total_cost
from hivegrpo.peer.inference.export import Options, write_policy
from hivegrpo.peer.inference.provenance import Provenance, accuracies
from hivegrpo.peer.learn.base import resolve_model
from hivegrpo.peer.learn.data import PROMPT, Prompts, canonical_rows, require_same_columns
from hivegrpo.peer.learn.digests import model_digests, rows_digest
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.solo import Solo
from hivegrpo.peer.learn.step import state_bytes
from hivegrpo.peer.rewards.registry import find_rewards, reward_versions
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.history import History, read_history
from hivegrpo.protocol.homes import state_folder

ORIGIN_FILE = "origin.json"
STATE_FILE = "state.bin"
METRICS_FILE = "metrics.jsonl"


def home_of(config: RunConfig) -> Path:
    """The home of a config in the state folder: another one for another config."""
    digest = hashlib.sha256(config.canonical_json().encode()).hexdigest()[:16]
    return state_folder() / "solo" / f"{config.run.name}-{digest}"


class Training:
    """A `Solo` that keeps its state and metrics in a home. For one thread."""

    def __init__(self, solo: Solo, home: Path, base: Path) -> None:
        """Go on with what is in the home. `base`: folder of the base model."""
        self._solo, self._home, self._base = solo, home, base
        if (home / STATE_FILE).is_file():
            solo.restore(home / STATE_FILE)
        _forget_after(home / METRICS_FILE, solo.version)
        self._metrics = History(home / METRICS_FILE)

    @classmethod
    def open(cls, config: RunConfig, settings: PeerConfig, home: Path) -> Self:
        """Get model, prompts and rewards of a run, and check that they fit each other, and what the home began with.

        ConfigError if something is missing or does not fit; UnreachableError if a hub is needed and does not answer.
        """
        rewards = find_rewards(config.rewards.functions, config.rewards.options)
        rows = canonical_rows(config.dataset)
        held_out = canonical_rows(config.dataset, config.evaluation) if config.evaluation is not None else None
        sets = [Prompts.from_jsonl(data) for data in (rows, held_out) if data is not None]
        require_same_columns(sets[0], sets[-1])
        for reward in rewards:
            reward.require_columns(sets[0].columns)
        folder = resolve_model(config.model)
        digests = model_digests(folder) | {"dataset": rows_digest(rows)}
        if held_out is not None:
            digests["evaluation"] = rows_digest(held_out)
        origin = {name: digest.hex() for name, digest in digests.items()} | reward_versions(rewards)
        _require_same_origin(home, {"config": config.canonical_json(), **origin})
        learner = Learner.open(config, settings, folder, sets[0], sets[1] if held_out is not None else None)
        try:
            learner.encoder.check(row[PROMPT] for prompts in sets for row in prompts.rows)
            return cls(Solo(config, learner, version_zero(learner.layout, config, folder)), home, folder)
        except BaseException:
            learner.close()
            raise

    @property
    def solo(self) -> Solo:
        """What is trained, to be looked at between steps; the steps are taken here."""
        return self._solo

    @property
    def version(self) -> int:
        """The newest version."""
        return self._solo.version

    @property
    def finished(self) -> bool:
        """Whether the last version is made."""
        return self._solo.finished

    def advance(self, cancelled: threading.Event) -> list[Record]:
        """One step, which is on disk when this returns; what there is to tell about it. Raises as `Solo.step`."""
        before = self.version
        step = self._solo.step(cancelled)
        told: list[Record] = []
        if step.version > before:
            # Written before the state is: what a crash leaves over, the next start removes.
            fields = {"version": step.version, "state_root": self._root(), "metrics": step.metrics}
            self._metrics.record("version", **fields)
            told.append({"kind": "version", "versions": self._solo.config.run.versions, **fields})
        self._solo.save(self._home / STATE_FILE)
        if step.note:
            told.append({"kind": "nothing", "position": self._solo.position, "note": step.note})
        return told

    def conclude(self, cancelled: threading.Event) -> Record:
        """The last version's accuracy, if the run has held-out rows: measured once. Raises Cancelled."""
        found = next(
            (record for record in read_history(self._home / METRICS_FILE) if record["kind"] == "finished"), None
        )
        if found is None:
            found = {"kind": "finished", "version": self.version, "metrics": self._solo.evaluate(cancelled)}
            self._metrics.record(**found)
        return found

    @property
    def cost(self) -> Cost:
        """Of all versions so far."""
        told = read_history(self._home / METRICS_FILE)
        return total_cost([record["metrics"] for record in told if record["kind"] == "version"])

    @property
    def provenance(self) -> Provenance:
        """Of the newest version. What a version's metrics tell of was measured on the one before."""
        told = list(read_history(self._home / METRICS_FILE))
        measured = [(record["version"] - (record["kind"] == "version"), record["metrics"]) for record in told]
        config = self._solo.config.published()
        return Provenance(config, self.version, self._root(), accuracies(measured), self.cost)

    def export(self, to: Path) -> None:
        """Write the newest version as a Hugging Face folder, merged into the base; uses the policy up."""
        learner = self._solo.learner
        write_policy(to, self.provenance, learner.policy, learner.encoder.tokenizer, self._base, Options())

    def close(self) -> None:
        """End the processes that score, and release the files."""
        self._metrics.close()
        self._solo.learner.close()

    def _root(self) -> str:
        return blob_root(state_bytes(self._solo.state)).hex()


def _require_same_origin(home: Path, origin: dict[str, Any]) -> None:
    """Note what a home begins with; ConfigError if it began with something else."""
    path = home / ORIGIN_FILE
    if not path.is_file():
        write_whole(path, json.dumps(origin, indent=1).encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *origin} if before.get(name) != origin.get(name))
    if changed:
        raise ConfigError(
            f"The home {home} holds a training with another {', '.join(changed)}.",
            "Give this one an empty --home, or move that folder away.",
        )


def _forget_after(metrics: Path, version: int) -> None:
    """Remove what was told of versions that a crash kept from being saved."""
    records = list(read_history(metrics))
    kept = [record for record in records if record["version"] <= version]
    if len(kept) < len(records):
        write_whole(metrics, "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept).encode())
