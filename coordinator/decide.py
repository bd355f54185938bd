"""What should happen now: a pure function of the state and the time.

The answer also says when to ask again if nothing else happens, so that nobody has to poll.
"""

from collections.abc import Iterable, Iterator

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.ahead import due_ahead, expire_all, next_ahead
from hivegrpo.coordinator.audits import audits_until, next_turn, unaudited
from hivegrpo.coordinator.bans import due_of_bans
from hivegrpo.coordinator.metrics import why_empty
from hivegrpo.coordinator.planning import (
    LARGEST_ROSTER,
    genesis_payload,
    incomplete_at,
    lease_payload,
    manifest_payload,
    plan_payload,
    positions_for,
    renewed_lease_payload,
    seal_payload,
    wants_evaluation,
)
from hivegrpo.coordinator.readings import reducers_of
from hivegrpo.coordinator.round import EXTRA_SECONDS, LAST_VOTES_SECONDS, Attempt
from hivegrpo.coordinator.speeds import share_of
from hivegrpo.coordinator.standing import deniers, withholders
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol.values import value


@value
class Decision:
    """Events that are due, or none and the time when the next one could be."""

    events: tuple[ev.Event, ...] = ()
    wake: float | None = None
    """None: nothing will be due before something is reported."""


def decide(state: State, now: float) -> Decision:
    """Events to apply now. Ask again after applying them, until there are none."""
    due = due_of_bans(state, now) or due_ahead(state, now)
    if due:
        return Decision(due)
    decision = _of_round(state, now)
    if decision.events or not (state.ahead.away or state.bans_that_end):
        return decision
    timers = (decision.wake, next_ahead(state), *state.bans_that_end.values())
    return Decision(wake=min((at for at in timers if at is not None), default=None))


def _of_round(state: State, now: float) -> Decision:
    match state.phase:  # cases are tried in order: the most frequent first
        case Phase.ROLLOUT:
            return _rollout(state, now)
        case Phase.STEP:
            return _step(state, _current(state), now)
        case Phase.PLAN:
            return _plan(state, now)
        case Phase.EXCHANGE:
            return _exchange(state, _current(state), now)
        case Phase.GENESIS:
            return _genesis(state, now)
        case Phase.FINISHED:
            return Decision()


def _current(state: State) -> Attempt:
    assert state.round.attempt is not None
    return state.round.attempt


def _genesis(state: State, now: float) -> Decision:
    if len(state.idle) < state.terms.config.run.start_peers:
        return Decision()
    tally: dict[bytes, int] = {}
    for peer in state.idle:
        root = state.members[peer].ready_root
        tally[root] = tally.get(root, 0) + 1
    root, votes = max(tally.items(), key=lambda item: item[1])
    if 3 * votes < 2 * len(state.idle):
        return Decision()
    return Decision((ev.VersionCommitted(now, genesis_payload(state, root)),))


def _rollout(state: State, now: float) -> Decision:
    expired = _expiries(state, now)
    if expired:
        return Decision(tuple(expired))
    if now < state.round.resume_at:
        return Decision(wake=state.round.resume_at)
    config, current = state.terms.config, state.round
    deadline = None if current.rollout_at is None else current.rollout_at + config.timing.lease
    late = bool(current.contributions) and deadline is not None and now >= deadline
    if not late and not state.paused:
        grants = _renewals(state, now) if current.iteration else _grants(state, now)
        if grants:
            return Decision(tuple(grants))
    if current.contributions and (late or not state.leases):
        unfinished = [_expiry(state, now, lease, "the round was planned without it") for lease in state.leases]
        reason = "the deadline has passed" if late else "nothing more is expected"
        return Decision((*unfinished, ev.RolloutClosed(now, current.version, reason)))
    if not state.leases and not current.contributions:
        if state.paused and current.rollout_at is None:
            return Decision()
        if current.iteration:
            return _abandon(state, now, f"no rollout is left for iteration {current.iteration}")
        if current.empties:
            return Decision((ev.RoundEmpty(now, current.version, why_empty(current.empties.values(), config.grpo)),))
    return Decision(wake=min(_rollout_timers(state, deadline, now), default=None))


def _expiries(state: State, now: float) -> list[ev.LeaseExpired]:
    timing = state.terms.config.timing
    ended: dict[int, ev.LeaseExpired] = {}
    for lease_id, lease in state.leases.items():
        if now < lease.at + timing.lease:
            break
        ended[lease_id] = _expiry(state, now, lease_id, f"no contribution within {timing.lease:.0f} s")
    for peer, since in state.round.absent.items():
        if now < since + timing.grace:
            break
        held = state.members[peer].lease
        if held is not None and held not in ended:
            reason = "its peer left" if state.members[peer].left else "its peer was lost"
            ended[held] = _expiry(state, now, held, reason)
    return list(ended.values())


