"""What follows from a peer's report: an answer, and events if it is news. Pure, and idempotent: the same report
again gets the same answer while it still matters, and never a second event.

A refusal's reason starts with one of: unknown (join first), stale (too late), invalid (makes no sense), refused, or
banned (the peer, for good or until a time that the text says).
"""

from collections.abc import Callable

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.bans import ban_words
from hivegrpo.coordinator.readings import check_senders, check_vote, contribution_of, reducers_of, senders_of, vote_of
from hivegrpo.coordinator.round import Attempt
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_contribution, check_digest, check_metrics
from hivegrpo.protocol.envelope import Verify, digest_of, open_signed, parse, verified_payload, verify_envelope
from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.values import value

MAX_REASON = 200


@value
class Sent:
    """A report whose signature has been verified."""

    peer: str
    payload: bytes
    signed: pb.Signed


@value
class Verdict:
    """The answer to a report, and what happened by it."""

    accepted: bool
    reason: str = ""
    events: tuple[ev.Event, ...] = ()


def judge(
    state: State, signed: pb.Signed, peer: str, run_id: str, now: float, verify: Verify = verify_envelope
) -> Verdict:
    """Judge a report that `peer` sent. WireError if it is not properly signed by that peer, or malformed."""
    kind = signed.type
    if kind not in _JUDGES:
        raise FrameError(f"a report of unknown type {kind[:40]!r}")
    if peer not in state.members:
        return Verdict(False, "unknown: this peer has not joined")
    if peer in state.banned:
        return Verdict(False, f"banned: {ban_words(state.banned[peer])}")
    payload = verified_payload(signed, run_id, kind, peer, verify)
    return _JUDGES[kind](state, Sent(peer, payload, signed), now)


def open_heartbeat(signed: pb.Signed, peer: str, run_id: str) -> pb.Heartbeat:
    """A checked heartbeat; WireError if it is not properly signed by that peer, or malformed."""
    heartbeat = open_signed(signed, run_id, pb.Heartbeat, signer=peer).message
    check_metrics(heartbeat.metrics)
    if len(heartbeat.state) > 32:
        raise FrameError("a heartbeat's state is longer than any state's name")
    return heartbeat


def _judge_ready(state: State, sent: Sent, now: float) -> Verdict:
    ready, peer = parse(pb.Ready, sent.payload), sent.peer
    check_digest(ready.state_root, "the state root")
    version = max(state.version, 0)
    if ready.version != version:
        kind = "stale" if ready.version < version else "invalid"
        return Verdict(False, f"{kind}: the newest version is {state.version}, not {ready.version}")
    if state.head is not None and ready.state_root != state.head.manifest.state.root:
        return Verdict(False, f"invalid: version {version} has another state root")
    if state.head is None and state.terms.genesis not in (b"", ready.state_root):
        return Verdict(False, "invalid: version 0 has another state root in the run manifest")
    member = state.members[peer]
    if (member.ready, member.ready_root) == (ready.version, ready.state_root):
        return Verdict(True)
    return Verdict(True, events=(ev.PeerReady(now, peer, ready.version, ready.state_root),))


def _judge_contribution(state: State, sent: Sent, now: float) -> Verdict:
    contribution, peer = contribution_of(sent.payload), sent.peer
    known = _known_contribution(state, peer, contribution)
    if known is not None:
        if known == digest_of(sent.payload):
            return Verdict(True)
        return Verdict(False, f"refused: another contribution was committed for lease {contribution.lease}")
    lease = state.leases.get(contribution.lease)
    if contribution.lease in state.ahead.leases:
        return Verdict(False, f"invalid: lease {contribution.lease} is for a version that is still being made")
    if lease is None and contribution.lease < state.next_lease:
        return Verdict(False, f"stale: lease {contribution.lease} expired")
    if lease is None or lease.message.peer != peer:
        return Verdict(False, f"invalid: lease {contribution.lease} is not this peer's")
    place, leased = _place(contribution), _place(lease.message)
    if place != leased:
        kind = "stale" if place < leased else "invalid"
        return Verdict(False, f"{kind}: lease {contribution.lease} is for version {leased[0]}, iteration {leased[1]}")
    rollout = state.round.rollouts[peer].message.used if lease.message.iteration else None
    check_contribution(contribution, lease.message, rollout)
    return Verdict(True, events=(ev.ContributionReceived(now, sent.signed.SerializeToString()),))


