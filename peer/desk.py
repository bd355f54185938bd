"""A lease, worked on: from its positions to a committed contribution (steps 2 to 4 of a round)."""

import threading
import time
from dataclasses import dataclass
from typing import Protocol

import structlog
from torch import Tensor

from hivegrpo.peer.feedback import ErrorFeedback
from hivegrpo.peer.floats import NonFiniteError, require_moderate
from hivegrpo.peer.learn.device_time import DeviceTime
from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.learn.metrics import finite
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import ContributionStore, EncodedVector
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import NumericsError

log = structlog.get_logger(__name__)

EMPTY_ROOT = bytes(32)


class Learns(Protocol):
    """What a peer asks of the learning side (`peer.learn.learner`), on the worker thread."""

    def load(self, version: int, vector: Tensor) -> None:
        """Take over the parameters of a version."""

    def load_reference(self, vector: Tensor | None) -> None:
        """Take over the parameters of the KL reference; None for the base, with which it begins."""

    def sample(self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event) -> None:
        """Sample and score ahead of `contribute`, which differentiates it at the parameters loaded by then."""

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        """Sample, score and differentiate; raises Cancelled soon after the event is set."""

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        """Another gradient of the lease's rollout; None if that is gone, or too old. Raises Cancelled, too."""

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        """Accuracy on the held-out rows."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a lease came to."""

    contribution: pb.Contribution
    encoded: EncodedVector | None = None
    """None if it has no weight."""
    note: str = ""
    """Why there was nothing to learn, in one line."""
    on_gpu: bool = False


class LeaseDesk:
    """Works on the worker thread, on one lease at a time."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learns,
        versions: Versions,
        contributions: ContributionStore,
        feedback: ErrorFeedback,
    ) -> None:
        self.speed = 0.0
        """Tokens a second, of the last lease that was sampled."""
        self.device_time = DeviceTime()
        """What no contribution has told of yet."""
        self._learner = learner
        self._versions = versions
        self._contributions = contributions
        self._feedback = feedback
        self._codec = get_codec(config.averaging.codec)
        self._loaded_reference = 0

    def sample(self, lease: pb.Lease, parameters: Tensor, cancelled: threading.Event) -> tuple[float, float]:
        """Sample ahead, under the version before the lease's; when it began and ended, by time.perf_counter."""
        began = time.perf_counter()
        with self.device_time.learning():
            self._learner.load(lease.version - 1, parameters)
            self._learner.sample(lease.id, lease.start, lease.count, lease.wanted, cancelled)
        return began, time.perf_counter()

    def work(self, lease: pb.Lease, parameters: Tensor, cancelled: threading.Event) -> Work:
        """The contribution and, unless it is empty, its vector, which is on disk by then.

        Its metrics tell of the time since the last one that had weight: no version has those of the others.
        """
        with self.device_time.learning():
            work = self._work(lease, parameters, cancelled)
        if work.encoded is not None:
            work.contribution.metrics.update(self.device_time.take(on_gpu=work.on_gpu))
        return work

    def _work(self, lease: pb.Lease, parameters: Tensor, cancelled: threading.Event) -> Work:
        self._load(lease.version, parameters)
        contribution = pb.Contribution(
            lease=lease.id, iteration=lease.iteration, version=lease.version, root=EMPTY_ROOT
        )
        metrics = contribution.metrics
        try:
            if lease.evaluate:
                metrics.update(self._learner.evaluate(cancelled).metrics)
            if lease.iteration:
                learned = self._learner.contribute_again(lease.id, lease.iteration, cancelled)
            else:
                learned = self._learner.contribute(lease.id, lease.start, lease.count, lease.wanted, cancelled)
            if learned is None:
                return Work(contribution, note=f"the rollout of lease {lease.id} is not here any more, or is too old")
            require_moderate(learned.vector, "The gradient")
            encoded = self._encode(lease, learned)
        except (NonFiniteError, NumericsError) as error:
            log.error("numbers are not finite; the lease's prompts are dropped", lease=lease.id, reason=str(error))
            metrics["numerics/failed"] = 1.0
            contribution.dropped.extend(range(lease.count) if lease.iteration == 0 else ())
            return Work(contribution)
        if learned.num_tokens:
            self.speed = learned.num_tokens / max(sum(learned.seconds.values()), 1e-9)
        seconds = {f"seconds/{name}": value for name, value in learned.seconds.items()}
        metrics.update(finite(learned.metrics | seconds))
        contribution.MergeFrom(
            pb.Contribution(
                used=learned.used,
                dropped=learned.dropped,
                returned=learned.returned,
                weight=learned.weight,
                root=encoded.root,
            )
        )
        if learned.weight == 0:
            return Work(contribution, note=learned.note)
        self._contributions.add(lease.version, encoded)
        return Work(contribution, encoded, learned.note, learned.on_gpu)

    def _encode(self, lease: pb.Lease, learned: LearnedContribution) -> EncodedVector:
        """The gradient's bytes, which are fixed from here on. What has no weight is in no version: no feedback."""
        if self._codec.feedback and learned.weight:
            return self._feedback.encode(self._versions.chain.entries[lease.version], learned.vector)
        return EncodedVector.encode(self._codec, learned.vector)

    def _load(self, version: int, parameters: Tensor) -> None:
        """The version to work under, and the KL reference if it has moved."""
        self._learner.load(version, parameters)
        if self._loaded_reference != self._versions.reference_version:
            self._learner.load_reference(self._versions.reference)
            self._loaded_reference = self._versions.reference_version