def _expiry(state: State, now: float, lease: int, reason: str) -> ev.LeaseExpired:
    return ev.LeaseExpired(now, lease, reason, state.leases[lease].message.iteration)


def _rollout_timers(state: State, deadline: float | None, now: float) -> list[float]:
    timing, current = state.terms.config.timing, state.round
    timers: list[float] = []
    if current.contributions and deadline is not None:
        timers.append(deadline)
    for lease in state.leases.values():
        timers.append(lease.at + timing.lease)
        break
    for since in current.absent.values():
        if since + timing.grace > now:
            timers.append(since + timing.grace)
            break
    return timers


def _grants(state: State, now: float) -> list[ev.LeaseGranted]:
    """Leases for the idle: each gets a share, by its pace among the peers that have none yet, of what is left to lease.

    As many peers are counted on as a plan has room for.
    """
    config, current, unserved = state.terms.config, state.round, state.unserved
    remaining = config.grpo.prompts_per_round - current.leased - current.spent
    waiting = min(len(unserved), LARGEST_ROSTER - len(current.served))
    if remaining <= 0 or not state.idle or waiting <= 0:
        return []
    total = unserved.total * waiting // len(unserved)
    grants: list[ev.LeaseGranted] = []
    book = state.positions.copy()
    evaluate = _to_evaluate(state)
    for lease_id, peer in enumerate(state.idle, start=state.next_lease):
        pace = unserved.paces[peer]
        share = share_of(remaining, waiting, pace, max(total, pace))
        run = book.pick(positions_for(share, config.grpo))
        book.take(run)
        wanted = min(share, len(run))
        payload = lease_payload(state, lease_id, peer, run, wanted, evaluate=evaluate)
        grants.append(ev.LeaseGranted(now, payload))
        evaluate = False
        remaining -= wanted
        waiting -= 1
        total -= pace
        if remaining <= 0 or waiting <= 0:
            break
    return grants


def _renewals(state: State, now: float) -> list[ev.LeaseGranted]:
    """Once, at the beginning of the round: the leases of the rollouts that it goes on with."""
    if state.round.rollout_at is not None:
        return []
    grants, evaluate = [], _to_evaluate(state)
    for held in state.round.rollouts.values():
        grants.append(ev.LeaseGranted(now, renewed_lease_payload(state, held.lease, evaluate=evaluate)))
        evaluate = False
    return grants


def _to_evaluate(state: State) -> bool:
    return wants_evaluation(state.version, state.terms.config) and not state.round.evaluating


def _plan(state: State, now: float) -> Decision:
    timing, current = state.terms.config.timing, state.round
    patience = current.closed_at + timing.grace
    if current.tries >= timing.max_attempts:
        return _abandon(state, now, f"no version after {current.tries} attempts; the last: {state.trouble}")
    away = [peer for peer in current.absent if peer in current.contributions]
    back_by = min(patience, max((current.absent[peer] + timing.grace for peer in away), default=now))
    if now < back_by:
        return Decision(wake=back_by)
    if away:
        return Decision(tuple(_rejections(state, away, now, "peer lost")))
    if not current.contributions:
        return _abandon(state, now, "every contributor was lost")
    payload = plan_payload(state, list(current.contributions))
    if payload is not None:
        return Decision((ev.PlanMade(now, payload),))
    if now < patience:
        return Decision(wake=patience)
    return _abandon(state, now, "no contributor gave an address at which it can be dialled as a reducer")


def _exchange(state: State, attempt: Attempt, now: float) -> Decision:
    timing = state.terms.config.timing
    missing = [peer for peer in reducers_of(attempt.payload) if peer not in attempt.reports]
    if not missing:
        cut_off = [peer for peer, complete in attempt.reports.items() if 2 * len(complete) < len(attempt.roster)]
        if 0 < len(cut_off) < len(attempt.reports):
            return _fail(state, now, f"reducers {', '.join(cut_off)} lack most senders", cut_off)
        denied = {} if state.round.disputed else deniers(attempt, state.standing)
        if denied:
            words = ", ".join(f"{reducer} alone lacks {sender}" for reducer, sender in denied.items())
            return _fail(state, now, f"reducer {words}", denied, denied.values())
        payload = seal_payload(attempt)
        if payload is not None:
            return Decision((ev.SealMade(now, payload),))
        return _fail(state, now, "no contributor was complete at every reducer")
    deadline = attempt.planned_at + attempt.plan.exchange_seconds + EXTRA_SECONDS
    if now >= deadline:
        lost = _rejections(state, missing, now, "as a reducer, it did not report in time")
        return Decision((*lost, *_fail(state, now, f"no report from reducers {', '.join(missing)}", missing).events))
    limits = {peer: state.round.absent[peer] + timing.grace for peer in missing if peer in state.round.absent}
    gone = [peer for peer, limit in limits.items() if now >= limit]
    if gone:
        return _fail(state, now, f"lost reducers {', '.join(gone)} during the exchange", gone)
    return Decision(wake=min([deadline, *limits.values()]))


