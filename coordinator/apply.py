"""How each event changes the state: deterministic, and in place: copying ten thousand peers would be quadratic."""

from collections.abc import Iterable
from typing import assert_never

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.ahead import adopt_ahead, await_ahead, expire_ahead, grant_ahead, meet_ahead, miss_ahead
from hivegrpo.coordinator.invites import Invite
from hivegrpo.coordinator.rates import follow
from hivegrpo.coordinator.readings import contribution_of, lease_of, senders_of, vote_of
from hivegrpo.coordinator.round import EVALUATION_PREFIX, Attempt, Audit, Granted, Held, Round, empty_pause
from hivegrpo.coordinator.speeds import Pacing, Waiting, observe, observe_at_most
from hivegrpo.coordinator.state import Ban, Head, Member, Phase, Promotion, State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import draw, seed_of
from hivegrpo.protocol.envelope import digest_of, parse


def apply(state: State, event: ev.Event) -> None:
    """Take one event into the state."""
    match event:  # cases are tried in order: the most frequent first
        case ev.LeaseGranted(at=at, payload=payload):
            _grant(state, payload, at)
        case ev.ContributionReceived(at=at, signed=signed):
            _contribute(state, parse(pb.Signed, signed), at)
        case ev.StepReported(at=at, signed=signed):
            _vote(state, parse(pb.Signed, signed), at)
        case ev.CoordinatorStarted(at=at):
            _start(state, at)
        case ev.PeerJoined():
            _join(state, event)
        case ev.PeerDisconnected(at=at, peer=peer):
            _disconnect(state, peer, at)
        case ev.PeerLeft(at=at, peer=peer):
            _leave(state, peer, at)
        case ev.PeerReady(peer=peer, version=version, state_root=root):
            _hold(state, peer, version, root)
        case ev.PeerProbed(peer=peer, reachable=reachable):
            state.members[peer].reachable = reachable
        case ev.LeaseExpired(at=at, lease=lease):
            _expire(state, lease, at)
        case ev.ContributionRejected(peer=peer):
            _reject(state, peer)
        case ev.RolloutClosed(at=at):
            state.phase = Phase.PLAN
            state.round.closed_at = at
        case ev.PlanMade(at=at, payload=payload):
            _plan(state, payload, at)
        case ev.SendersReported(signed=signed):
            _report_senders(state, parse(pb.Signed, signed))
        case ev.SealMade(at=at, payload=payload):
            _seal(state, payload, at)
        case ev.AuditReported(signed=signed):
            _audit(state, parse(pb.Signed, signed))
        case ev.PeerBanned(at=at, peer=peer):
            _ban(state, peer, at, Ban(event.reason, event.root, event.size, event.until))
        case ev.BanLifted(peer=peer):
            del state.banned[peer]
            state.bans_that_end.pop(peer, None)
        case ev.InviteIssued(invite=invite):
            state.invites[invite] = Invite(event.expires, event.uses, event.note)
        case ev.InviteUsed(invite=invite, peer=peer):
            state.invites.setdefault(invite, Invite(event.expires, event.uses)).peers[peer] = None
        case ev.InviteRevoked(invite=invite):
            state.invites[invite].revoked = True
        case ev.RunPaused():
            state.paused = True
        case ev.RunResumed():
            state.paused = False
        case ev.ReferencePromoted():
            state.promotion = Promotion(event.version, event.reference)
        case ev.AttemptFailed(at=at, reason=reason):
            state.standing.charge([*event.culprits, *event.disputed], event.version)
            state.round.disputed = state.round.disputed or bool(event.disputed)
            state.phase = Phase.PLAN
            state.failed, state.round.attempt = state.round.attempt, None
            state.ahead.waiting.clear()
            state.round.closed_at = at
            state.trouble = reason
        case ev.RoundAbandoned(reason=reason):
            state.trouble = reason
            _begin_rollout(state)
        case ev.RoundEmpty(at=at):
            state.empty_rounds += 1
            _begin_rollout(state)
            state.round.resume_at = at + empty_pause(state.empty_rounds)
        case ev.VersionCommitted(at=at, payload=payload):
            _commit(state, payload)
            adopt_ahead(state, at)
        case _:
            assert_never(event)


