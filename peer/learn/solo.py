"""Training on one machine alone: the same learner and the same canonical step, without a network.

For tuning settings before a run is launched, and for those that no swarm can have (they look at a whole batch).
"""

import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from hivegrpo.peer.learn.device_time import DeviceTime
from hivegrpo.peer.learn.learner import LearnedContribution, Learner
from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes, state_from_bytes, state_size
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.scalars import StepScalars
from hivegrpo.protocol.schedule import learning_rate

_POSITION_BYTES = 8
_VALUE_BYTES = 4


@dataclass(frozen=True)
class SoloStep:
    """What one call of `Solo.step` came to."""

    version: int
    """The newest version; the same as before if nothing was learnt."""
    metrics: dict[str, float]
    """Under TRL's names, with seconds/rollout, /gradient and /step, learning_rate, and at times eval/accuracy and
    eval/problems.

    A version's num_device_seconds are all since the one before.

    What was sampled and evaluated is the version before.
    """
    note: str
    """Why there was nothing to learn, in a line; empty if there was."""


class Solo:
    """A policy's versions, one after the other. For one thread."""

    def __init__(self, config: RunConfig, learner: Learner, genesis: Tensor) -> None:
        """Begin at version 0 with these parameters, (size,) float32."""
        self.config, self.learner = config, learner
        self.state = PolicyState.initial(genesis)
        self.reference: Tensor | None = None
        """Parameters of the KL reference, once it has moved."""
        self.position = 0
        """Next position in the run's order of prompts."""
        self._spare = self.state.empty_like()
        self._lease = 0
        self._barren = 0
        """Positions in a row that taught nothing."""
        self._evaluation: dict[str, float] = {}
        """Of the newest version, once it is evaluated."""
        self._device_time = DeviceTime()
        learner.load(0, self.state.parameters)

    @property
    def version(self) -> int:
        """The newest version: optimizer steps taken."""
        return self.state.step

    @property
    def finished(self) -> bool:
        """Whether the run's last version is made."""
        return self.version >= self.config.run.versions

    def step(self, cancelled: threading.Event | None = None) -> SoloStep:
        """Work on the next prompts, or on the last rollout again, and take a step with what came of it.

        A version is not made of nothing: then only the position goes on; ConfigError once all prompts have been tried
        in vain. Raises Cancelled soon after the event is set, and leaves everything as it was.
        """
        cancelled = cancelled or threading.Event()
        section = self.config.evaluation
        with self._device_time.learning():
            evaluation = self.evaluate(cancelled) if section is not None and self.version % section.every == 0 else {}
            learned = self._learn(cancelled)
        metrics = learned.metrics | {f"seconds/{name}": seconds for name, seconds in learned.seconds.items()}
        if learned.weight > 0:
            began = time.monotonic()
            with self._device_time.stepping():
                metrics["learning_rate"] = self._advance(learned.vector)
            metrics["seconds/step"] = time.monotonic() - began
            metrics |= self._device_time.take(on_gpu=learned.on_gpu)
            self._barren = 0
        else:
            self._count_barren(learned)
        return SoloStep(self.version, metrics | evaluation, learned.note)

    def evaluate(self, cancelled: threading.Event | None = None) -> dict[str, float]:
        """The newest version's accuracy on the held-out rows, as a metric; nothing if the run has none."""
        if self.config.evaluation is not None and not self._evaluation:
            self._evaluation = self.learner.evaluate(cancelled or threading.Event()).metrics
        return self._evaluation

    def save(self, path: Path) -> None:
        """Write state, position and reference; whole, or not at all.

        Not the last rollout: what was still to be made of it (num_iterations) is lost to whoever goes on from here.
        """
        position = self.position.to_bytes(_POSITION_BYTES, "little")
        reference = self.reference.numpy().tobytes() if self.reference is not None else b""
        write_whole(path, b"".join((position, state_bytes(self.state), reference)))

    def restore(self, path: Path) -> Self:
        """Go on from a file that `save` wrote; ConfigError if it is of another policy."""
        data, values = memoryview(path.read_bytes()), self.state.parameters.numel()
        end = _POSITION_BYTES + state_size(values)
        if len(data) not in (end, end + _VALUE_BYTES * values):
            raise ConfigError(f"{path} is not a state of this run's policy.", "Move it away to begin anew.")
        self.position = int.from_bytes(data[:_POSITION_BYTES], "little")
        self.state = state_from_bytes(data[_POSITION_BYTES:end], values)
        self.reference = torch.frombuffer(bytearray(data[end:]), dtype=torch.float32) if len(data) > end else None
        self._evaluation = {}
        self.learner.load(self.version, self.state.parameters)
        self.learner.load_reference(self.reference)
        return self

    def _learn(self, cancelled: threading.Event) -> LearnedContribution:
        grpo = self.config.grpo
        iteration = self.version % grpo.num_iterations
        if iteration > 0:
            again = self.learner.contribute_again(self._lease, iteration, cancelled)
            if again is not None:
                return again
        wanted = grpo.prompts_per_round
        count = math.ceil(wanted * grpo.dynamic_sampling_factor)
        lease = self.position + 1
        learned = self.learner.contribute(lease, self.position, count, wanted, cancelled)
        self._lease = lease
        self.position += count - len(learned.returned)
        return learned

    def _advance(self, gradient: Tensor) -> float:
        """The canonical step; the learning rate that it had."""
        optimizer, version = self.config.optimizer, self.version + 1
        rate = learning_rate(version, self.config.run.versions, optimizer)
        scalars = StepScalars.for_step(
            version,
            learning_rate=rate,
            beta1=optimizer.adam_beta1,
            beta2=optimizer.adam_beta2,
            epsilon=optimizer.adam_epsilon,
            weight_decay=optimizer.weight_decay,
        )
        adamw_step(self.state, gradient, scalars, out=self._spare)
        self.state, self._spare = self._spare, self.state
        self._evaluation = {}
        self.learner.load(version, self.state.parameters)
        every = self.config.grpo.ref_model_sync_steps
        if every is not None and version % every == 0:
            self.reference = self.state.parameters.clone()
            self.learner.load_reference(self.reference)
        return rate

    def _count_barren(self, learned: LearnedContribution) -> None:
        self._barren += len(learned.used) + len(learned.dropped)
        if self._barren >= len(self.learner.prompts):
            raise ConfigError(
                f"All {len(self.learner.prompts)} prompts were tried, and taught nothing; at last {learned.note}.",
                "Raise the limit that this names, if it names one; else take prompts that the model sometimes solves, "
                "rewards that tell its completions apart, or more num_generations.",
            )
