"""The coordinator's state: what `apply` makes of its events, and all that `decide` looks at."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from hivegrpo.coordinator.invites import Invite
from hivegrpo.coordinator.positions import Positions
from hivegrpo.coordinator.round import Ahead, Attempt, Granted, Round
from hivegrpo.coordinator.speeds import Waiting
from hivegrpo.coordinator.standing import Standing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import digest_of, parse


class Phase(StrEnum):
    """What the coordinator waits for."""

    GENESIS = "genesis"
    """Agreement on version 0."""
    ROLLOUT = "rollout"
    """Contributions."""
    PLAN = "plan"
    """Contributors that are away for a moment; then a plan is made."""
    EXCHANGE = "exchange"
    """The reducers' reports."""
    STEP = "step"
    """Votes for the state root."""
    FINISHED = "finished"
    """Nothing: the last version is committed."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is fixed for the whole run."""

    run_digest: bytes
    values: int
    """Length of the flat vector of trainable parameters."""
    config: RunConfig
    genesis: bytes
    """State root of version 0, if the run manifest pins it."""
    secret: bytes = b""
    """Known to nobody else: the seeds of audits follow from it."""

    @classmethod
    def of(cls, run: pb.Signed, config: RunConfig, secret: bytes = b"") -> Self:
        """The terms of a signed run manifest."""
        manifest = parse(pb.RunManifest, run.payload)
        values = sum(math.prod(tensor.shape) for tensor in manifest.layout)
        return cls(digest_of(run.payload), values, config, manifest.digests.get("genesis", b""), secret)

    @property
    def state_size(self) -> int:
        """Bytes of a policy state: parameters and two moments in fp32, and the step count."""
        return 12 * self.values + 8


@dataclass(slots=True)
class Member:
    """A peer that was admitted."""

    addresses: tuple[str, ...]
    agent: str
    since: float
    """Since when it is connected, or away."""
    connected: bool = True
    left: bool = False
    ready: int | None = None
    """The newest version that it said, or showed by its vote, to hold."""
    ready_root: bytes = b""
    lease: int | None = None
    """Its live lease."""
    reachable: bool | None = None
    """Whether a stranger can dial it; None: not known yet."""
    contributed: int = 0
    """Versions that its contributions are in."""


@dataclass(frozen=True, slots=True)
class Ban:
    """Why a peer takes no part any more, and the blob that proves it, if it is banned by proof."""

    reason: str
    root: bytes = b""
    size: int = 0
    until: float | None = None
    """When an operator's ban ends by itself."""

    @property
    def proved(self) -> bool:
        """Whether it is by proof, and for good."""
        return bool(self.root)


@dataclass(frozen=True, slots=True)
class Promotion:
    """An operator's order about the KL reference."""

    version: int
    """The first version that has it."""
    reference: int | None
    """None: that version itself."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest committed version."""

    manifest: pb.VersionManifest
    payload: bytes
    digest: bytes


@dataclass(slots=True)
class State:
    """Everything the coordinator knows. Insertion order of the dicts is part of it: it decides who is served first."""

    terms: Terms
    phase: Phase = Phase.GENESIS
    round: Round = field(default_factory=lambda: Round(version=0))
    head: Head | None = None
    last: Attempt | None = None
    """The attempt that made the head, for late votes."""
    failed: Attempt | None = None
    """The attempt that failed last: a proof of fault in it may be under way."""
    last_lease_digests: dict[tuple[int, int], bytes] = field(default_factory=dict)
    """Digests of the head's contributions by lease and iteration, for reports that are repeated late."""
    members: dict[str, Member] = field(default_factory=dict)
    banned: dict[str, Ban] = field(default_factory=dict)
    bans_that_end: dict[str, float] = field(default_factory=dict)
    """When those bans end that do so by themselves."""
    invites: dict[str, Invite] = field(default_factory=dict)
    """By id, in hex."""
    paused: bool = False
    """Whether no leases are to be granted."""
    promotion: Promotion | None = None
    """What is ordered of the KL reference, until a version has it."""
    restored: dict[int, int] = field(default_factory=dict)
    """Rollbacks: a version -> the older one whose state it has."""
    connected: dict[str, None] = field(default_factory=dict)
    unserved: Waiting = field(default_factory=Waiting)
    """Connected peers without a lease or a contribution in this round."""
    idle: dict[str, None] = field(default_factory=dict)
    """Those of the unserved that hold the head (in genesis: that reported a root of version 0)."""
    holding: dict[str, None] = field(default_factory=dict)
    """Connected peers that hold the head, and gave an address: who joins is told of them."""
    leases: dict[int, Granted] = field(default_factory=dict)
    """Live leases by id, oldest first."""
    ahead: Ahead = field(default_factory=Ahead)
    """Leases for the round after this one."""
    next_lease: int = 1
    positions: Positions = field(default_factory=Positions)
    rates: dict[str, float] = field(default_factory=dict)
    """Upload rates of peers, bytes a second, as far as others saw enough of them."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Groups a second that peers work, as far as their contributions have shown it."""
    standing: Standing = field(default_factory=Standing)
    empty_rounds: int = 0
    """Rounds in a row in which nothing could be learnt."""
    trouble: str = ""
    """Why the latest attempt or round failed; empty again after a commit."""

    @property
    def version(self) -> int:
        """Version of the head; -1 before version 0."""
        return self.head.manifest.version if self.head else -1

    @property
    def optimizer_steps(self) -> int:
        """Steps that the head's state has behind it: the state of an older version has as many as it had then."""
        version, steps = max(self.version, 0), 0
        for at, older in reversed(self.restored.items()):
            if at <= version:
                version, steps = older, steps + version - at
        return steps + version
