"""Going back: a new version with the state of an older one. Pure.

History stays. What the versions in between were made from is spent: no prompt counts twice. The optimizer's step count
and moments are those of the older state, so the bias corrections go on from there; the learning rate follows the
version number, which says how far the run is.
"""

from collections.abc import Iterator

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.ahead import expire_all
from hivegrpo.coordinator.planning import rollback_payload
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb


def rollback_events(state: State, target: pb.VersionManifest, now: float) -> Iterator[ev.Event]:
    """End the round in flight, whose contributions are of parameters that are given up, and commit the version."""
    current, why = state.round, f"the run goes back to version {target.version}"
    for peer, held in current.contributions.items():
        yield ev.ContributionRejected(now, peer, held.lease.id, why, held.lease.iteration)
    for lease, granted in state.leases.items():
        yield ev.LeaseExpired(now, lease, why, granted.message.iteration)
    yield from expire_all(state, now, why)
    if current.attempt is not None:
        yield ev.AttemptFailed(now, current.version, current.attempts, why)
    yield ev.RoundAbandoned(now, current.version, why)
    yield ev.VersionCommitted(now, rollback_payload(state, target))
