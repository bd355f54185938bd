"""Shares of a round by the speeds that the coordinator saw."""

from collections.abc import Iterator

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.planning import LARGEST_ROSTER
from hivegrpo.coordinator.speeds import EVEN, FASTEST, SLOWEST, Pacing, Waiting, even_share, observe, share_of
from hivegrpo.protocol import hivegrpo_pb2 as pb

GROUPS = 96


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(grpo={"prompts_per_round": GROUPS}, run={"versions": 50})
    yield machine
    machine.check_replay()


def work(machine: Machine, speeds: dict[str, float]) -> float:
    """One round in which peers work at these speeds, groups a second; the seconds that it took."""
    began = machine.now
    ends = {peer: began + machine.lease(peer).wanted / speeds[peer] for peer in machine.peers}
    for peer, end in sorted(ends.items(), key=lambda item: item[1]):
        machine.wait(end - machine.now)
        machine.contribute(peer)
    machine.exchange()
    machine.vote(*machine.peers)
    return max(ends.values()) - began


def test_shares_follow_the_speeds_and_the_round_gets_shorter(machine: Machine) -> None:
    slow, middle, fast = machine.peers
    speeds = {slow: 1.0, middle: 1.5, fast: 2.5}
    machine.start()
    assert [machine.lease(peer).wanted for peer in machine.peers] == [32, 32, 32], "nothing is known yet"
    took = [work(machine, speeds) for _ in range(12)]
    assert took[0] == pytest.approx(32.0)  # 32 groups of the slowest
    assert took[-1] == pytest.approx(GROUPS / 5.0, rel=0.07)  # all end together, up to whole groups and the bounds
    shares = [machine.lease(peer).wanted for peer in machine.peers]
    assert shares[0] < shares[1] < shares[2]
    assert sum(shares) == GROUPS


def test_nobody_gets_less_than_half_or_more_than_twice_an_even_share(machine: Machine) -> None:
    slow, middle, fast = machine.peers
    machine.start()
    for _ in range(10):
        work(machine, {slow: 0.6, middle: 2.0, fast: 5000.0})
    # Paces 32, 64 and 128: by them alone the slow one would get 96 x 32 / 224 = 14.
    assert machine.lease(slow).wanted == 16
    assert 2 * machine.lease(middle).wanted == pytest.approx(machine.lease(fast).wanted, abs=2)


