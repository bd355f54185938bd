"""Pauses and bans, in the pure machine; and one identity in one place, in a swarm."""

import asyncio
from pathlib import Path

import pytest
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.service import FOLLOW
from hivegrpo.coordinator.state import Phase
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import PROTOCOL, sign
from hivegrpo.protocol.errors import BusyError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check

VALUES = 40_000


def leased(machine: Machine) -> int:
    return len(machine.of(ev.LeaseGranted))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_that_a_pause_meets_ends_and_no_lease_follows(overlap: bool) -> None:
    machine = Machine(averaging={"overlap": overlap})
    machine.start()
    granted = leased(machine)
    machine.happen(ev.RunPaused(machine.now, ""))
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(*machine.peers)
    assert machine.manifest.version == 1
    machine.wait(1000.0)
    assert leased(machine) == granted
    machine.happen(ev.RunResumed(machine.now))
    assert leased(machine) == granted + len(machine.peers)
    machine.check_replay()


def test_a_round_that_a_pause_cuts_short_is_made_of_what_there_is() -> None:
    machine = Machine()
    machine.start()
    machine.happen(ev.RunPaused(machine.now, ""))
    machine.contribute(machine.peers[0])
    machine.wait(60.0)
    assert machine.state.phase is Phase.EXCHANGE
    assert [contributor.peer for contributor in machine.plan.contributors] == [machine.peers[0]]
    machine.check_replay()


def between_iterations() -> Machine:
    """Paused between two iterations on one rollout."""
    machine = Machine(grpo={"num_iterations": 2})
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.happen(ev.RunPaused(machine.now, ""))
    machine.vote(*machine.peers)
    return machine


def test_a_pause_between_two_iterations_keeps_the_rollout() -> None:
    machine = between_iterations()
    granted = leased(machine)
    machine.wait(1000.0)
    assert (leased(machine), machine.of(ev.RoundAbandoned)) == (granted, [])
    machine.happen(ev.RunResumed(machine.now))
    assert {machine.lease(peer).iteration for peer in machine.peers} == {1}
    machine.check_replay()


def test_who_leaves_in_a_pause_between_two_iterations_is_waited_for_no_longer_than_others() -> None:
    machine = between_iterations()
    gone, *others = machine.peers
    machine.lose(gone)
    machine.happen(ev.RunResumed(machine.now))
    machine.contribute(*others)
    machine.wait(machine.config.timing.grace)
    assert machine.state.phase is Phase.EXCHANGE
    machine.check_replay()


def test_a_ban_ends_when_its_time_is_over_and_not_before() -> None:
    machine = Machine()
    machine.start()
    peer = machine.peers[0]
    machine.happen(ev.PeerBanned(machine.now, peer, "it is broken", until=machine.now + 3600.0))
    assert machine.of(ev.LeaseExpired)[-1].reason == "its peer was banned: it is broken"
    machine.wait(3599.0)
    assert peer in machine.state.banned
    machine.wait(1.0)
    assert machine.of(ev.BanLifted) == [ev.BanLifted(machine.now, peer, "its time is over")]
    machine.join(peer)
    assert machine.state.members[peer].connected
    machine.check_replay()


def test_a_newer_ban_takes_the_place_of_the_older_one_s_time() -> None:
    machine = Machine()
    peer = machine.peers[0]
    machine.happen(ev.PeerBanned(machine.now, peer, "a hunch", until=machine.now + 3600.0))
    assert decide(machine.state, machine.now).wake == machine.now + 3600.0
    machine.happen(ev.PeerBanned(machine.now, peer, "it lied", b"p" * 32, 9))
    assert decide(machine.state, machine.now).wake is None
    machine.wait(4000.0)
    assert machine.state.banned[peer].proved
    machine.check_replay()


def test_the_checker_knows_bans_that_are_ordered_from_bans_that_are_not() -> None:
    ordered = {"kind": "banned", "peer": "ann", "reason": "x", "until": None, "proof": None}
    proved = ordered | {"proof": {"root": "00", "size": 1}}
    lifted = {"kind": "ban_lifted", "peer": "ann", "reason": "x"}
    plan = {"kind": "plan", "digest": "d", "version": 1, "contributors": [{"peer": "ann"}]}
    run = {"kind": "run", "run_id": "r"}

    def broken(*records: dict[str, object]) -> list[int]:
        found = check([run, *records], {}, judge=lambda root, size: [])
        return [violation.invariant for violation in found]

    assert broken(ordered) == []
    assert broken(ordered, lifted, plan) == []
    assert broken(ordered, plan) == [6], "it takes part all the same"
    assert broken(proved) == [6], "the blob shows nothing"
    assert broken(proved, lifted) == [6]
    assert broken(ordered, proved) == [6]


def test_an_identity_that_joins_from_elsewhere_ends_where_it_was(tmp_path: Path) -> None:
    config = small_config(run={"start_peers": 2})
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)

    async def scenario() -> None:
        async with asyncio.timeout(30):
            await swarm.start_coordinator()
            first = await swarm.start_peer("here", IntegerLearner(VALUES))
            await swarm.happened(lambda event: isinstance(event, ev.PeerReady))
            join = pb.Join(protocol=PROTOCOL, known_answer=bytes.fromhex(check_numerics()))
            async with await first.transport.open_stream(coordinator.peer_id, FOLLOW) as elsewhere:
                await elsewhere.send(sign(first.identity, swarm.run_id, join).SerializeToString())
                with pytest.raises(BusyError, match="joined the run from elsewhere"):
                    await first.task
            assert swarm.coordinator is not None
            await swarm.coordinator.leave()

    asyncio.run(scenario())
