"""The round in flight: from the leases of one version to the commit of the next."""

from collections import OrderedDict
from dataclasses import dataclass, field

from hivegrpo.coordinator.readings import Ballot, Senders, Vote
from hivegrpo.coordinator.speeds import Pacing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import TURNS, Draw
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.values import value

EXTRA_SECONDS = 2.0
"""Beyond a plan's own durations, for messages that are under way."""

EMPTY_SECONDS = 0.5
"""Pause after the second empty round in a row; each further one doubles it, up to `MOST_EMPTY_SECONDS`."""

MOST_EMPTY_SECONDS = 30.0

LAST_VOTES_SECONDS = 0.5
"""How long a version that has its quorum waits for the votes that are still to come."""

EVALUATION_PREFIX = "eval/"
"""Of metrics that were measured on the held-out set."""


def empty_pause(rounds: int) -> float:
    """Seconds without leases after so many empty rounds in a row: none after one, which may be bad luck."""
    return 0.0 if rounds < 2 else min(EMPTY_SECONDS * 2.0 ** min(rounds - 2, 30), MOST_EMPTY_SECONDS)


def longest_round(config: RunConfig) -> float:
    """Seconds from a round's first contribution to its commit, or until it is given up: the bound of all waits."""
    timing = config.timing
    attempt = timing.grace + timing.exchange + EXTRA_SECONDS + timing.step + EXTRA_SECONDS + LAST_VOTES_SECONDS
    if config.averaging.audit_rate > 0.0:
        attempt += timing.exchange + TURNS * timing.audit + EXTRA_SECONDS
    return timing.lease + timing.max_attempts * attempt


@dataclass(slots=True)
class Granted:
    """A live lease."""

    message: pb.Lease
    payload: bytes
    at: float
    """From here on its time runs: its grant, the commit of its version if it was granted ahead, or a restart."""
    since: float | None
    """When its peer could begin; None if that tells nothing of its speed, as after a restart."""


@dataclass(slots=True)
class Ahead:
    """Leases for the round after the one in flight, and who could have one: `coordinator/ahead.py` keeps it."""

    leases: dict[int, Granted] = field(default_factory=dict)
    holders: dict[str, int] = field(default_factory=dict)
    """Peers with such a lease."""
    away: dict[str, None] = field(default_factory=dict)
    """Those of them that are not connected."""
    waiting: dict[str, None] = field(default_factory=dict)
    """Connected peers of the plan's roster without one."""
    wanted: int = 0
    """Groups that these leases want."""
    evaluating: bool = False
    """Whether one of them has the held-out measurement."""


@value
class Held:
    """A contribution that was received, with the lease that it answers."""

    lease: pb.Lease
    message: pb.Contribution
    digest: bytes


@dataclass(frozen=True, slots=True)
class Audit:
    """What an auditor computed."""

    content: bytes
    """Root of the span; empty if the auditor did not get all chunks."""
    signed: bytes
    """The envelope: evidence, if the span turns out to be wrong."""


@dataclass(slots=True)
class Attempt:
    """One plan, and what was reported of it."""

    plan: pb.RoundPlan
    payload: bytes
    digest: bytes
    planned_at: float
    roster: frozenset[str]
    reports: dict[str, dict[str, int]] = field(default_factory=dict)
    """By reducer: the senders whose chunks it has whole, with the exact squared norm of each one's span."""
    pushes: dict[str, dict[str, float]] = field(default_factory=dict)
    """By reducer: seconds that each sender's chunks took to come."""
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    """By reducer: whose push it cut off, and why."""
    fetches: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By voter: seconds that each span took to come from its reducer; 0 if it came from elsewhere."""
    dots: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By reducer: its span's inner product with each sealed contribution's, and with itself."""
    seal: pb.Seal | None = None
    seal_payload: bytes = b""
    seal_digest: bytes = b""
    sealed_at: float = 0.0
    votes: dict[str, Ballot] = field(default_factory=dict)
    tally: dict[Ballot, int] = field(default_factory=dict)
    receipts: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """By voter: the reducers' signatures of the spans' receipts."""
    quorum_at: float | None = None
    """When the leading ballot had its quorum."""
    seed: bytes = b""
    """Of the audits; told once there is a quorum, and empty before."""
    drawn: tuple[Draw, ...] = ()
    """Spans that have to be audited, by the seed."""
    audits: dict[int, dict[str, Audit]] = field(default_factory=dict)
    """By span and auditor."""

    @property
    def quorum(self) -> int:
        """Votes that commit: two thirds of the roster, rounded up."""
        return -(-2 * len(self.roster) // 3)

    def take_report(self, reducer: str, senders: Senders) -> None:
        """Note a reducer's only report."""
        self.reports[reducer], self.pushes[reducer] = senders.norms, senders.seconds
        self.refused[reducer] = senders.refused

    def vote(self, peer: str, vote: Vote, at: float) -> None:
        """Count a peer's only vote, and note what it saw."""
        assert peer not in self.votes
        ballot = vote.ballot
        self.votes[peer], self.receipts[peer] = ballot, vote.receipts
        self.fetches[peer], self.dots[peer] = vote.seconds, vote.dots
        self.tally[ballot] = self.tally.get(ballot, 0) + 1
        if self.quorum_at is None and self.tally[ballot] >= self.quorum:
            self.quorum_at = at

    def winner(self) -> Ballot | None:
        """The ballot that has the quorum, if there is one."""
        return next((ballot for ballot, count in self.tally.items() if count >= self.quorum), None)


@dataclass(slots=True)
class Round:
    """Work on making `version`. Abandoned and empty rounds begin again under the same version, at iteration 0."""

    version: int
    iteration: int = 0
    """0: peers sample. Later: they take another gradient of the rollouts that the version before came from."""
    rollouts: dict[str, Held] = field(default_factory=dict)
    """After iteration 0: contributions to the version before, by peer; their leases are renewed, nobody else works."""
    attempts: int = 0
    """Number of the latest plan; it never goes back, so that a plan fences all earlier ones."""
    tries: int = 0
    """Plans since the rollout began."""
    served: dict[str, int] = field(default_factory=dict)
    """Peers with a live lease or a contribution, with the lease's id: they get no other one."""
    contributions: dict[str, Held] = field(default_factory=dict)
    """Those with weight that have not been rejected, by peer."""
    empties: dict[str, Held] = field(default_factory=dict)
    """Those without weight, by peer."""
    leased: int = 0
    """Groups that live leases want."""
    spent: int = 0
    """Groups that contributions used, or dropped in vain: never more of a lease than it wanted."""
    pacing: Pacing = field(default_factory=Pacing)
    """What peers' speeds are measured by in it."""
    rollout_at: float | None = None
    """When the first lease was granted."""
    closed_at: float = 0.0
    """When the rollout was closed, or the last attempt failed."""
    disputed: bool = False
    """Whether an attempt was given up because a single reducer lacks a sender; once is enough."""
    resume_at: float = 0.0
    """No lease is granted before."""
    evaluating: bool = False
    """Whether a live lease, or a contribution, has the held-out measurement."""
    evaluation: dict[str, float] = field(default_factory=dict)
    attempt: Attempt | None = None
    absent: OrderedDict[str, float] = field(default_factory=OrderedDict)
    """Peers with a lease or a contribution that are away, by the time since when, oldest first."""
