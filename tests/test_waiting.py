"""How long a round can wait: the bound of docs/operations.md, against peers that do the worst at random."""

import random
from contextlib import closing
from pathlib import Path

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import EventLog
from hivegrpo.coordinator.round import EXTRA_SECONDS, LAST_VOTES_SECONDS
from hivegrpo.coordinator.state import Phase
from hivegrpo.protocol.config import TimingSection
from hivegrpo.protocol.invariants import check


def longest(timing: TimingSection) -> float:
    """Seconds from a round's first contribution to its commit, or until it is given up."""
    attempt = timing.grace + timing.exchange + EXTRA_SECONDS + timing.step + EXTRA_SECONDS + LAST_VOTES_SECONDS
    return timing.lease + timing.max_attempts * attempt


def rounds(machine: Machine) -> list[float]:
    """How long each round took that has ended: from its first contribution."""
    lengths, began = [], None
    for event in machine.events:
        match event:
            case ev.ContributionReceived(at=at) if began is None:
                began = at
            case ev.VersionCommitted(at=at) | ev.RoundAbandoned(at=at) | ev.RoundEmpty(at=at) if began is not None:
                lengths.append(at - began)
                began = None
            case _:
                pass
    if began is not None:
        lengths.append(machine.now - began)
    return lengths


def test_a_round_in_which_everyone_is_as_late_as_can_be() -> None:
    machine = Machine()
    first, second, third = machine.peers
    machine.start()
    machine.contribute(first)
    machine.wait(59.9)
    machine.contribute(second, third)
    while machine.state.phase is not Phase.ROLLOUT:
        machine.lose(third)
        machine.wait(4.9)
        machine.join(third)
        machine.wait(7.0)
        machine.exchange()
        machine.wait(22.0)
    (took,) = rounds(machine)
    assert len(machine.of(ev.RoundAbandoned)) == 1
    bound = longest(machine.config.timing)
    assert bound == 60 + 3 * (5 + 12 + 22 + 0.5)
    assert 0.85 * bound < took <= bound, "the bound is not much more than what can happen"


@pytest.mark.parametrize("seed", range(20))
def test_no_behaviour_of_the_peers_makes_a_round_longer_or_loses_a_contribution(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    attempts = chance.randint(1, 4)
    machine = Machine(peers=5, run={"start_peers": 3, "versions": 1000}, timing={"max_attempts": attempts})
    machine.start()
    for _ in range(300):
        act(machine, chance)
    healed, version = machine.now, machine.state.version
    while machine.state.version == version:
        behave(machine)
    # The round in flight, which some may have spoilt for good, and another one.
    assert machine.now - healed <= 2 * longest(machine.config.timing)
    assert max(rounds(machine)) <= longest(machine.config.timing) + 1e-6  # sums of floats
    machine.check_replay()
    with closing(EventLog(tmp_path / "events.sqlite", machine.run_id)) as log:
        log.append(machine.events)
        assert check(read_records(log), {}) == []


def act(machine: Machine, chance: random.Random) -> None:
    """One thing that a peer does or fails to do, or some time that passes."""
    peer = chance.choice(machine.peers)
    member, attempt, phase = machine.state.members[peer], machine.state.round.attempt, machine.state.phase
    match chance.choice(("contribute", "report", "report", "vote", "vote", "away", "back", "back", "wait", "due")):
        case "contribute" if member.lease is not None and member.connected:
            machine.contribute(peer)
        case "report" if phase is Phase.EXCHANGE and attempt and may_report(machine, peer):
            complete = machine.peers if chance.random() < 0.7 else chance.sample(machine.peers, 3)
            machine.senders(peer, *(sender for sender in complete if sender in attempt.roster))
        case "vote" if phase is Phase.STEP and attempt and peer in attempt.roster and peer not in attempt.votes:
            machine.vote(peer, root=None if chance.random() < 0.8 else bytes([chance.randrange(256)]) * 32)
        case "away" if member.connected:
            machine.lose(peer)
        case "back" if not member.connected or member.lease is None:
            come_back(machine, peer)
        case "wait":
            machine.wait(chance.uniform(0.0, 3.0))
        case "due":
            wait_for_what_is_due(machine)


def behave(machine: Machine) -> None:
    """Everybody does what there is to do; then time passes."""
    for peer in machine.peers:
        if not machine.state.members[peer].connected or machine.state.members[peer].lease is None:
            come_back(machine, peer)
        if machine.state.members[peer].lease is not None:
            machine.contribute(peer)
    for peer in machine.peers:
        if machine.state.phase is Phase.EXCHANGE and may_report(machine, peer):
            machine.senders(peer, *(contributor.peer for contributor in machine.plan.contributors))
    for peer in machine.peers:
        attempt = machine.state.round.attempt
        if machine.state.phase is Phase.STEP and attempt and peer in attempt.roster and peer not in attempt.votes:
            machine.vote(peer)
    wait_for_what_is_due(machine)


def may_report(machine: Machine, peer: str) -> bool:
    attempt = machine.state.round.attempt
    assert attempt is not None
    return peer not in attempt.reports and any(reducer.peer == peer for reducer in attempt.plan.reducers)


def come_back(machine: Machine, peer: str) -> None:
    machine.join(peer)
    assert machine.state.head is not None
    machine.ready(peer, version=machine.state.version, root=machine.state.head.manifest.state.root)


def wait_for_what_is_due(machine: Machine) -> None:
    wake = decide(machine.state, machine.now).wake
    machine.wait(wake - machine.now if wake is not None else 0.0)