def test_a_fresh_peer_gets_an_even_share() -> None:
    machine = Machine(peers=4, grpo={"prompts_per_round": GROUPS}, run={"versions": 50, "start_peers": 3})
    *known, fresh = machine.peers
    machine.join(*known)
    machine.ready(*known)
    machine.peers = known
    for _ in range(8):
        work(machine, dict(zip(known, (1.0, 1.5, 2.5), strict=True)))
    machine.join(fresh)
    work(machine, dict(zip(known, (1.0, 1.5, 2.5), strict=True)))
    machine.ready(fresh, version=machine.state.version, root=machine.manifest.state.root)
    shares = {peer: machine.lease(peer).wanted for peer in (*known, fresh)}
    assert shares[fresh] == pytest.approx(GROUPS // 4, abs=2)  # the others are rounded up
    assert shares[known[0]] < shares[known[1]] < shares[known[2]]
    machine.check_replay()


def test_what_a_peer_says_of_its_speed_counts_for_nothing(machine: Machine) -> None:
    machine.start()
    for boaster in machine.peers:
        machine.wait(5.0)
        contribution = machine.contribution(boaster)
        contribution.metrics["tokens_per_second"] = 1e9
        assert machine.report(boaster, contribution).accepted
    assert machine.state.speeds == {
        peer: pytest.approx(32 / seconds) for peer, seconds in zip(machine.peers, (5.0, 10.0, 15.0), strict=True)
    }


def test_a_lease_that_expires_under_a_connected_peer_shows_that_it_is_slower(machine: Machine) -> None:
    slow, lost, busy = machine.peers
    machine.start()
    machine.happen(ev.PeerDisconnected(machine.now, lost))
    machine.wait(55.0)
    assert lost not in machine.state.speeds, "it was away"
    machine.contribute(busy)
    machine.wait(5.0)
    assert machine.state.speeds == {busy: pytest.approx(32 / 55), slow: pytest.approx(32 / 60)}


def test_a_lease_that_is_cut_short_tells_nothing_of_a_peer_that_nobody_knows(machine: Machine) -> None:
    machine.start()
    machine.wait(1.0)
    for lease in list(machine.state.leases):
        machine.happen(ev.LeaseExpired(machine.now, lease, "an order"))
    assert machine.state.speeds == {}


def test_a_restart_tells_nothing_of_speeds(machine: Machine) -> None:
    first, *_ = machine.peers
    machine.start()
    machine.wait(30.0)
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(*machine.peers)
    machine.wait(0.1)
    machine.contribute(first)
    assert machine.state.speeds == {}


def test_the_held_out_measurement_is_not_taken_for_slowness() -> None:
    machine = Machine(grpo={"prompts_per_round": GROUPS}, evaluation={"path": "heldout.jsonl", "every": 1})
    machine.start()
    (measuring,) = [peer for peer in machine.peers if machine.lease(peer).evaluate]
    machine.wait(10.0)
    machine.contribute(*machine.peers)
    assert machine.state.speeds.keys() == set(machine.peers) - {measuring}


def test_later_iterations_say_nothing_of_sampling() -> None:
    machine = Machine(grpo={"prompts_per_round": GROUPS, "num_iterations": 2})
    machine.start()
    work(machine, dict.fromkeys(machine.peers, 4.0))
    before = dict(machine.state.speeds)
    assert all(machine.lease(peer).iteration == 1 for peer in machine.peers)
    machine.wait(0.5)
    for peer in machine.peers:
        contribution = machine.contribution(peer)
        contribution.iteration = 1
        assert machine.report(peer, contribution).accepted
    assert machine.state.speeds == before
    machine.check_replay()


def test_a_round_is_whole_though_more_peers_wait_than_a_plan_has_room_for() -> None:
    machine = Machine(
        peers=0, grpo={"prompts_per_round": 2 * LARGEST_ROSTER}, run={"start_peers": 1}, timing={"lease": 3600.0}
    )
    peers = [f"peer {index:05d}" for index in range(LARGEST_ROSTER + 500)]
    for peer in peers:
        machine.happen(ev.PeerJoined(machine.now, peer, (), "test"), ev.PeerReady(machine.now, peer, 0, b"0" * 32))
        if machine.state.head is not None:
            break
    # The first peer has all of it by now; when it is gone, everybody waits.
    machine.happen(*(ev.PeerJoined(machine.now, peer, (), "test") for peer in peers[1:]))
    ready = [ev.PeerReady(machine.now, peer, 0, b"0" * 32) for peer in peers[1:]]
    machine.happen(*ready, ev.PeerLeft(machine.now, peers[0], "enough"))
    leases = [granted.message for granted in machine.state.leases.values()]
    assert len(leases) == LARGEST_ROSTER
    assert sum(lease.wanted for lease in leases) == 2 * LARGEST_ROSTER


def test_a_share_is_by_pace_and_whole() -> None:
    assert share_of(100, 4, EVEN, 4 * EVEN) == even_share(100, 4) == 25
    assert share_of(100, 4, FASTEST, 2 * FASTEST + 2 * SLOWEST) == 40
    assert share_of(100, 4, SLOWEST, 2 * FASTEST + 2 * SLOWEST) == 13, "half an even share at least"
    assert share_of(100, 4, FASTEST, FASTEST + 3 * SLOWEST) == 50, "twice an even share at most"
    assert share_of(3, 4, FASTEST, 4 * FASTEST) == 1
    assert share_of(2, 2, FASTEST, FASTEST + SLOWEST) == 1, "a group for each of the others"


def test_paces_are_bounded_and_relative_to_the_median() -> None:
    pacing = Pacing.of({"a": 1.0, "b": 2.0, "c": 9.0, "gone": 100.0}, ["a", "b", "c", "fresh"])
    assert (pacing.median, pacing.fresh) == (2.0, 75)  # (32 + 64 + 128) / 3
    assert [pacing.pace(speed) for speed in (0.1, 1.5, 2.0, 3.0, 9.0)] == [SLOWEST, 48, EVEN, 96, FASTEST]
    assert pacing.pace(None) == pacing.fresh
    assert Pacing.of({}, ["fresh"]).pace(5.0) == EVEN


def test_a_sample_moves_a_speed_by_a_bounded_step() -> None:
    speeds = {"a": 1.0}
    observe(speeds, "a", 1000, 0.001)
    assert speeds["a"] == pytest.approx(1.0 + 0.3 * (4.0 - 1.0))
    observe(speeds, "b", 8, 4.0)
    assert speeds["b"] == 2.0
    observe(speeds, "c", 5, 0.0)
    observe(speeds, "d", 0, 5.0)
    assert speeds.keys() == {"a", "b"}


def test_who_waits_is_summed_up_exactly() -> None:
    waiting = Waiting()
    for peer, pace in (("a", 64), ("b", 32), ("a", 128)):
        waiting.add(peer, pace)
    assert (list(waiting.paces), waiting.total, len(waiting)) == (["a", "b"], 160, 2)
    waiting.discard("a")
    waiting.discard("nobody")
    assert (list(waiting.paces), waiting.total) == (["b"], 32)


def test_a_lease_ahead_is_by_pace_too() -> None:
    machine = Machine(grpo={"prompts_per_round": GROUPS}, averaging={"overlap": True, "audit_rate": 0.0})
    slow, _, fast = machine.peers
    machine.start()
    speeds = dict(zip(machine.peers, (1.0, 2.0, 4.0), strict=True))
    work(machine, speeds)
    ends = {peer: machine.now + machine.lease(peer).wanted / speeds[peer] for peer in machine.peers}
    for peer, end in sorted(ends.items(), key=lambda item: item[1]):
        machine.wait(end - machine.now)
        machine.contribute(peer)
    ahead = {granted.message.peer: granted.message for granted in machine.state.ahead.leases.values()}
    assert all(isinstance(lease, pb.Lease) for lease in ahead.values())
    assert ahead[slow].wanted < 32 < ahead[fast].wanted
    machine.check_replay()
