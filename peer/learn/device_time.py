"""How long a machine has worked on a run, as a metric: what a run has cost in device time adds up from it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

DEVICE_SECONDS = "num_device_seconds"
"""By the wall clock, of all that contributed: what is called num_* is summed over the peers."""
GPU_SECONDS = "num_gpu_seconds"
"""Those of them that were a GPU's; the rest was a CPU's."""


class DeviceTime:
    """Adds up until somebody takes it. Learning and stepping may be on two threads, each of them on one only."""

    def __init__(self) -> None:
        self._learned = 0.0
        self._stepped = 0.0

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, the device samples, scores, measures or differentiates."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._learned += time.monotonic() - began

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Inside, the CPU takes the canonical step, whatever device learns."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._stepped += time.monotonic() - began

    def take(self, *, on_gpu: bool) -> dict[str, float]:
        """What has come together since the last time, as metrics; `on_gpu`: where the learning was."""
        learned, stepped = self._learned, self._stepped
        self._learned, self._stepped = 0.0, 0.0
        metrics = {DEVICE_SECONDS: learned + stepped}
        return metrics | {GPU_SECONDS: learned} if on_gpu else metrics
