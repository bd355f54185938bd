"""Runs without a model: one LoRA tensor pair of a chosen size, and learners whose gradients come from integers."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.learn.policy import Layout
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, run_id_of, sign_payload
from hivegrpo.protocol.identity import Identity

WIDTH = 8
NONCE = bytes(16)
KEPT_VERSIONS = 1000
"""More than any test makes: so every span can be recomputed at its end."""


GATE_SECONDS = 60.0
"""After which a held learner fails."""


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """A complete configuration with short times; sections override theirs key by key."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "versions": 3, "start_peers": 2, "seed": 7},
        "model": {"path": "model"},
        "dataset": {"path": "rows.jsonl"},
        "rewards": {"functions": ["exact_match"]},
        "grpo": {"prompts_per_round": 6, "num_generations": 4, "max_completion_length": 8},
        "averaging": {"audit_rate": 0.0},
        "timing": {"lease": 20.0, "exchange": 5.0, "step": 10.0, "grace": 1.0},
        "distribution": {"anchor_every": 2, "keep_versions": KEPT_VERSIONS},
        "admission": {"mode": "open"},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    return RunConfig.model_validate(tables)


def signed_run(
    coordinator: Identity,
    config: RunConfig,
    values: int = 40_000,
    rows: int = 100,
    layout: Layout | None = None,
    run_key: Identity | None = None,
) -> pb.Signed:
    """A run manifest over a vector of at least `values`, of which half are LoRA's A and half its B; or of a layout."""
    rank = -(-values // (2 * WIDTH))
    layout = layout or [("layer.lora_A.weight", (rank, WIDTH)), ("layer.lora_B.weight", (WIDTH, rank))]
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=coordinator.peer_id,
        config=config.canonical_json(),
        nonce=NONCE,
        digests={"known_answer": bytes.fromhex(check_numerics())},
        rows=rows,
        layout=[pb.Tensor(name=name, shape=shape) for name, shape in layout],
        rewards={"exact_match": 1},
        run_key=run_key.peer_id if run_key is not None else "",
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(coordinator, run_id_of(payload), "RunManifest", payload)


def vector_of(lease: int, values: int, iteration: int = 0) -> torch.Tensor:
    """A gradient that depends on lease and iteration alone: small integers over 1024, exact in fp32."""
    name = f"{lease}.{iteration}" if iteration else str(lease)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return ((torch.arange(values, dtype=torch.int64) * 2_654_435_761 + seed) % 2048 - 1024).float() / 1024


class Gate:
    """Holds a learner, on its thread, at one of its gradients until the test lets it go."""

    def __init__(self, at: int) -> None:
        self.reached = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._open = threading.Event()
        self._left = at

    def __call__(self, lease: int) -> None:
        self._left -= 1
        if self._left == 0:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._open.wait(GATE_SECONDS)

    def open(self) -> None:
        self._open.set()


Split = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Offsets of a lease that are used, dropped and returned."""


def use_what_is_wanted(count: int, wanted: int) -> Split:
    return range(wanted), (), range(wanted, count)


class IntegerLearner:
    """Uses what `split` says of its lease, and takes `vector_of` for a gradient. `before` runs on the worker thread."""

    def __init__(
        self,
        values: int,
        before: Callable[[int], None] | None = None,
        split: Callable[[int, int], Split] = use_what_is_wanted,
    ) -> None:
        self.values = values
        self.before = before
        self.split = split
        self.loaded = torch.zeros(0)
        self.during_sample: Callable[[int], None] | None = None
        self.sampled: list[tuple[int, int, torch.Tensor]] = []
        """What was sampled ahead: the lease, and the version and parameters that were loaded."""
        self.references: list[torch.Tensor | None] = []
        """All that were loaded, in turn; it begins with the base."""
        self.used: list[tuple[int, torch.Tensor | None]] = []
        """Of each gradient: the version it was taken at, and the reference."""
        self.rollouts: dict[int, tuple[int, ...]] = {}
        """Offsets used, by lease."""

    def load(self, version: int, vector: torch.Tensor) -> None:
        self.version, self.loaded = version, vector.clone()

    def load_reference(self, vector: torch.Tensor | None) -> None:
        self.references.append(None if vector is None else vector.clone())

    def sample(self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event) -> None:
        if self.during_sample is not None:
            self.during_sample(lease)
        self.sampled.append((lease, self.version, self.loaded))

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        if self.before is not None:
            self.before(lease)
        used, dropped, returned = map(tuple, self.split(count, wanted))
        self.rollouts = {lease: used}
        metrics = {"reward": 0.5, "num_tokens": 10.0 * len(used), "groups/dropped": float(len(dropped))}
        return self._contribution(lease, 0, used, dropped, returned, metrics)

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        if self.before is not None:
            self.before(lease)
        if lease not in self.rollouts:
            return None
        return self._contribution(lease, iteration, self.rollouts[lease], (), (), {"entropy": 0.5})

    def _contribution(
        self,
        lease: int,
        iteration: int,
        used: tuple[int, ...],
        dropped: tuple[int, ...],
        returned: tuple[int, ...],
        metrics: dict[str, float],
    ) -> LearnedContribution:
        self.used.append((self.version, self.references[-1] if self.references else None))
        return LearnedContribution(
            vector=vector_of(lease, self.values, iteration) if used else torch.zeros(self.values),
            weight=4 * len(used),
            used=used,
            dropped=dropped,
            returned=returned,
            metrics=metrics,
            num_tokens=10 * len(used),
            seconds={"rollout": 0.001, "gradient": 0.001},
            note="" if used else "all rewards are equal",
        )

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        return Evaluation(solved=5, problems=10)
