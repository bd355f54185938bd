"""Leases ahead: work for the version after the one that is being exchanged, so that no machine waits for the wire.

While version v is exchanged, its contributors sample under v - 1 for v + 1. Such a lease names v; it lives in
`state.ahead` until v is committed, and the new round takes it over as if it had been granted then. If the round comes
to nothing, or its peer is lost, it expires, and its positions go back.
"""

from collections.abc import Iterator

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.planning import lease_payload, positions_for, wants_evaluation
from hivegrpo.coordinator.round import Granted
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol import hivegrpo_pb2 as pb


def due_ahead(state: State, now: float) -> tuple[ev.Event, ...]:
    """Leases ahead that expire or are granted now."""
    if not state.terms.config.averaging.overlap:
        return ()
    expired = tuple(_expiries(state, now))
    return expired or tuple(_grants(state, now))


def next_ahead(state: State, now: float) -> float | None:
    """When the next lease ahead may expire."""
    grace = state.terms.config.timing.grace
    away = (state.members[lease.message.peer] for lease in state.ahead.values())
    return min((member.since + grace for member in away if not member.connected), default=None)


def expire_all(state: State, now: float, reason: str) -> Iterator[ev.LeaseExpired]:
    """The version that the leases ahead were to be worked on under is not made from this round."""
    for lease in state.ahead:
        yield ev.LeaseExpired(now, lease, reason)


def grant_ahead(state: State, lease: pb.Lease, payload: bytes, at: float) -> None:
    """Apply a grant."""
    state.ahead[lease.id] = Granted(lease, payload, at)
    state.next_lease = lease.id + 1
    state.positions.take(range(lease.start, lease.start + lease.count))


def expire_ahead(state: State, lease_id: int) -> None:
    """Apply an expiry."""
    lease = state.ahead.pop(lease_id).message
    state.positions.give_back(range(lease.start, lease.start + lease.count))


def adopt_ahead(state: State, at: float) -> None:
    """Apply to the round that has just begun: the leases ahead are its first ones, granted at its beginning."""
    current, away = state.round, []
    for lease_id, granted in state.ahead.items():
        lease = granted.message
        assert lease.version == state.version
        state.leases[lease_id] = Granted(lease, granted.payload, at)
        member = state.members[lease.peer]
        member.lease = lease_id
        state.unserved.pop(lease.peer, None)
        state.idle.pop(lease.peer, None)
        current.served[lease.peer] = lease_id
        current.leased += lease.wanted
        current.evaluating = current.evaluating or lease.evaluate
        current.rollout_at = at
        if not member.connected:
            away.append((member.since, lease.peer))
    for since, peer in sorted(away):
        current.absent[peer] = since
    state.ahead = {}


def ahead_of(state: State, peer: str) -> Granted | None:
    """A peer's lease ahead."""
    return next((granted for granted in state.ahead.values() if granted.message.peer == peer), None)


def _expiries(state: State, now: float) -> Iterator[ev.LeaseExpired]:
    grace = state.terms.config.timing.grace
    for lease_id, granted in state.ahead.items():
        member = state.members[granted.message.peer]
        if member.left:
            yield ev.LeaseExpired(now, lease_id, "its peer left")
        elif not member.connected and now >= member.since + grace:
            yield ev.LeaseExpired(now, lease_id, "its peer was lost")


def _grants(state: State, now: float) -> Iterator[ev.LeaseGranted]:
    """An even share for each connected contributor; what is left is for the others, when the version is committed."""
    config, current = state.terms.config, state.round
    attempt = current.attempt
    if state.phase not in (Phase.EXCHANGE, Phase.STEP) or attempt is None or current.version >= config.run.versions:
        return
    having = {granted.message.peer for granted in state.ahead.values()}
    free = [peer for peer in sorted(attempt.roster) if peer in state.connected and peer not in having]
    remaining = config.grpo.prompts_per_round - sum(granted.message.wanted for granted in state.ahead.values())
    waiting = len(state.connected.keys() - having)
    evaluate = wants_evaluation(current.version, config) and not any(
        granted.message.evaluate for granted in state.ahead.values()
    )
    book = state.positions.copy()
    for lease_id, peer in enumerate(free, start=state.next_lease):
        if remaining <= 0:
            return
        share = -(-remaining // waiting)
        run = book.pick(positions_for(share, config.grpo))
        book.take(run)
        wanted = min(share, len(run))
        payload = lease_payload(state, lease_id, peer, run, wanted, evaluate=evaluate, ahead=True)
        yield ev.LeaseGranted(now, payload)
        evaluate = False
        remaining -= wanted
        waiting -= 1
