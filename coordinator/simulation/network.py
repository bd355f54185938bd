"""Latency, loss and partitions between simulated peers and the coordinator."""

from math import sqrt
from random import Random
from typing import Protocol

MEDIAN_SECONDS = 0.05
"""Half of the messages take less."""


class Placed(Protocol):
    """Who can be cut off."""

    side: int
    """0 is the coordinator's side."""


class Network:
    """Draws what becomes of each message. Whoever owns a message schedules it."""

    def __init__(self, chance: Random, loss: float) -> None:
        self.loss = loss
        self._chance = chance

    def delay(self) -> float:
        """Seconds that a message takes: log-logistic of shape 4, so one of 80 takes more than three times the median.

        Built from square roots, which every machine rounds alike.
        """
        return MEDIAN_SECONDS * spread(self._chance)

    def loses(self) -> bool:
        """Whether a message is lost."""
        return self.loss > 0.0 and self._chance.random() < self.loss

    def carries(self, peer: Placed) -> bool:
        """Whether a message gets through between a peer and the coordinator."""
        return peer.side == 0 and not self.loses()

    def transit(self, peer: Placed) -> float | None:
        """Seconds that a message takes between a peer and the coordinator; None if it does not get through.

        As by `carries` and `delay`, in one call: a swarm sends a dozen messages a peer and round.
        """
        chance, loss = self._chance, self.loss
        if peer.side != 0 or (loss > 0.0 and chance.random() < loss):
            return None
        return MEDIAN_SECONDS * spread(chance)


def spread(chance: Random) -> float:
    """A positive number around 1: log-logistic of shape 4."""
    share = chance.random()
    return sqrt(sqrt(share / (1.0 - share))) if share > 0.0 else 0.0
