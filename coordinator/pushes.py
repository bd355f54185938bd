"""What peers are told: the payloads to be signed that follow from an event, or from the state when a peer joins."""

from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from typing import Any

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.readings import lease_of
from hivegrpo.coordinator.state import Phase, State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import seed_notice
from hivegrpo.protocol.values import value

MAX_HOLDERS = 32
"""Holders of states that a peer is told of when it joins."""


@value
class Push:
    """A message for those of `peers` (None: for all) that follow."""

    peers: tuple[str, ...] | None
    type: str
    payload: bytes


def push_of(event: ev.Event, state: State) -> Push | None:
    """What an event that has just been applied has for the peers."""
    push = _PUSHES.get(type(event))
    return push(event, state) if push is not None else None


def _drawn_push(event: ev.StepReported, state: State) -> Push | None:
    return _seed_push(state, _roster(state)) if _draws(event, state) else None


_PUSHES: dict[type[ev.Event], Callable[[Any, State], Push | None]] = {
    ev.LeaseGranted: lambda event, _: Push((lease_of(event.payload).peer,), "Lease", event.payload),
    ev.PlanMade: lambda event, state: Push(_roster(state), "RoundPlan", event.payload),
    ev.SealMade: lambda event, state: Push(_roster(state), "Seal", event.payload),
    ev.StepReported: _drawn_push,
    ev.VersionCommitted: lambda event, _: Push(None, "VersionManifest", event.payload),
    ev.RunPaused: lambda event, _: _notice("paused", event.reason),
    ev.RunResumed: lambda event, _: _notice("resumed", ""),
}
"""By the kind of the event: what it has; others have nothing."""


def current_for(state: State, peer: str, *, finished: bool) -> list[Push]:
    """Whatever a peer that has just joined has to know, in an order in which it can be taken."""
    to, attempt, lease = (peer,), state.round.attempt, state.members[peer].lease
    told = [Push(to, "Welcome", _welcome(state, peer))]
    if state.head is not None:
        told.append(Push(to, "VersionManifest", state.head.payload))
    if lease is not None:
        told.append(Push(to, "Lease", state.leases[lease].payload))
    if (early := state.ahead.holders.get(peer)) is not None:
        told.append(Push(to, "Lease", state.ahead.leases[early].payload))
    if attempt is not None and peer in attempt.roster:
        told.append(Push(to, "RoundPlan", attempt.payload))
        if attempt.seal is not None:
            told.append(Push(to, "Seal", attempt.seal_payload))
        if attempt.drawn:
            told.append(_seed_push(state, to))
    if state.paused:
        told.append(_notice("paused", "", to))
    if finished:
        told.append(finished_push(state, to))
    return told


def finished_push(state: State, peers: tuple[str, ...] | None = None) -> Push:
    """The run's end."""
    assert state.phase is Phase.FINISHED
    return _notice("finished", f"version {state.version} was the last; thank you", peers)


def replaced_push(peer: str) -> Push:
    """To the older of a peer's two sessions."""
    return _notice("replaced", "a newer session of the same identity has its place", (peer,))


def _notice(kind: str, text: str, peers: tuple[str, ...] | None = None) -> Push:
    return Push(peers, "Notice", pb.Notice(kind=kind, text=text).SerializeToString(deterministic=True))


def state_holders(state: State, version: int) -> list[str]:
    """Connected peers that hold this version or a newer one, those at exactly this version first."""
    having = [(peer, state.members[peer].ready) for peer in state.connected]
    able = sorted((ready - version, peer) for peer, ready in having if ready is not None and ready >= version)
    return [peer for _, peer in able[:MAX_HOLDERS]]


def _draws(event: ev.StepReported, state: State) -> bool:
    """Whether this vote has just made a quorum for spans of which some have to be audited."""
    attempt = state.round.attempt
    if attempt is None or not attempt.drawn or attempt.quorum_at != event.at:
        return False
    winner = attempt.winner()
    return winner is not None and attempt.tally[winner] == attempt.quorum


def _seed_push(state: State, peers: tuple[str, ...]) -> Push:
    attempt = state.round.attempt
    assert attempt is not None
    return Push(peers, "Notice", seed_notice(attempt.seal_digest, attempt.seed))


def _roster(state: State) -> tuple[str, ...]:
    assert state.round.attempt is not None
    return tuple(sorted(state.round.attempt.roster))


def _welcome(state: State, asking: str) -> bytes:
    """The head, and peers that hold it and can be dialled."""
    holding = islice(state.holding if state.head is not None else (), MAX_HOLDERS + 1)
    members, peers = state.members, tuple([peer for peer in holding if peer != asking][:MAX_HOLDERS])
    return _welcome_to(max(state.version, 0), peers, tuple([members[peer].addresses for peer in peers]))


@lru_cache(maxsize=8)
def _welcome_to(head: int, peers: tuple[str, ...], addresses: tuple[tuple[str, ...], ...]) -> bytes:
    """Made once for all that join while these are the first holders."""
    return b"".join([pb.Welcome(head=head).SerializeToString(deterministic=True), *map(_holder, peers, addresses)])


@lru_cache(maxsize=1 << 12)
def _holder(peer: str, addresses: tuple[str, ...]) -> bytes:
    """A Welcome with nothing but this holder: messages of a type that follow one another are read as one."""
    endpoint = pb.Endpoint(peer=peer, addresses=addresses)
    return pb.Welcome(holders=[endpoint]).SerializeToString(deterministic=True)
