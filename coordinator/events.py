"""What happened, in the order in which it was decided: the coordinator's whole memory is the sequence of these.

What the coordinator signs is kept as payload bytes: Ed25519 is deterministic, so the envelope is made again whenever
it is sent. What peers reported is kept as the signed envelope's bytes: it is evidence.
"""

from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter

from hivegrpo.protocol.values import value


class _Stored:
    """How events are written: JSON, bytes as base64."""

    __slots__ = ()
    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", extra="forbid")


@value
class CoordinatorStarted(_Stored):
    """Nobody is connected, and what was timed is timed anew."""

    at: float


@value
class PeerJoined(_Stored):
    """A peer was admitted, for the first time or again."""

    at: float
    peer: str
    addresses: tuple[str, ...]
    agent: str


@value
class PeerDisconnected(_Stored):
    """Its session ended; it keeps its place for the grace."""

    at: float
    peer: str


@value
class PeerLeft(_Stored):
    """It said goodbye; its place is free at once."""

    at: float
    peer: str
    reason: str


@value
class PeerReady(_Stored):
    """A peer says that it holds this version."""

    at: float
    peer: str
    version: int
    state_root: bytes


@value
class PeerProbed(_Stored):
    """Whether a stranger can dial this peer: told when it is first known, and when it changes."""

    at: float
    peer: str
    reachable: bool


@value
class LeaseGranted(_Stored):
    """`payload` is a Lease."""

    at: float
    payload: bytes


@value
class LeaseExpired(_Stored):
    """Without a contribution: its positions go back, unless an earlier iteration has used them."""

    at: float
    lease: int
    reason: str
    iteration: int = 0


@value
class ContributionReceived(_Stored):
    """`signed` is an envelope of a Contribution that passed all checks."""

    at: float
    signed: bytes


@value
class ContributionRejected(_Stored):
    """A contribution that was received will not count; the positions it used go back, if it is of iteration 0."""

    at: float
    peer: str
    lease: int
    reason: str
    iteration: int = 0


@value
class RolloutClosed(_Stored):
    """The round takes no more contributions and is planned."""

    at: float
    version: int
    reason: str


@value
class PlanMade(_Stored):
    """`payload` is a RoundPlan."""

    at: float
    payload: bytes


@value
class SendersReported(_Stored):
    """`signed` is an envelope of a SenderReport of the current plan."""

    at: float
    signed: bytes


@value
class SealMade(_Stored):
    """`payload` is a Seal."""

    at: float
    payload: bytes


@value
class StepReported(_Stored):
    """`signed` is an envelope of a StepReport: a vote of the current attempt, or a late one of the last version."""

    at: float
    signed: bytes


@value
class AuditReported(_Stored):
    """`signed` is an envelope of an AuditReport: of the current attempt, or a late one of the last version."""

    at: float
    signed: bytes


@value
class PeerBanned(_Stored):
    """By a proof of its fault, which is a blob of this root and size, for good; or by the operator, without one."""

    at: float
    peer: str
    reason: str
    root: bytes = b""
    size: int = 0
    until: float | None = None
    """When an operator's ban ends by itself; None: never."""


@value
class BanLifted(_Stored):
    """An operator's ban has ended, by its time or by the operator."""

    at: float
    peer: str
    reason: str


@value
class InviteIssued(_Stored):
    """A token was made; it is named by its id, in hex, and is itself nowhere."""

    at: float
    invite: str
    expires: float
    uses: int
    note: str


@value
class InviteUsed(_Stored):
    """A peer that was no member came with a genuine token; it joins by the next event."""

    at: float
    invite: str
    peer: str
    expires: float
    uses: int


@value
class InviteRevoked(_Stored):
    """Nobody joins with this token any more; who did stays."""

    at: float
    invite: str


@value
class RunPaused(_Stored):
    """No lease is granted until the run is resumed."""

    at: float
    reason: str


@value
class RunResumed(_Stored):
    """Leases are granted again."""

    at: float


@value
class ReferencePromoted(_Stored):
    """From `version` on, which is still to be made, the KL reference is version `reference`; None: `version` itself."""

    at: float
    version: int
    reference: int | None


@value
class AttemptFailed(_Stored):
    """The next attempt is planned from the same contributions.

    `culprits` spoiled it, as far as the coordinator can tell; `disputed` are senders that a single reducer lacks.
    """

    at: float
    version: int
    attempt: int
    reason: str
    culprits: tuple[str, ...] = ()
    disputed: tuple[str, ...] = ()


@value
class RoundAbandoned(_Stored):
    """It has no contribution left; it begins again at the same version, with a rollout."""

    at: float
    version: int
    reason: str


@value
class RoundEmpty(_Stored):
    """No contribution had anything to learn from; the rollout begins again at the same version."""

    at: float
    version: int
    reason: str = ""


@value
class VersionCommitted(_Stored):
    """`payload` is a VersionManifest."""

    at: float
    payload: bytes


Event = (
    CoordinatorStarted
    | PeerJoined
    | PeerDisconnected
    | PeerLeft
    | PeerReady
    | PeerProbed
    | LeaseGranted
    | LeaseExpired
    | ContributionReceived
    | ContributionRejected
    | RolloutClosed
    | PlanMade
    | SendersReported
    | SealMade
    | StepReported
    | AuditReported
    | PeerBanned
    | BanLifted
    | InviteIssued
    | InviteUsed
    | InviteRevoked
    | RunPaused
    | RunResumed
    | ReferencePromoted
    | AttemptFailed
    | RoundAbandoned
    | RoundEmpty
    | VersionCommitted
)

_ADAPTERS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}


def encode_event(event: Event) -> tuple[str, bytes]:
    """Name of the event's class, and its fields as JSON."""
    name = type(event).__name__
    return name, _ADAPTERS[name].dump_json(event)


def decode_event(name: str, body: bytes) -> Event:
    """Inverse of `encode_event`; ValueError (of which pydantic's ValidationError is one) if there is no such event."""
    if name not in _ADAPTERS:
        raise ValueError(f"no event is called {name!r}")
    event: Event = _ADAPTERS[name].validate_json(body)
    return event
