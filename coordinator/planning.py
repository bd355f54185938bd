"""What the coordinator signs, as payload bytes made from the state: leases, plans, seals and version manifests."""

import math
from collections.abc import Sequence

from google.protobuf.message import Message

from hivegrpo.coordinator.metrics import merge_metrics
from hivegrpo.coordinator.readings import Ballot
from hivegrpo.coordinator.round import Attempt, Held
from hivegrpo.coordinator.shares import shares, spans
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import MAX_LEASE_POSITIONS, MAX_REDUCERS
from hivegrpo.protocol.chunks import chunk_count
from hivegrpo.protocol.coefficients import coefficients, norm_bytes, planned_rule
from hivegrpo.protocol.config import GrpoSection, RunConfig
from hivegrpo.protocol.envelope import digest_of
from hivegrpo.protocol.reference import reference_of
from hivegrpo.protocol.scalars import StepScalars
from hivegrpo.protocol.schedule import learning_rate

LARGEST_ROSTER = 3072
"""Contributors of a plan. With more, plan, seal and manifest would not fit in one entry of the chain."""

PLANNED_ADDRESSES = 8
"""Addresses of a reducer that go into a plan; likewise."""

TOKEN_LOSSES = ("dapo", "cispo")
"""Loss types that weigh a contribution by its tokens; the others weigh it by its completions."""


def lease_payload(
    state: State, lease_id: int, peer: str, run: range, wanted: int, *, evaluate: bool, ahead: bool = False
) -> bytes:
    """A lease of the positions in `run`, of which `wanted` groups are to be used, to be worked on under the head.

    `ahead`: under the version that is being made, with a rollout under the head.
    """
    config, head = state.terms.config, state.head
    assert head is not None
    reference, coming = head.manifest.reference_version, state.round.version
    lease = pb.Lease(
        id=lease_id,
        peer=peer,
        version=coming if ahead else state.version,
        start=run.start,
        count=len(run),
        wanted=wanted,
        max_weight=max_weight(wanted, config.grpo),
        seconds=config.timing.lease,
        reference_version=reference_at(state, coming)[0] if ahead else reference,
        evaluate=evaluate,
        ahead=ahead,
    )
    return _payload(lease)


def renewed_lease_payload(state: State, lease: pb.Lease, *, evaluate: bool) -> bytes:
    """The next iteration of a lease: another gradient of its rollout, under the head."""
    assert state.head is not None
    renewed = pb.Lease()
    renewed.CopyFrom(lease)
    renewed.version = state.version
    renewed.iteration += 1
    renewed.seconds = state.terms.config.timing.lease
    renewed.reference_version = state.head.manifest.reference_version
    renewed.evaluate = evaluate
    return _payload(renewed)


def positions_for(wanted: int, grpo: GrpoSection) -> int:
    """Positions of a lease of which so many groups are wanted: with dynamic sampling, some more to replace others."""
    return min(math.ceil(wanted * grpo.dynamic_sampling_factor), MAX_LEASE_POSITIONS)


def max_weight(groups: int, grpo: GrpoSection) -> int:
    """The most that so many groups can weigh."""
    completions = groups * grpo.num_generations
    return completions * grpo.max_completion_length if grpo.loss_type in TOKEN_LOSSES else completions


def wants_evaluation(version: int, config: RunConfig) -> bool:
    """Whether one lease of this version also measures accuracy on the held-out set."""
    return config.evaluation is not None and version % config.evaluation.every == 0


def plan_payload(state: State, peers: Sequence[str]) -> bytes | None:
    """The next attempt with these contributors; None if nobody could dial any of them."""
    config, current, head = state.terms.config, state.round, state.head
    assert head is not None
    roster = sorted(peers)
    reachable = state.standing.preferred(_reachable(state, roster), current.version)
    chunks = chunk_count(state.terms.values)
    if not reachable:
        return None
    if len(reachable) > MAX_REDUCERS:
        reachable = sorted(sorted(reachable, key=lambda peer: -state.rates.get(peer, 0.0))[:MAX_REDUCERS])
    if current.tries > 1:
        count = max(1, len(reachable) >> (current.tries - 1))
        reachable = sorted(_draw(reachable, head.digest, current.attempts + 1, count))
    sizes = shares(chunks, [state.rates.get(peer) for peer in reachable], len(roster))
    optimizer = config.optimizer
    scalars = StepScalars.for_step(
        state.optimizer_steps + 1,
        learning_rate=learning_rate(current.version, config.run.versions, optimizer),
        beta1=optimizer.adam_beta1,
        beta2=optimizer.adam_beta2,
        epsilon=optimizer.adam_epsilon,
        weight_decay=optimizer.weight_decay,
    )
    plan = pb.RoundPlan(
        version=current.version,
        parent=head.digest,
        attempt=current.attempts + 1,
        codec=config.averaging.codec,
        rule=planned_rule(config.averaging.rule, len(roster)),
        values=state.terms.values,
        contributors=[_contributor(peer, current.contributions[peer]) for peer in roster],
        reducers=[
            pb.Reducer(peer=peer, addresses=_dialled(state, peer), first=span.start, chunks=len(span))
            for peer, span in zip(reachable, spans(sizes), strict=True)
            if span
        ],
        scalars=scalars.to_bits(),
        exchange_seconds=config.timing.exchange,
        step_seconds=config.timing.step,
        audit_seconds=config.timing.audit,
    )
    return _payload(plan)


