"""What goes wrong in a simulation, and how much of it."""

from dataclasses import dataclass, fields
from typing import Self

from hivegrpo.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Faults:
    """Rates between 0 and 1; with none of them nothing goes wrong."""

    churn: float = 0.0
    """Share of the peers that join or are gone for good in each round, half of it each; half of these say goodbye."""
    crashes: float = 0.0
    """Share of the peers that crash in each round, and come back with what they have on disk."""
    coordinator: float = 0.0
    """Probability, in each round, that the coordinator crashes and starts again from its event history."""
    loss: float = 0.0
    """Probability that a message is lost: of a report or of its answer, which is sent again; or of a push, which ends
    the session, so that the peer joins again."""
    partitions: float = 0.0
    """Probability, in each round, that up to half of the peers are cut off from the others and the coordinator."""
    slow: float = 0.0
    """Share of the peers that work and upload at a tenth of what they would."""
    liars: float = 0.0
    """Share of the peers that lie, in one of many ways each time."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "none", "all", or "churn=0.2,loss=0.05,partitions": a name alone is a moderate rate."""
        if text == "none":
            return cls()
        if text == "all":
            return cls(**MODERATE)
        rates: dict[str, float] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, value = part.partition("=")
            if name not in MODERATE:
                raise ConfigError(f"No fault is called {name!r}.", f"Use {', '.join(MODERATE)}, all, or none.")
            rates[name] = MODERATE[name] if not value else _rate(name, value)
        return cls(**rates)

    def __str__(self) -> str:
        """What `parse` reads."""
        rates = {item.name: getattr(self, item.name) for item in fields(self)}
        return ",".join(f"{name}={rate!r}" for name, rate in rates.items() if rate) or "none"


MODERATE = {
    "churn": 0.2,
    "crashes": 0.1,
    "coordinator": 0.05,
    "loss": 0.05,
    "partitions": 0.1,
    "slow": 0.1,
    "liars": 0.1,
}
"""Rates that "all" has."""


def _rate(name: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"The rate of {name} is {value!r}.", "Give a number between 0 and 1.")
    return rate
