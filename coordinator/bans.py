"""What a banned peer still has in the round, and how it ends: its leases, its contribution, the attempt it is in.

And how bans end, those that an operator set a time for.
"""

from collections.abc import Iterator
from datetime import UTC, datetime

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.state import Ban, Phase, State


def due_of_bans(state: State, now: float) -> tuple[ev.Event, ...]:
    """What bans lead to now."""
    banned, current = state.banned.keys(), state.round
    if not banned:
        return ()
    working = not (banned.isdisjoint(current.served.keys()) and banned.isdisjoint(state.ahead.holders.keys()))
    if working or (current.attempt is not None and not current.attempt.roster.isdisjoint(banned)):
        due = tuple(_ends_of_banned(state, now))
        if due:
            return due
    return tuple(_ended_bans(state, now)) if state.bans_that_end else ()


def _ends_of_banned(state: State, now: float) -> Iterator[ev.Event]:
    """Events that leave nothing of the banned in the round in flight."""
    current = state.round
    for peer, ban in state.banned.items():
        if peer not in current.served and peer not in state.ahead.holders:
            continue  # so it has neither a lease nor a contribution
        why = f"its peer was banned: {ban.reason}"
        member = state.members.get(peer)
        if member is not None and member.lease is not None:
            lease = state.leases[member.lease].message
            yield ev.LeaseExpired(now, lease.id, why, lease.iteration)
        if peer in state.ahead.holders:
            yield ev.LeaseExpired(now, state.ahead.holders[peer], why)
        if peer in current.contributions:
            lease = current.contributions[peer].lease
            yield ev.ContributionRejected(now, peer, lease.id, why, lease.iteration)
    attempt = current.attempt
    if attempt is not None and state.phase in (Phase.EXCHANGE, Phase.STEP):
        gone = sorted(peer for peer in state.banned if peer in attempt.roster)
        if gone:
            reason = f"banned from the roster: {', '.join(gone)}"
            yield ev.AttemptFailed(now, current.version, current.attempts, reason)


def _ended_bans(state: State, now: float) -> Iterator[ev.Event]:
    """Bans whose time is over."""
    for peer, until in state.bans_that_end.items():
        if now >= until:
            yield ev.BanLifted(now, peer, "its time is over")


def ban_words(ban: Ban) -> str:
    """Why, and until when, for the peer and for people."""
    if ban.until is None:
        return ban.reason
    return f"{ban.reason} (until {datetime.fromtimestamp(ban.until, UTC):%Y-%m-%d %H:%M} UTC)"
