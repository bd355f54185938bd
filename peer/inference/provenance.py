"""Where exported weights come from: the run, its version, and what the signed chain tells of how it was made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hivegrpo.peer.inference.cost import Cost, cost_of
from hivegrpo.peer.inference.example import example_prompt
from hivegrpo.peer.inference.locate import LocalRun
from hivegrpo.protocol.config import RunConfig

ACCURACY = "eval/accuracy"
BASE_PARTS = ("base", "chat_template", "tokenizer")
FORMAT = 1

Measured = tuple[int, float]
"""A policy version, and its greedy accuracy on the held-out rows."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Of a version of a run, or of its base."""

    config: RunConfig
    """As published: without this machine's folders."""
    version: int | None
    """None is the base."""
    state_root: str | None
    accuracies: tuple[Measured, ...]
    """What was measured up to the version, oldest first."""
    cost: Cost
    """Of all versions up to this one."""
    run_id: str | None = None
    """None for a training on one machine, which has no chain, and nobody who coordinates it."""
    coordinator: str | None = None
    held_out: str | None = None
    """SHA-256 of the canonical rows that accuracy is measured on, as the run manifest has it."""
    contributors: tuple[frozenset[str], ...] = ()
    """Peers in each version up to this one."""
    example: str | None = None
    """A prompt like those of the training."""

    @property
    def revision(self) -> int | str:
        """As --revision names it."""
        return "base" if self.version is None else self.version

    def origin(self) -> dict[str, Any]:
        """The content of an export's hivegrpo.json."""
        return {
            "format": FORMAT,
            "run": self.config.run.name,
            "run_id": self.run_id,
            "coordinator": self.coordinator,
            "version": self.revision,
            "state_root": self.state_root,
            "config": self.config.model_dump(mode="json"),
        }


def provenance_of(run: LocalRun, version: int | None) -> Provenance:
    """What the chain tells of a version, or of the base."""
    chain = run.chain
    entries = chain.entries[: (version or 0) + 1]
    later = [entry.manifest.message.metrics for entry in chain.entries[1 : len(entries) + 1]]
    contributors = [entry.manifest.message.contributors for entry in entries if entry.plan is not None]
    return Provenance(
        config=run.config,
        version=version,
        state_root=None if version is None else chain.entries[version].manifest.message.state.root.hex(),
        accuracies=accuracies(enumerate(later)),
        cost=cost_of(entries),
        run_id=chain.run_id,
        coordinator=chain.coordinator,
        held_out=chain.manifest.message.digests.get("evaluation", b"").hex() or None,
        contributors=tuple(frozenset(contributor.peer for contributor in peers) for peers in contributors),
        example=example_prompt(run),
    )


def identity_of(run: LocalRun, version: int | None) -> dict[str, str]:
    """What tells a model from all others: a version's run and state root, or digests of the parts of the base."""
    if version is None:
        return {part: run.chain.manifest.message.digests[part].hex() for part in BASE_PARTS}
    return {"run": run.chain.run_id, "state_root": run.chain.entries[version].manifest.message.state.root.hex()}


def accuracies(metrics: Iterable[tuple[int, Mapping[str, float]]]) -> tuple[Measured, ...]:
    """From a version's number and the metrics of the one made from it, in which its accuracy is."""
    return tuple((version, values[ACCURACY]) for version, values in metrics if ACCURACY in values)