def _start(state: State, at: float) -> None:
    for peer in list(state.connected):
        _disconnect(state, peer, at)
    current = state.round
    for peer in current.absent:
        current.absent[peer] = at
    for lease in (*state.leases.values(), *state.ahead.leases.values()):
        lease.at, lease.since = at, None
    if current.rollout_at is not None:
        current.rollout_at = at
    current.closed_at = at
    current.resume_at = min(current.resume_at, at)
    if current.attempt is not None:
        current.attempt.planned_at = at
        current.attempt.sealed_at = at
        if current.attempt.quorum_at is not None:
            current.attempt.quorum_at = at


def _join(state: State, event: ev.PeerJoined) -> None:
    member = state.members.get(event.peer)
    if member is None:
        state.members[event.peer] = Member(event.addresses, event.agent, event.at)
    else:
        if member.addresses != event.addresses:
            member.reachable = None
        member.addresses, member.agent = event.addresses, event.agent
        member.connected, member.left, member.since = True, False, event.at
    state.connected[event.peer] = None
    state.holding.pop(event.peer, None)  # its addresses may be others than before
    state.round.absent.pop(event.peer, None)
    meet_ahead(state, event.peer)
    _offer(state, event.peer)


def _disconnect(state: State, peer: str, at: float) -> None:
    member = state.members[peer]
    if not member.connected:
        return
    member.connected, member.since = False, at
    state.unserved.discard(peer)
    for group in (state.connected, state.idle, state.holding):
        group.pop(peer, None)
    miss_ahead(state, peer)
    if member.lease is not None or peer in state.round.contributions:
        state.round.absent[peer] = at


def _leave(state: State, peer: str, at: float) -> None:
    _disconnect(state, peer, at)
    state.members[peer].left = True
    if peer in state.round.absent:
        state.round.absent[peer] = at - state.terms.config.timing.grace
        state.round.absent.move_to_end(peer, last=False)


def _hold(state: State, peer: str, version: int, root: bytes) -> None:
    member = state.members[peer]
    member.ready, member.ready_root = version, root
    _offer(state, peer)


def _offer(state: State, peer: str) -> None:
    """Note that a peer could be leased work, and that it could serve the head, if so."""
    member = state.members[peer]
    holds = member.connected and member.ready == max(state.version, 0)
    if holds and member.addresses:
        state.holding[peer] = None
    if member.connected and peer not in state.round.served:
        state.unserved.add(peer, state.round.pacing.pace(state.speeds.get(peer)))
        if holds:
            state.idle[peer] = None


def _grant(state: State, payload: bytes, at: float) -> None:
    lease = lease_of(payload)
    if lease.ahead:
        grant_ahead(state, lease, payload, at)
        return
    current = state.round
    state.leases[lease.id] = Granted(lease, payload, at, at)
    if lease.iteration == 0:
        state.next_lease = lease.id + 1
        state.positions.take(range(lease.start, lease.start + lease.count))
    state.members[lease.peer].lease = lease.id
    state.unserved.discard(lease.peer)
    state.idle.pop(lease.peer, None)
    current.served[lease.peer] = lease.id
    if lease.peer not in state.connected:  # it left while a pause, or a crash, held up the lease of its next iteration
        current.absent[lease.peer] = at
    current.leased += lease.wanted
    current.evaluating = current.evaluating or lease.evaluate
    if current.rollout_at is None:
        current.rollout_at = at