def _place(message: pb.Lease | pb.Contribution) -> tuple[int, int]:
    return message.version, message.iteration


def _known_contribution(state: State, peer: str, contribution: pb.Contribution) -> bytes | None:
    """Digest of what was received for this lease and iteration, if it counts or can still count."""
    held = state.round.contributions.get(peer) or state.round.empties.get(peer)
    name = contribution.lease, contribution.iteration
    if held is not None and name == (held.lease.id, held.lease.iteration):
        return held.digest
    return state.last_lease_digests.get(name)


def _judge_senders(state: State, sent: Sent, now: float) -> Verdict:
    said, peer = senders_of(sent.payload), sent.peer
    attempt = state.round.attempt
    if attempt is None or said.plan != attempt.digest:
        return Verdict(False, f"stale: plan {said.plan.hex()[:16]} is not the current one")
    if peer not in reducers_of(attempt.payload):
        return Verdict(False, "invalid: this peer is no reducer of the plan")
    check_senders(sent.payload, attempt.roster)
    if peer in attempt.reports:
        return _again(attempt.reports[peer].keys() == said.norms.keys(), "report")
    return Verdict(True, events=(ev.SendersReported(now, sent.signed.SerializeToString()),))


def _judge_step(state: State, sent: Sent, now: float) -> Verdict:
    vote, peer = vote_of(sent.payload), sent.peer
    attempt = attempt_of(state, vote.plan)
    if attempt is None:
        return Verdict(False, f"stale: plan {vote.plan.hex()[:16]} is neither the current one nor the last version's")
    if peer not in attempt.roster:
        return Verdict(False, "invalid: this peer is not in the plan's roster")
    check_vote(sent.payload, attempt.payload)
    if vote.seal != attempt.seal_digest or vote.version != attempt.plan.version:
        return Verdict(False, "invalid: the plan was sealed otherwise, or is for another version")
    if peer in attempt.votes:
        return _again(attempt.votes[peer] == vote.ballot, "vote")
    return Verdict(True, events=(ev.StepReported(now, sent.signed.SerializeToString()),))


def attempt_of(state: State, plan: bytes) -> Attempt | None:
    """The attempt that can still be voted on under this plan's digest."""
    current = state.round.attempt
    if current is not None and state.phase is Phase.STEP and plan == current.digest:
        return current
    return state.last if state.last is not None and plan == state.last.digest else None


def _again(same: bool, what: str) -> Verdict:
    return Verdict(True) if same else Verdict(False, f"refused: this peer's {what} was another one")


def _judge_audit(state: State, sent: Sent, now: float) -> Verdict:
    """An auditor may report before its turn: what it says counts when that comes (`audits.unaudited`)."""
    report, peer = parse(pb.AuditReport, sent.payload), sent.peer
    attempt = attempt_of(state, report.plan)
    if attempt is None:
        return Verdict(False, f"stale: plan {report.plan.hex()[:16]} is neither the current one nor the last version's")
    if report.seal != attempt.seal_digest:
        return Verdict(False, "invalid: the plan was sealed otherwise")
    if report.content:
        check_digest(report.content, "the audited span's root")
    if not any(drawn.span == report.span and peer in drawn.order for drawn in attempt.drawn):
        return Verdict(False, f"invalid: this peer was not drawn to audit span {report.span}")
    known = attempt.audits.get(report.span, {}).get(peer)
    if known is not None:
        return _again(known.content == report.content, "audit")
    return Verdict(True, events=(ev.AuditReported(now, sent.signed.SerializeToString()),))


def _judge_leave(state: State, sent: Sent, now: float) -> Verdict:
    leave, peer = parse(pb.Leave, sent.payload), sent.peer
    if state.members[peer].left:
        return Verdict(True)
    return Verdict(True, events=(ev.PeerLeft(now, peer, leave.reason[:MAX_REASON]),))


_JUDGES: dict[str, Callable[[State, Sent, float], Verdict]] = {
    "Ready": _judge_ready,
    "Contribution": _judge_contribution,
    "SenderReport": _judge_senders,
    "StepReport": _judge_step,
    "AuditReport": _judge_audit,
    "Leave": _judge_leave,
}
"""By the type of the report: who judges it."""