def _step(state: State, attempt: Attempt, now: float) -> Decision:
    absent, open_votes = state.round.absent, len(attempt.roster) - len(attempt.votes)
    if attempt.quorum_at is not None:
        last = attempt.quorum_at + LAST_VOTES_SECONDS
        if now >= last or (open_votes <= len(absent) and open_votes <= len(_away(state, attempt))):
            return _committed_or_audited(state, attempt, now)
        return Decision(wake=last)
    leading = max(attempt.tally.values(), default=0)
    if leading + open_votes < attempt.quorum:
        return _fail(state, now, f"the votes disagree: {len(attempt.tally)} different results")
    if not attempt.votes or leading + open_votes - len(absent) < attempt.quorum:
        gone = [peer for peer, limit in _away(state, attempt).items() if now >= limit]
        lost = [peer for peer in gone if peer in reducers_of(attempt.payload)]
        if leading + open_votes - len(gone) < attempt.quorum:
            return _fail(state, now, "too few of the roster are left for a quorum", lost)
        if lost and not attempt.votes:
            return _fail(state, now, f"lost reducers {', '.join(lost)} before anyone had all spans", lost)
    deadline = attempt.sealed_at + attempt.plan.step_seconds + EXTRA_SECONDS
    if now >= deadline:
        reason = f"{len(attempt.votes)} of {len(attempt.roster)} votes within the step's time"
        return _fail(state, now, reason, withholders(attempt))
    return Decision(wake=min(deadline, _next_limit(state, attempt, now) or deadline))


def _away(state: State, attempt: Attempt) -> dict[str, float]:
    """Who of the roster is away and has not voted, and until when it is waited for: too many to look at each time."""
    grace, votes = state.terms.config.timing.grace, attempt.votes
    absent = state.round.absent.items()
    return {peer: since + grace for peer, since in absent if peer in attempt.roster and peer not in votes}


def _next_limit(state: State, attempt: Attempt, now: float) -> float | None:
    """When the patience with the next one of those ends."""
    grace, found = state.terms.config.timing.grace, None
    for peer, since in reversed(state.round.absent.items()):
        if since + grace <= now:
            break  # the others are away for longer
        if peer in attempt.roster and peer not in attempt.votes:
            found = since + grace
    return found


def _committed_or_audited(state: State, attempt: Attempt, now: float) -> Decision:
    """What has its quorum is committed, once enough auditors agree with every span that was drawn."""
    missing = unaudited(attempt, now)
    if not missing:
        return Decision(tuple(_commit(state, attempt, now)))
    deadline = audits_until(attempt) + EXTRA_SECONDS
    if now >= deadline:
        return _fail(state, now, f"no auditor agreed in time with spans {', '.join(map(str, missing))}")
    return Decision(wake=min(deadline, next_turn(attempt, now) or deadline))


def _commit(state: State, attempt: Attempt, now: float) -> Iterator[ev.Event]:
    ballot = attempt.winner()
    assert ballot is not None
    assert attempt.seal is not None
    payload = manifest_payload(state, ballot)
    sealed = {contributor.peer for contributor in attempt.seal.contributors}
    for contributor in attempt.plan.contributors:
        if contributor.peer not in sealed:
            reason = f"incomplete at reducer {incomplete_at(attempt, contributor.peer)}"
            yield ev.ContributionRejected(now, contributor.peer, contributor.lease, reason, contributor.iteration)
    yield ev.VersionCommitted(now, payload)


def _fail(
    state: State, now: float, reason: str, culprits: Iterable[str] = (), disputed: Iterable[str] = ()
) -> Decision:
    current = state.round
    failed = ev.AttemptFailed(now, current.version, current.attempts, reason, tuple(culprits), tuple(disputed))
    return Decision((failed,))


def _abandon(state: State, now: float, reason: str) -> Decision:
    rejected = _rejections(state, list(state.round.contributions), now, reason)
    early = expire_all(state, now, "its version is not made from this round")
    return Decision((*rejected, *early, ev.RoundAbandoned(now, state.round.version, reason)))


def _rejections(state: State, peers: list[str], now: float, reason: str) -> Iterator[ev.ContributionRejected]:
    for peer in peers:
        lease = state.round.contributions[peer].lease
        yield ev.ContributionRejected(now, peer, lease.id, reason, lease.iteration)