def _expire(state: State, lease_id: int, at: float) -> None:
    if lease_id in state.ahead.leases:
        expire_ahead(state, lease_id)
        return
    granted = state.leases[lease_id]
    seconds, whole = _measured(granted, at), at >= granted.at + state.terms.config.timing.lease
    lease = _end_lease(state, lease_id)
    # Of a speed that nobody knows, a lease that was cut short says next to nothing.
    if seconds is not None and lease.peer in state.connected and (whole or lease.peer in state.speeds):
        observe_at_most(state.speeds, lease.peer, lease.wanted, seconds)
    if lease.iteration == 0:
        state.positions.give_back(range(lease.start, lease.start + lease.count))
    current = state.round
    if lease.evaluate:
        current.evaluating = False
    current.served.pop(lease.peer)
    current.absent.pop(lease.peer, None)
    if not state.leases and not current.contributions and current.iteration == 0:
        current.rollout_at = None
    _offer(state, lease.peer)


def _end_lease(state: State, lease_id: int) -> pb.Lease:
    lease = state.leases.pop(lease_id).message
    state.members[lease.peer].lease = None
    state.round.leased -= lease.wanted
    return lease


def _measured(granted: Granted, at: float) -> float | None:
    """Seconds of sampling alone that a lease has taken, if it has shown them."""
    lease = granted.message
    return None if granted.since is None or lease.iteration or lease.evaluate else at - granted.since


def _contribute(state: State, signed: pb.Signed, at: float) -> None:
    contribution = contribution_of(signed.payload)
    current = state.round
    seconds = _measured(state.leases[contribution.lease], at)
    lease = _end_lease(state, contribution.lease)
    worked = len(contribution.used) + len(contribution.dropped)
    if seconds is not None:
        observe(state.speeds, lease.peer, worked, seconds)
    if lease.iteration == 0:
        if contribution.returned:
            state.positions.give_back([lease.start + offset for offset in sorted(contribution.returned)])
        current.spent += min(lease.wanted, worked)
    if lease.evaluate:
        current.evaluation = {
            name: value for name, value in contribution.metrics.items() if name.startswith(EVALUATION_PREFIX)
        }
    held = Held(lease, contribution, digest_of(signed.payload))
    if contribution.weight:
        current.contributions[lease.peer] = held
    else:
        current.empties[lease.peer] = held
        current.absent.pop(lease.peer, None)


def _reject(state: State, peer: str) -> None:
    current = state.round
    held = current.contributions.pop(peer)
    if held.lease.iteration == 0:
        state.positions.give_back(sorted(held.lease.start + offset for offset in held.message.used))
        current.spent -= len(held.message.used)
    current.served.pop(peer)
    current.absent.pop(peer, None)
    _offer(state, peer)


def _plan(state: State, payload: bytes, at: float) -> None:
    plan = parse(pb.RoundPlan, payload)
    current = state.round
    roster = frozenset(contributor.peer for contributor in plan.contributors)
    current.attempt = Attempt(plan, payload, digest_of(payload), at, roster)
    current.attempts = plan.attempt
    current.tries += 1
    await_ahead(state)
    state.phase = Phase.EXCHANGE


def _report_senders(state: State, signed: pb.Signed) -> None:
    attempt = state.round.attempt
    assert attempt is not None
    attempt.take_report(signed.signer, senders_of(signed.payload))


def _seal(state: State, payload: bytes, at: float) -> None:
    attempt = state.round.attempt
    assert attempt is not None
    attempt.seal = parse(pb.Seal, payload)
    attempt.seal_payload, attempt.seal_digest, attempt.sealed_at = payload, digest_of(payload), at
    state.phase = Phase.STEP


def _vote(state: State, signed: pb.Signed, at: float) -> None:
    vote, voter = vote_of(signed.payload), signed.signer
    current, last = state.round.attempt, state.last
    if current is not None and vote.plan == current.digest:
        current.vote(voter, vote, at)
        if current.quorum_at is not None and not current.seed:
            current.seed = seed_of(state.terms.secret, current.seal_digest)
            current.drawn = draw(current.plan, current.seed, state.terms.config.averaging.audit_rate)
    elif last is not None and vote.plan == last.digest:
        last.vote(voter, vote, at)
        if vote.ballot == last.winner():
            _hold(state, voter, vote.version, vote.ballot[0])
        else:
            state.standing.charge([voter], vote.version)


