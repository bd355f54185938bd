"""Leases ahead: work for the version after the one that is being exchanged, so that no machine waits for the wire.

While version v is exchanged, its contributors sample under v - 1 for v + 1. Such a lease names v; it lives in
`state.ahead` until v is committed, and the new round takes it over as if it had been granted then. If the round comes
to nothing, or its peer is lost, it expires, and its positions go back.
"""

from collections.abc import Iterator

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.planning import lease_payload, positions_for, wants_evaluation
from hivegrpo.coordinator.round import Ahead, Granted
from hivegrpo.coordinator.speeds import even_share
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol import hivegrpo_pb2 as pb


def due_ahead(state: State, now: float) -> tuple[ev.Event, ...]:
    """Leases ahead that expire or are granted now."""
    if not state.terms.config.averaging.overlap:
        return ()
    expired = tuple(_expiries(state, now))
    return expired or tuple(_grants(state, now))


def next_ahead(state: State) -> float | None:
    """When the next lease ahead may expire."""
    grace = state.terms.config.timing.grace
    return min((state.members[peer].since + grace for peer in state.ahead.away), default=None)


def expire_all(state: State, now: float, reason: str) -> Iterator[ev.LeaseExpired]:
    """The version that the leases ahead were to be worked on under is not made from this round."""
    for lease in state.ahead.leases:
        yield ev.LeaseExpired(now, lease, reason)


def await_ahead(state: State) -> None:
    """Apply a plan: its roster may have leases ahead."""
    attempt = state.round.attempt
    assert attempt is not None
    for peer in sorted(attempt.roster):
        meet_ahead(state, peer)


def meet_ahead(state: State, peer: str) -> None:
    """Apply that a peer is connected."""
    ahead, attempt = state.ahead, state.round.attempt
    ahead.away.pop(peer, None)
    if not state.terms.config.averaging.overlap or attempt is None:
        return
    if peer in attempt.roster and peer in state.connected and peer not in ahead.holders:
        ahead.waiting[peer] = None


def miss_ahead(state: State, peer: str) -> None:
    """Apply that a peer is not connected any more."""
    state.ahead.waiting.pop(peer, None)
    if peer in state.ahead.holders:
        state.ahead.away[peer] = None


def grant_ahead(state: State, lease: pb.Lease, payload: bytes, at: float) -> None:
    """Apply a grant."""
    ahead = state.ahead
    ahead.leases[lease.id] = Granted(lease, payload, at, at)
    ahead.holders[lease.peer] = lease.id
    ahead.waiting.pop(lease.peer, None)
    ahead.wanted += lease.wanted
    ahead.evaluating = ahead.evaluating or lease.evaluate
    state.next_lease = lease.id + 1
    state.positions.take(range(lease.start, lease.start + lease.count))


def expire_ahead(state: State, lease_id: int) -> None:
    """Apply an expiry."""
    ahead = state.ahead
    lease = ahead.leases.pop(lease_id).message
    del ahead.holders[lease.peer]
    ahead.wanted -= lease.wanted
    if lease.evaluate:
        ahead.evaluating = False
    state.positions.give_back(range(lease.start, lease.start + lease.count))
    meet_ahead(state, lease.peer)


def adopt_ahead(state: State, at: float) -> None:
    """Apply to the round that has just begun: the leases ahead are its first ones, granted at its beginning."""
    current, ahead, state.ahead = state.round, state.ahead, Ahead()
    for lease_id, granted in ahead.leases.items():
        lease = granted.message
        assert lease.version == state.version
        state.leases[lease_id] = Granted(lease, granted.payload, at, granted.since)
        state.members[lease.peer].lease = lease_id
        state.unserved.discard(lease.peer)
        state.idle.pop(lease.peer, None)
        current.served[lease.peer] = lease_id
        current.rollout_at = at
    current.leased += ahead.wanted
    current.evaluating = current.evaluating or ahead.evaluating
    for peer in sorted(ahead.away, key=lambda peer: state.members[peer].since):
        current.absent[peer] = state.members[peer].since


def _expiries(state: State, now: float) -> Iterator[ev.LeaseExpired]:
    grace = state.terms.config.timing.grace
    for peer in state.ahead.away:
        member = state.members[peer]
        if member.left or now >= member.since + grace:
            yield ev.LeaseExpired(
                now, state.ahead.holders[peer], "its peer left" if member.left else "its peer was lost"
            )


def _grants(state: State, now: float) -> Iterator[ev.LeaseGranted]:
    """A share for each connected contributor, by its pace; what is left is for the others, at the commit."""
    config, ahead, coming = state.terms.config, state.ahead, state.round.version
    remaining = config.grpo.prompts_per_round - ahead.wanted
    if state.phase not in (Phase.EXCHANGE, Phase.STEP) or coming >= config.run.versions or state.paused:
        return
    if not ahead.waiting or remaining <= 0:
        return
    without = len(state.connected) - (len(ahead.holders) - len(ahead.away))
    evaluate = wants_evaluation(coming, config) and not ahead.evaluating
    book = state.positions.copy()
    for lease_id, peer in enumerate(ahead.waiting, start=state.next_lease):
        even = even_share(remaining, without)
        pacing = state.round.pacing
        share = min(-(-even * pacing.pace(state.speeds.get(peer)) // pacing.fresh), remaining)
        run = book.pick(positions_for(share, config.grpo))
        book.take(run)
        wanted = min(share, len(run))
        payload = lease_payload(state, lease_id, peer, run, wanted, evaluate=evaluate, ahead=True)
        yield ev.LeaseGranted(now, payload)
        evaluate = False
        remaining -= wanted
        without -= 1
        if remaining <= 0:
            return
