"""What came of a simulation, counted from the coordinator's events."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from hivegrpo.coordinator import events as ev
from hivegrpo.protocol.invariants import Violation


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one simulation."""

    versions: int
    seconds: float
    """Simulated."""
    peers: int
    """That there ever were."""
    rounds: tuple[float, ...]
    """Simulated seconds of each version, from the commit before."""
    events: Mapping[str, int]
    """The coordinator's events, by kind."""
    expired: Mapping[str, int]
    """Leases, by the reason."""
    rejected: Mapping[str, int]
    """Contributions, by the reason."""
    failed: Mapping[str, int]
    """Attempts, by the reason."""
    refused: Mapping[str, int]
    """Reports, by the first word of the answer."""
    restarts: int
    """Of the coordinator."""
    cpu_seconds: float
    """That the coordinator's own code took; 0 if nobody measured."""
    digest: str
    """SHA-256 of the event history: equal if two simulations did the same."""
    violations: tuple[Violation, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        events, count = self.events, sum(self.events.values())
        granted, received = events.get("LeaseGranted", 0), events.get("ContributionReceived", 0)
        rounds = self.rounds or (0.0,)
        return [
            f"versions        {self.versions}, in {self.seconds:.0f} simulated seconds, with {self.peers} peers in all",
            f"rounds          {fmean(rounds):.1f} s on average, median {median(rounds):.1f}, longest {max(rounds):.1f}",
            f"leases          {granted} granted, {sum(self.expired.values())} expired{_list(self.expired)}",
            f"contributions   {received} received, {sum(self.rejected.values())} rejected{_list(self.rejected)}",
            f"attempts        {events.get('PlanMade', 0)}, {sum(self.failed.values())} failed{_list(self.failed)}",
            f"begun again     {events.get('RoundAbandoned', 0)} rounds abandoned, {events.get('RoundEmpty', 0)} empty",
            f"reports refused {sum(self.refused.values())}{_list(self.refused)}",
            f"peers           {events.get('PeerJoined', 0)} joins, {events.get('PeerBanned', 0)} banned",
            f"coordinator     {count} events, {self.restarts} restarts, {self.cpu_seconds:.1f} s of CPU, "
            f"{1e6 * self.cpu_seconds / max(count, 1):.0f} µs an event",
            f"history         {self.digest}",
            *(f"VIOLATION       invariant {violation.invariant}: {violation.text}" for violation in self.violations),
        ]


@dataclass(slots=True)
class Tally:
    """Counts while a simulation runs."""

    version: int = -1
    committed_at: float = 0.0
    restarts: int = 0
    rounds: list[float] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    expired: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def mean_round(self) -> float:
        """Simulated seconds of a round, so far; 0 before the first is over."""
        return fmean(self.rounds[-8:]) if self.rounds else 0.0

    def commit(self, at: float) -> None:
        """A version was committed."""
        if self.version >= 0:
            self.rounds.append(at - self.committed_at)
        self.version += 1
        self.committed_at = at

    def count(self, events: Sequence[ev.Event]) -> None:
        """Take events of the coordinator's."""
        self.events.update([type(event).__name__ for event in events])
        for event in events:
            match event:
                case ev.LeaseExpired(reason=reason):
                    self.expired[_kind(reason)] += 1
                case ev.ContributionRejected(reason=reason):
                    self.rejected[_kind(reason)] += 1
                case ev.AttemptFailed(reason=reason):
                    self.failed[_kind(reason)] += 1
                case _:
                    pass

    def outcome(
        self,
        *,
        violations: Sequence[Violation],
        seconds: float,
        digest: str,
        refused: Mapping[str, int],
        cpu_seconds: float,
        peers: int,
    ) -> Outcome:
        """What it all came to."""
        return Outcome(
            versions=self.version,
            seconds=seconds,
            peers=peers,
            rounds=tuple(self.rounds),
            events=dict(self.events),
            expired=dict(self.expired),
            rejected=dict(self.rejected),
            failed=dict(self.failed),
            refused=dict(refused),
            restarts=self.restarts,
            cpu_seconds=cpu_seconds,
            digest=digest,
            violations=tuple(violations),
        )


def _kind(reason: str) -> str:
    """A reason without the peers, numbers and details in it."""
    return re.split(r" \d| 12D3|^12D3|:", reason)[0].strip() or "other"


def _list(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return (": " + ", ".join(f"{count} {reason}" for reason, count in most)) if most else ""