def _audit(state: State, signed: pb.Signed) -> None:
    report = parse(pb.AuditReport, signed.payload)
    for attempt in (state.round.attempt, state.last):
        if attempt is not None and attempt.digest == report.plan:
            audit = Audit(report.content, signed.SerializeToString())
            attempt.audits.setdefault(report.span, {})[signed.signer] = audit
            return


def _ban(state: State, peer: str, at: float, ban: Ban) -> None:
    """From here on it is away; what it still has in the round, `decide` ends by further events."""
    state.banned[peer] = ban
    state.bans_that_end.pop(peer, None)
    if ban.until is not None:
        state.bans_that_end[peer] = ban.until
    state.round.rollouts.pop(peer, None)
    if peer in state.members:
        _leave(state, peer, at)


def _commit(state: State, payload: bytes) -> None:
    manifest = parse(pb.VersionManifest, payload)
    before, attempt = state.round, state.round.attempt
    state.last_lease_digests = {
        (held.lease.id, held.lease.iteration): held.digest for held in before.contributions.values()
    }
    for contributor in manifest.contributors:
        state.members[contributor.peer].contributed += 1
    state.head = Head(manifest, payload, digest_of(payload))
    if manifest.HasField("restores"):
        state.restored[manifest.version] = manifest.restores
    if manifest.promoted:
        state.promotion = None
    state.last = attempt
    state.empty_rounds = 0
    state.trouble = ""
    if attempt is not None:
        follow(state.rates, attempt)
        _judge_roster(state, attempt, manifest)
        for peer in _voters(attempt, manifest.state.root):
            state.members[peer].ready, state.members[peer].ready_root = manifest.version, manifest.state.root
    state.round = Round(manifest.version + 1)
    _begin_rollout(state)
    rollouts = {peer: held for peer, held in before.contributions.items() if peer in state.connected}
    if rollouts and before.iteration + 1 < state.terms.config.grpo.num_iterations:
        state.round.iteration, state.round.rollouts = before.iteration + 1, rollouts
    if manifest.version == 0:
        for peer in list(state.idle):
            if state.members[peer].ready_root != manifest.state.root:
                state.members[peer].ready = None
                del state.idle[peer]
                state.holding.pop(peer, None)
    if manifest.version == state.terms.config.run.versions:
        state.phase = Phase.FINISHED


def _judge_roster(state: State, attempt: Attempt, manifest: pb.VersionManifest) -> None:
    """Charge who voted otherwise or was left out of the seal; the others did their part."""
    counted = {contributor.peer for contributor in manifest.contributors}
    otherwise = {peer for peer, ballot in attempt.votes.items() if ballot != attempt.winner()}
    spoilers = sorted(otherwise | (attempt.roster - counted))
    state.standing.credit(sorted(counted - otherwise), manifest.version)
    state.standing.charge(spoilers, manifest.version)


def _voters(attempt: Attempt, root: bytes) -> Iterable[str]:
    return (peer for peer, ballot in attempt.votes.items() if ballot[0] == root)


def _begin_rollout(state: State) -> None:
    before = state.round
    state.round = Round(before.version, attempts=before.attempts, evaluation=before.evaluation)
    state.round.evaluating = bool(before.evaluation)
    state.phase = Phase.ROLLOUT
    state.round.pacing = Pacing.of(state.speeds, state.connected)
    state.unserved = Waiting()
    for peer in state.connected:
        state.unserved.add(peer, state.round.pacing.pace(state.speeds.get(peer)))
    held = state.version
    state.idle = {peer: None for peer in state.connected if state.members[peer].ready == held}
    state.holding = {peer: None for peer in state.idle if state.members[peer].addresses}
