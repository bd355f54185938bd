"""The event log as plain records, for people and for `protocol.invariants`: digests in hex, payloads as fields."""

from collections.abc import Iterator
from typing import Any, assert_never

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.evidence import norm_of
from hivegrpo.coordinator.log import EventLog
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import digest_of, parse
from hivegrpo.protocol.history import Record


def read_records(log: EventLog) -> Iterator[Record]:
    """First {"kind": "run", "run_id"}, then one record an event, oldest first."""
    yield {"kind": "run", "run_id": log.run_id}
    yield from map(record_of, log.replay())


def record_of(event: ev.Event) -> Record:
    """One event as a record."""
    kind, record = _describe(event)
    return {"kind": kind, "at": event.at, **record}


def _describe(event: ev.Event) -> tuple[str, Record]:
    match event:  # cases are tried in order: the most frequent first
        case ev.LeaseGranted(payload=payload):
            return "lease", _lease(parse(pb.Lease, payload))
        case ev.ContributionReceived(signed=signed):
            return "contribution", _contribution(parse(pb.Signed, signed))
        case ev.CoordinatorStarted():
            return "started", {}
        case ev.PeerJoined(peer=peer, addresses=addresses, agent=agent):
            return "joined", {"peer": peer, "addresses": list(addresses), "agent": agent}
        case ev.PeerDisconnected(peer=peer):
            return "disconnected", {"peer": peer}
        case ev.PeerLeft(peer=peer, reason=reason):
            return "left", {"peer": peer, "reason": reason}
        case ev.PeerReady(peer=peer, version=version, state_root=root):
            return "ready", {"peer": peer, "version": version, "state_root": root.hex()}
        case ev.PeerProbed(peer=peer, reachable=reachable):
            return "probed", {"peer": peer, "reachable": reachable}
        case ev.LeaseExpired(lease=lease, iteration=iteration, reason=reason):
            return "lease_expired", {"lease": lease, "iteration": iteration, "reason": reason}
        case ev.ContributionRejected(peer=peer, lease=lease, iteration=iteration, reason=reason):
            return "contribution_rejected", {"peer": peer, "lease": lease, "iteration": iteration, "reason": reason}
        case ev.RolloutClosed(version=version, reason=reason):
            return "rollout_closed", {"version": version, "reason": reason}
        case ev.PlanMade(payload=payload):
            return "plan", _plan(payload)
        case ev.SendersReported(signed=signed):
            return "senders", _senders(parse(pb.Signed, signed))
        case ev.SealMade(payload=payload):
            return "seal", _seal(payload)
        case ev.StepReported(signed=signed):
            return "vote", _vote(parse(pb.Signed, signed))
        case ev.AuditReported(signed=signed):
            return "audit", _audit(parse(pb.Signed, signed))
        case ev.PeerBanned(peer=peer, reason=reason, root=root, size=size):
            proof = {"root": root.hex(), "size": size} if root else None
            return "banned", {"peer": peer, "reason": reason, "until": event.until, "proof": proof}
        case ev.BanLifted(peer=peer, reason=reason):
            return "ban_lifted", {"peer": peer, "reason": reason}
        case ev.InviteIssued(invite=invite):
            terms = {"expires": event.expires, "uses": event.uses, "note": event.note}
            return "invite_issued", {"invite": invite, **terms}
        case ev.InviteUsed(invite=invite, peer=peer):
            return "invite_used", {"invite": invite, "peer": peer}
        case ev.InviteRevoked(invite=invite):
            return "invite_revoked", {"invite": invite}
        case ev.RunPaused(reason=reason):
            return "paused", {"reason": reason}
        case ev.RunResumed():
            return "resumed", {}
        case ev.ReferencePromoted(version=version, reference=reference):
            return "reference_promoted", {"version": version, "reference": reference}
        case ev.AttemptFailed(version=version, attempt=attempt, reason=reason):
            blamed = {"culprits": list(event.culprits), "disputed": list(event.disputed)}
            return "attempt_failed", {"version": version, "attempt": attempt, "reason": reason, **blamed}
        case ev.RoundAbandoned(version=version, reason=reason):
            return "round_abandoned", {"version": version, "reason": reason}
        case ev.RoundEmpty(version=version, reason=reason):
            return "round_empty", {"version": version, "reason": reason}
        case ev.VersionCommitted(payload=payload):
            return "version", _version(payload)
        case _:
            assert_never(event)


