"""Who spoiled attempts is remembered, and a contribution is not lost to one liar."""

from collections.abc import Iterator

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.standing import MOST_DOUBLINGS, Record, Standing, withholders
from hivegrpo.coordinator.state import Phase


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(peers=4, run={"start_peers": 4, "versions": 100}, grpo={"prompts_per_round": 12})
    machine.start()
    machine.contribute(*machine.peers)
    yield machine
    machine.check_replay()


def reducers(machine: Machine) -> list[str]:
    return [reducer.peer for reducer in machine.plan.reducers]


def contributors(machine: Machine) -> list[str]:
    return [contributor.peer for contributor in machine.manifest.contributors]


def finish(machine: Machine) -> None:
    machine.exchange()
    machine.vote(*machine.peers)


def report_all_but(machine: Machine, lacking: dict[str, str]) -> None:
    """Every reducer reports all senders but the one that it is said to lack."""
    for reducer in reducers(machine):
        machine.senders(reducer, *(peer for peer in machine.peers if peer != lacking.get(reducer)))


def test_charges_double_the_time_and_go_one_by_one() -> None:
    standing = Standing()
    standing.charge(["a"], 10)
    assert standing.records == {"a": Record(1, 13)}
    assert [standing.is_good("a", version) for version in (10, 11, 12, 13)] == [False, False, False, True]
    standing.credit(["a", "b"], 12)
    assert standing.charges("a") == 1, "not before its time is over"
    standing.charge(["a"], 13)
    assert standing.records == {"a": Record(2, 18)}
    standing.credit(["a"], 18)
    assert standing.charges("a") == 1
    assert standing.is_good("a", 19)
    standing.credit(["a"], 19)
    assert standing.records == {}
    for _ in range(99):
        standing.charge(["a"], 0)
    assert standing.records["a"].until == 1 + 2**MOST_DOUBLINGS
    assert standing.preferred(["a", "b"], 5) == ["b"]
    assert standing.preferred(["a"], 5) == ["a"], "somebody has to"
    standing.charge(["b"], 5)
    assert standing.preferred(["a", "b"], 5) == ["b"], "the one with fewer charges"


def test_a_spoiler_is_not_in_the_next_versions_first_attempts(machine: Machine) -> None:
    spoiler = reducers(machine)[0]
    attempts = 0
    while machine.state.version < 40:
        if spoiler in reducers(machine):
            attempts += 1
            machine.exchange(spoiler)
            machine.wait(13)
            assert spoiler not in reducers(machine)
            machine.exchange()
            machine.vote(*(peer for peer in machine.peers if peer != spoiler))
            machine.wait(1)
            machine.ready(spoiler, version=machine.state.version, root=machine.manifest.state.root)
        else:
            finish(machine)
        machine.contribute(*(peer for peer in machine.peers if machine.state.members[peer].lease))
    assert attempts <= 40 / 4 + 1, "at most every fourth version: two without the job, one to earn it back"


def test_who_spoils_again_and_again_gets_ever_fewer_chances() -> None:
    standing, spoiled = Standing(), []
    for version in range(1, 200):
        if standing.is_good("a", version):
            standing.charge(["a"], version)
            spoiled.append(version)
        else:
            standing.credit(["a"], version)
    assert spoiled == [1, 4, 9, 18, 35, 68, 133, 198]


def test_a_sender_that_one_reducer_lacks_is_not_lost_to_it(machine: Machine) -> None:
    denier, victim = reducers(machine)[1], machine.peers[0]
    report_all_but(machine, {denier: victim})
    (failed,) = machine.of(ev.AttemptFailed)
    assert (failed.culprits, failed.disputed) == ((denier,), (victim,))
    assert machine.plan.attempt == 2
    assert denier not in reducers(machine)
    finish(machine)
    assert contributors(machine) == machine.peers
    assert machine.of(ev.ContributionRejected) == []


def test_a_sender_that_leaves_out_one_reducer_after_the_other_gets_one_repeat(machine: Machine) -> None:
    culprit = machine.peers[0]
    report_all_but(machine, {reducers(machine)[1]: culprit})
    report_all_but(machine, {reducers(machine)[0]: culprit})
    assert machine.state.phase is Phase.STEP, "sealed without it"
    machine.vote(*machine.peers)
    assert contributors(machine) == machine.peers[1:]
    machine.contribute(*machine.peers)
    fresh = next(peer for peer in reducers(machine) if not machine.state.standing.charges(peer))
    report_all_but(machine, {fresh: culprit})
    assert machine.state.phase is Phase.STEP, "it has more charges than the reducer: no repeat"
    assert len(machine.of(ev.AttemptFailed)) == 1


def test_of_two_reducers_that_lack_different_senders_both_lose_the_job(machine: Machine) -> None:
    first, second, third = reducers(machine)
    report_all_but(machine, {first: second, second: first})
    assert first not in reducers(machine)
    assert second not in reducers(machine)
    assert third in reducers(machine)
    finish(machine)
    assert contributors(machine) == machine.peers


def test_there_is_one_repeat_a_round_whoever_is_lacking(machine: Machine) -> None:
    report_all_but(machine, {reducers(machine)[1]: machine.peers[0]})
    first, second = reducers(machine)
    report_all_but(machine, {first: second})
    assert machine.state.phase is Phase.STEP, "sealed without it"
    assert len(machine.of(ev.AttemptFailed)) == 1


def test_a_sender_that_most_lack_is_left_out_at_once(machine: Machine) -> None:
    first, second, third = reducers(machine)
    other = next(peer for peer in machine.peers if peer not in (first, second, third))
    report_all_but(machine, {first: other, second: other})
    assert machine.state.phase is Phase.STEP
    machine.vote(*machine.peers)
    assert other not in contributors(machine)
    assert machine.state.standing.charges(other) == 1


def test_whoever_votes_otherwise_than_what_is_committed_is_charged(machine: Machine) -> None:
    early, late, *honest = machine.peers
    machine.exchange()
    wrong = machine.step_report(b"x" * 32)
    machine.report(early, wrong)
    machine.vote(*honest, machine.peers[1])
    assert machine.state.version == 1
    assert {peer: machine.state.standing.charges(peer) for peer in machine.peers if peer} == {
        early: 1,
        late: 0,
        **dict.fromkeys(honest, 0),
    }


def test_a_late_wrong_vote_is_charged_too(machine: Machine) -> None:
    late, *others = machine.peers
    machine.exchange()
    wrong = machine.step_report(b"x" * 32)
    machine.vote(*others)
    machine.wait(1)
    assert machine.state.version == 1
    assert machine.report(late, wrong).accepted
    assert machine.state.standing.charges(late) == 1


def test_a_reducer_that_keeps_its_span_is_the_one_whose_span_nobody_else_had(machine: Machine) -> None:
    keeper = reducers(machine)[0]
    machine.exchange()
    machine.vote(keeper)  # it has all: its own, and the others'
    machine.wait(22)
    (failed,) = machine.of(ev.AttemptFailed)
    assert failed.culprits == (keeper,)
    assert keeper not in reducers(machine)
    finish(machine)
    assert contributors(machine) == machine.peers


def test_without_votes_any_reducer_may_have_kept_its_span(machine: Machine) -> None:
    attempt = machine.state.round.attempt
    assert attempt is not None
    first, second, third = reducers(machine)
    assert withholders(attempt) == [first, second, third]
    machine.exchange()
    machine.vote(first, second)
    assert withholders(attempt) == sorted({*machine.peers} - {first, second})
