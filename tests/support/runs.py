"""Runs without a model: one LoRA tensor pair of a chosen size, and learners whose gradients come from integers."""

import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, run_id_of, sign_payload
from hivegrpo.protocol.identity import Identity

WIDTH = 8
NONCE = bytes(16)
KEPT_VERSIONS = 1000
"""More than any test makes: so every span can be recomputed at its end."""


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """A complete configuration with short times; sections override theirs key by key."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "test", "versions": 3, "start_peers": 2, "seed": 7},
        "model": {"path": "model"},
        "dataset": {"path": "rows.jsonl"},
        "rewards": {"functions": ["exact_match"]},
        "grpo": {"prompts_per_round": 6, "num_generations": 4, "max_completion_length": 8},
        "timing": {"lease": 20.0, "exchange": 5.0, "step": 10.0, "grace": 1.0},
        "distribution": {"anchor_every": 2, "keep_versions": KEPT_VERSIONS},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }
    for name, values in sections.items():
        tables[name] = tables.get(name, {}) | values
    return RunConfig.model_validate(tables)


def signed_run(coordinator: Identity, config: RunConfig, values: int = 40_000, rows: int = 100) -> pb.Signed:
    """A run manifest over a vector of at least `values`, of which half are LoRA's A and half its B."""
    rank = -(-values // (2 * WIDTH))
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=coordinator.peer_id,
        config=config.canonical_json(),
        nonce=NONCE,
        digests={"known_answer": bytes.fromhex(check_numerics())},
        rows=rows,
        layout=[
            pb.Tensor(name="layer.lora_A.weight", shape=[rank, WIDTH]),
            pb.Tensor(name="layer.lora_B.weight", shape=[WIDTH, rank]),
        ],
        rewards={"exact_match": 1},
    )
    payload = manifest.SerializeToString(deterministic=True)
    return sign_payload(coordinator, run_id_of(payload), "RunManifest", payload)


def vector_of(lease: int, values: int) -> torch.Tensor:
    """A gradient that depends on the lease alone: small integers over 1024, exact in fp32."""
    seed = int.from_bytes(hashlib.sha256(str(lease).encode()).digest()[:4], "big")
    return ((torch.arange(values, dtype=torch.int64) * 2_654_435_761 + seed) % 2048 - 1024).float() / 1024


class IntegerLearner:
    """Uses every prompt of its lease, and takes `vector_of` for a gradient. `before` runs on the worker thread."""

    def __init__(self, values: int, before: Callable[[int], None] | None = None) -> None:
        self.values = values
        self.before = before
        self.loaded = torch.zeros(0)

    def load(self, vector: torch.Tensor) -> None:
        self.loaded = vector.clone()

    def contribute(self, lease: int, start: int, count: int, cancelled: threading.Event) -> LearnedContribution:
        if self.before is not None:
            self.before(lease)
        return LearnedContribution(
            vector=vector_of(lease, self.values),
            weight=4 * count,
            used=tuple(range(count)),
            dropped=(),
            returned=(),
            metrics={"reward": 0.5, "num_tokens": 10.0 * count},
            num_tokens=10 * count,
            seconds={"rollout": 0.001, "gradient": 0.001},
        )

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        return Evaluation(solved=5, problems=10)