def _lease(lease: pb.Lease) -> Record:
    return {
        "lease": lease.id,
        "iteration": lease.iteration,
        "peer": lease.peer,
        "version": lease.version,
        "reference_version": lease.reference_version,
        "start": lease.start,
        "count": lease.count,
        "wanted": lease.wanted,
        "max_weight": lease.max_weight,
        "evaluate": lease.evaluate,
        "ahead": lease.ahead,
    }


def _contribution(signed: pb.Signed) -> Record:
    contribution = parse(pb.Contribution, signed.payload)
    metrics = contribution.metrics
    return {
        "peer": signed.signer,
        "lease": contribution.lease,
        "iteration": contribution.iteration,
        "version": contribution.version,
        "used": contribution.used[:],
        "dropped": contribution.dropped[:],
        "returned": contribution.returned[:],
        "weight": contribution.weight,
        "root": contribution.root.hex(),
        "metrics": {name: metrics[name] for name in metrics},  # `dict` takes each through several calls
    }


def _plan(payload: bytes) -> Record:
    plan = parse(pb.RoundPlan, payload)
    return {
        "digest": digest_of(payload).hex(),
        "version": plan.version,
        "parent": plan.parent.hex(),
        "attempt": plan.attempt,
        "codec": plan.codec,
        "rule": plan.rule,
        "values": plan.values,
        "contributors": [_contributor(contributor) for contributor in plan.contributors],
        "reducers": [
            {"peer": reducer.peer, "first": reducer.first, "chunks": reducer.chunks} for reducer in plan.reducers
        ],
        "scalars": list(plan.scalars),
    }


def _senders(signed: pb.Signed) -> Record:
    report = parse(pb.SenderReport, signed.payload)
    return {
        "peer": signed.signer,
        "plan": report.plan.hex(),
        "complete": [complete.peer for complete in report.complete],
        "seconds": {complete.peer: complete.seconds for complete in report.complete},
        "refused": {refused.peer: refused.reason for refused in report.refused},
    }


def _seal(payload: bytes) -> Record:
    seal = parse(pb.Seal, payload)
    return {
        "digest": digest_of(payload).hex(),
        "plan": seal.plan.hex(),
        "contributors": [
            {
                "peer": sealed.peer,
                "coefficient": sealed.coefficient,
                "norm": norm_of(int.from_bytes(sealed.norm_squared, "big")),
            }
            for sealed in seal.contributors
        ],
    }


def _vote(signed: pb.Signed) -> Record:
    report = parse(pb.StepReport, signed.payload)
    return {
        "peer": signed.signer,
        "version": report.version,
        "plan": report.plan.hex(),
        "seal": report.seal.hex(),
        "state_root": report.state_root.hex(),
        "spans": [_blob(span) for span in report.spans],
        "seconds": list(report.seconds),
        "dots": list(report.dots),
        "metrics": dict(report.metrics),
    }


def _audit(signed: pb.Signed) -> Record:
    report = parse(pb.AuditReport, signed.payload)
    return {
        "peer": signed.signer,
        "plan": report.plan.hex(),
        "seal": report.seal.hex(),
        "span": report.span,
        "content": report.content.hex(),
    }


def _version(payload: bytes) -> Record:
    manifest = parse(pb.VersionManifest, payload)
    return {
        "digest": digest_of(payload).hex(),
        "version": manifest.version,
        "parent": manifest.parent.hex(),
        "plan": manifest.plan.hex(),
        "seal": manifest.seal.hex(),
        "spans": [_blob(span) for span in manifest.spans],
        "state_root": manifest.state.root.hex(),
        "state_size": manifest.state.size,
        "contributors": [_contributor(contributor) for contributor in manifest.contributors],
        "reference_version": manifest.reference_version,
        "restores": manifest.restores if manifest.HasField("restores") else None,
        "promoted": manifest.promoted,
        "metrics": dict(manifest.metrics),
    }


def _contributor(contributor: pb.Contributor) -> dict[str, Any]:
    return {
        "peer": contributor.peer,
        "lease": contributor.lease,
        "iteration": contributor.iteration,
        "weight": contributor.weight,
        "root": contributor.root.hex(),
    }


def _blob(blob: pb.Blob) -> dict[str, Any]:
    return {"root": blob.root.hex(), "size": blob.size}