def _reachable(state: State, roster: Sequence[str]) -> list[str]:
    """Who can reduce: connected, with an address, and not known to be out of a stranger's reach.

    Nobody has to dial a peer that is alone; and if all failed the test, the test may be wrong: all are tried.
    """
    named = [peer for peer in roster if peer in state.connected and state.members[peer].addresses]
    return [peer for peer in named if state.members[peer].reachable is not False] or named


def _draw(peers: Sequence[str], head: bytes, attempt: int, count: int) -> list[str]:
    """So many of the peers, by lot: half as many after each further attempt that failed.

    Who spoils attempts as a reducer is soon in a plan without that job, and the fewer reducers there are, the less it
    matters that peers die: in a large swarm one of 64 does in most exchanges.
    """
    return sorted(peers, key=lambda peer: digest_of(head + f"{attempt} {peer}".encode()))[:count]


def seal_payload(attempt: Attempt) -> bytes | None:
    """The senders that are complete at every reducer, each with its share of the weight; None if there are none."""
    complete = attempt.roster.intersection(*attempt.reports.values())
    sealed = [contributor for contributor in attempt.plan.contributors if contributor.peer in complete]
    if not sealed:
        return None
    peers = [contributor.peer for contributor in sealed]
    by_reducer = [map(report.__getitem__, peers) for report in attempt.reports.values()]
    norms = list(map(sum, zip(*by_reducer, strict=True)))
    bits = coefficients(attempt.plan.rule, [contributor.weight for contributor in sealed], norms)
    seal = pb.Seal(
        plan=attempt.digest,
        contributors=[
            pb.Sealed(peer=contributor.peer, coefficient=coefficient, norm_squared=norm_bytes(norm))
            for contributor, coefficient, norm in zip(sealed, bits, norms, strict=True)
        ],
    )
    return _payload(seal)


def incomplete_at(attempt: Attempt, peer: str) -> str:
    """The first reducer that did not have all chunks of `peer`."""
    return next(reducer for reducer, complete in attempt.reports.items() if peer not in complete)


def genesis_payload(state: State, root: bytes) -> bytes:
    """Version 0."""
    manifest = pb.VersionManifest(
        version=0,
        parent=state.terms.run_digest,
        state=pb.Blob(root=root, size=state.terms.state_size),
        reference_version=0,
    )
    return _payload(manifest)


def manifest_payload(state: State, ballot: Ballot) -> bytes:
    """The next version, as the quorum voted for it."""
    current, head = state.round, state.head
    attempt = current.attempt
    assert head is not None
    assert attempt is not None
    assert attempt.seal is not None
    root, spans = ballot
    reference, promoted = reference_at(state, current.version)
    sealed = {contributor.peer for contributor in attempt.seal.contributors}
    manifest = pb.VersionManifest(
        version=current.version,
        parent=head.digest,
        plan=attempt.digest,
        seal=attempt.seal_digest,
        spans=[pb.Blob(root=span_root, size=size) for span_root, size in spans],
        state=pb.Blob(root=root, size=state.terms.state_size),
        contributors=[contributor for contributor in attempt.plan.contributors if contributor.peer in sealed],
        reference_version=reference,
        promoted=promoted,
        metrics=merge_metrics(
            [current.contributions[peer] for peer in sorted(sealed)], current.evaluation, state.terms.config.grpo
        ),
    )
    return _payload(manifest)


def reference_at(state: State, version: int) -> tuple[int, bool]:
    """The KL reference of the version that is being made, and whether an operator chose it."""
    promotion, head = state.promotion, state.head
    assert head is not None
    if promotion is not None and version >= promotion.version:
        return (version if promotion.reference is None else promotion.reference), True
    return reference_of(version, head.manifest.reference_version, state.terms.config.grpo), False


def rollback_payload(state: State, target: pb.VersionManifest) -> bytes:
    """The version after the head, with the state, and the KL reference, of the older version `target`."""
    head = state.head
    assert head is not None
    manifest = pb.VersionManifest(
        version=head.manifest.version + 1,
        parent=head.digest,
        state=target.state,
        reference_version=target.reference_version,
        restores=target.version,
    )
    return _payload(manifest)


def _dialled(state: State, peer: str) -> tuple[str, ...]:
    return state.members[peer].addresses[:PLANNED_ADDRESSES]


def _contributor(peer: str, held: Held) -> pb.Contributor:
    message = held.message
    return pb.Contributor(
        peer=peer, lease=message.lease, iteration=message.iteration, weight=message.weight, root=message.root
    )


def _payload(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)
