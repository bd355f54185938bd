"""What people are shown of a run: one JSON-able snapshot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hivegrpo.coordinator.bans import ban_words
from hivegrpo.coordinator.evidence import contribution_evidence
from hivegrpo.coordinator.state import Member, Phase, State

PEER_STATES = ("joining", "online", "paused", "draining")
"""What a connected peer may say of itself; `unreachable`, `offline` and `banned` are the coordinator's words."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """A peer's newest heartbeat."""

    at: float
    version: int
    state: str
    metrics: Mapping[str, float]


def snapshot(state: State, heartbeats: Mapping[str, Pulse], now: float) -> dict[str, Any]:
    """The run as it stands: phase, head, peers, the last version's metrics, and what went wrong."""
    head, current = state.head, state.round
    return {
        "run_id": state.terms.run_digest.hex(),
        "name": state.terms.config.run.name,
        "phase": state.phase.value,
        "version": state.version,
        "versions": state.terms.config.run.versions,
        "attempt": current.attempts,
        "iteration": current.iteration,
        "state_root": head.manifest.state.root.hex() if head else None,
        "metrics": dict(head.manifest.metrics) if head else {},
        "contributions": len(current.contributions),
        "leases": len(state.leases),
        "empty_rounds": state.empty_rounds,
        "evidence": contribution_evidence(state.last) if state.last else [],
        "trouble": state.trouble or _genesis_trouble(state),
        "paused": state.paused,
        "banned": {peer: ban_words(ban) for peer, ban in sorted(state.banned.items())},
        "peers": [
            _peer(state, peer, member, heartbeats.get(peer), now) for peer, member in sorted(state.members.items())
        ],
    }


def _peer(state: State, peer: str, member: Member, pulse: Pulse | None, now: float) -> dict[str, Any]:
    current = pulse if member.connected else None
    return {
        "peer": peer,
        "state": _peer_state(state, peer, member, current, now),
        "version": current.version if current else member.ready,
        "tokens_per_second": current.metrics.get("tokens_per_second", 0.0) if current else 0.0,
        "contributed": member.contributed,
        "reachable": member.reachable,
        "upload_rate": state.rates.get(peer),
        "charges": state.standing.charges(peer),
        "agent": member.agent,
    }


def _peer_state(state: State, peer: str, member: Member, pulse: Pulse | None, now: float) -> str:
    if peer in state.banned:
        return "banned"
    if not member.connected:
        waited = now - member.since >= state.terms.config.timing.grace
        return "offline" if member.left or waited else "unreachable"
    if pulse is not None and pulse.state in PEER_STATES:
        return pulse.state
    return "joining" if member.ready is None else "online"


def _genesis_trouble(state: State) -> str:
    roots = {state.members[peer].ready_root for peer in state.idle} if state.phase is Phase.GENESIS else set()
    return f"the peers report {len(roots)} different states for version 0" if len(roots) > 1 else ""
