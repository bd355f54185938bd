"""What grows with the roster, or is asked for by everybody: read and checked once, however many look at it or send it.

A report is read when it is judged, and again when its event is applied; and a roster that agrees votes alike, to the
byte where nothing was measured. All of it follows from the bytes alone, so it is kept by them. What is returned is
shared: nobody changes it.
"""

from dataclasses import dataclass
from functools import lru_cache

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_sender_report, check_step_report
from hivegrpo.protocol.envelope import parse

KEPT = 8
"""Readings of each kind: a report of the largest roster takes about a megabyte."""

Ballot = tuple[bytes, tuple[tuple[bytes, int], ...]]
"""What a peer votes for: the state root, and root and size of every span."""


@dataclass(frozen=True, slots=True)
class Senders:
    """What a SenderReport says."""

    plan: bytes
    norms: dict[str, int]
    """The exact squared norm of the reducer's span, of each sender that is complete."""
    seconds: dict[str, float]
    """That their chunks took to come."""
    refused: dict[str, str]
    """Whose push was cut off, and why."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What a StepReport says."""

    version: int
    plan: bytes
    seal: bytes
    ballot: Ballot
    receipts: tuple[bytes, ...]
    seconds: tuple[float, ...]
    dots: tuple[float, ...]


@lru_cache(maxsize=KEPT)
def lease_of(payload: bytes) -> pb.Lease:
    """Read a lease that the coordinator made."""
    return parse(pb.Lease, payload)


@lru_cache(maxsize=KEPT)
def contribution_of(payload: bytes) -> pb.Contribution:
    """Read a Contribution; FrameError if it is none."""
    return parse(pb.Contribution, payload)


@lru_cache(maxsize=KEPT)
def reducers_of(plan: bytes) -> tuple[str, ...]:
    """Who reduces by a plan, in the order of the spans."""
    return tuple([reducer.peer for reducer in parse(pb.RoundPlan, plan).reducers[:]])


@lru_cache(maxsize=KEPT)
def senders_of(payload: bytes) -> Senders:
    """Read a SenderReport; FrameError if it is none."""
    report = parse(pb.SenderReport, payload)
    complete = report.complete[:]
    peers = [item.peer for item in complete]
    return Senders(
        report.plan,
        dict(zip(peers, [int.from_bytes(item.norm_squared, "big") for item in complete], strict=True)),
        dict(zip(peers, [item.seconds for item in complete], strict=True)),
        {item.peer: item.reason for item in report.refused},
    )


@lru_cache(maxsize=KEPT)
def check_senders(payload: bytes, roster: frozenset[str]) -> None:
    """`check_sender_report`, of bytes."""
    check_sender_report(parse(pb.SenderReport, payload), roster)


@lru_cache(maxsize=KEPT)
def vote_of(payload: bytes) -> Vote:
    """Read a StepReport; FrameError if it is none."""
    report = parse(pb.StepReport, payload)
    return Vote(
        report.version,
        report.plan,
        report.seal,
        ballot_of(report),
        tuple(report.receipts),
        tuple(report.seconds),
        tuple(report.dots),
    )


@lru_cache(maxsize=KEPT)
def check_vote(payload: bytes, plan: bytes) -> None:
    """`check_step_report`, of the bytes of a report and its plan."""
    check_step_report(parse(pb.StepReport, payload), parse(pb.RoundPlan, plan))


def ballot_of(report: pb.StepReport) -> Ballot:
    """What a step report votes for."""
    return report.state_root, tuple([(span.root, span.size) for span in report.spans[:]])
