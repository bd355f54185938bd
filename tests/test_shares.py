"""Shares of the reducers from measured rates, and the rates from what others saw."""

from itertools import product
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machine import Machine

from hivegrpo.coordinator.rates import FOLLOW, MIN_BYTES, MOST_CHANGE, follow, samples
from hivegrpo.coordinator.readings import senders_of, vote_of
from hivegrpo.coordinator.round import Attempt
from hivegrpo.coordinator.shares import NOISE, _told_apart, shares, spans
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import SPAN_FRAME_BYTES, split_evenly

RATES = st.lists(st.one_of(st.none(), st.floats(1e-3, 1e17)), min_size=1, max_size=64)


def told_apart(rates: list[float]) -> list[float]:
    middle = sorted(rates)[(len(rates) - 1) // 2] if rates else 0.0
    return [min(max(middle, rate / NOISE), rate * NOISE) for rate in rates]


def cap(chunks: int, candidates: int) -> int:
    return max(1, 2 * chunks // candidates)


@given(st.integers(1, 1 << 20), RATES, st.integers(0, 3000))
@settings(deadline=None)
def test_shares_cover_all_are_capped_and_grow_with_the_rate(
    chunks: int, rates: list[float | None], others: int
) -> None:
    found = shares(chunks, rates, len(rates) + others)
    assert sum(found) == chunks
    assert all(0 <= share <= max(cap(chunks, len(rates)), -(-chunks // len(rates))) for share in found)
    told = told_apart([rate for rate in rates if rate is not None])
    given_to = [share for rate, share in zip(rates, found, strict=True) if rate is not None]
    known = sorted((rate, -index, share) for index, (rate, share) in enumerate(zip(told, given_to, strict=True)))
    if len(rates) + others > 2:  # with two peers the upload does not depend on the shares
        assert [share for *_, share in known] == sorted(share for *_, share in known)
    assert found == shares(chunks, rates, len(rates) + others)


@given(st.integers(1, 9), st.lists(st.floats(0.1, 100.0), min_size=2, max_size=4), st.integers(1, 3))
@settings(deadline=None)
def test_shares_are_as_good_as_the_best_of_all(chunks: int, rates: list[float], others: int) -> None:
    peers = len(rates) + others
    found = shares(chunks, rates, peers)

    told = told_apart(rates)

    def slowest(sizes: tuple[int, ...]) -> float:
        return max(size / rate for size, rate in zip(sizes, told, strict=True))

    every = product(range(cap(chunks, len(rates)) + 1), repeat=len(rates))
    best = min(slowest(sizes) for sizes in every if sum(sizes) == chunks)
    assert slowest(tuple(found)) <= best * (1 + 1e-12)  # two ways of rounding the same quotient


@given(st.integers(1, 1 << 20), RATES, st.integers(3, 3000))
@settings(deadline=None)
def test_a_search_that_ends_early_finds_what_a_whole_one_does(
    chunks: int, rates: list[float | None], others: int
) -> None:
    found = shares(chunks, rates, len(rates) + others)
    speeds, most = _told_apart(rates), cap(chunks, len(rates))
    early, late = 0.0, max(most / speed for speed in speeds)
    for _ in range(60):
        middle = (early + late) / 2
        fits = sum(min(most, int(middle * speed)) for speed in speeds) <= chunks
        early, late = (middle, late) if fits else (early, middle)
    fitting = [min(most, int(early * speed)) for speed in speeds]
    while sum(fitting) < chunks:
        room = [index for index, share in enumerate(fitting) if share < most]
        fitting[min(room, key=lambda index: ((fitting[index] + 1) / speeds[index], index))] += 1
    assert found == fitting


def test_shares_by_hand() -> None:
    assert shares(12, [None, None, None], 3) == [4, 4, 4]
    assert shares(7, [None, None, None], 3) == [3, 2, 2]
    # At rates of 2.25, 2.25 and 1, of which the last is taken for 1.125: 5 / 2.25 = 2.2, and 2 / 1.125 = 1.8.
    assert shares(12, [2.25, 2.25, 1.0], 3) == [5, 5, 2]
    assert shares(12, [2.25, None, 1.0], 3) == [6, 3, 3], "unknown counts as the lower median, 2.25 as 2: 6 / 2, 3 / 1"
    assert shares(12, [9.9, 9.0, 8.1], 3) == [4, 4, 4], "as equal links differ from round to round"
    assert shares(12, [100.0, 1.0, 1.0, 1.0], 4)[0] == 6, "twice the mean, however fast"
    assert shares(3, [1.0, 9.0], 2) == [2, 1], "with two peers the shares do not matter"
    assert spans([2, 0, 3]) == [range(2), range(2, 2), range(2, 5)]


SIZE = 4 * MIN_BYTES


def attempt_of(peers: str, seen: dict[str, float], liars: dict[str, float] | None = None, size: int = SIZE) -> Attempt:
    """All are reducers of spans of the same size, and see the rates `seen`, bytes a second; liars, their own figure."""
    spread = [pb.Reducer(peer=peer, first=index, chunks=1) for index, peer in enumerate(peers)]
    attempt = Attempt(pb.RoundPlan(reducers=spread), b"", b"", 0.0, frozenset(peers))

    def seconds(observer: str, peer: str, timed: int) -> float:
        if observer == peer and observer not in (liars or {}):
            return 0.0  # nothing is sent; a liar says otherwise
        return (len(peers) - 1) * timed / (liars or {}).get(observer, seen[peer])

    for observer in peers:
        pushed = [pb.Complete(peer=peer, seconds=seconds(observer, peer, size)) for peer in peers]
        attempt.take_report(observer, senders_of(pb.SenderReport(complete=pushed).SerializeToString()))
        vote = pb.StepReport(
            spans=[pb.Blob(root=b"r", size=size) for _ in peers],
            seconds=[seconds(observer, peer, size - SPAN_FRAME_BYTES) for peer in peers],
        )
        attempt.vote(observer, vote_of(vote.SerializeToString()), 0.0)
    return attempt


def test_a_rate_is_what_all_uploads_of_a_peer_came_to() -> None:
    seen = {"a": 1e6, "b": 2e6, "c": 4e6, "d": 8e6}
    assert samples(attempt_of("abcd", seen)) == pytest.approx(seen)
    assert samples(attempt_of("abcd", seen, size=MIN_BYTES - 1)) == {}, "too little to say anything"
    assert samples(attempt_of("abcd", seen, liars={"a": 1e12})) == pytest.approx(seen), "no liar's word"
    humble = samples(attempt_of("ab", {"a": 1e6, "b": 2e6}, liars={"a": 1.0}))
    assert humble == pytest.approx({"a": 1e6, "b": 1.0}), "nobody's own word; of two, one has to believe the other"


@given(
    st.lists(st.floats(1e4, 1e9), min_size=7, max_size=7),
    st.lists(st.one_of(st.floats(1e-3, 1e2), st.floats(1e10, 1e15)), min_size=2, max_size=2),
)
def test_a_minority_of_liars_moves_no_sample_out_of_what_the_honest_saw(rates: list[float], lies: list[float]) -> None:
    seen = dict(zip("abcdefg", rates, strict=True))
    found = samples(attempt_of("abcdefg", seen, liars=dict(zip("ag", lies, strict=True))))
    assert found == pytest.approx(seen)


def test_no_report_makes_a_rate_that_cannot_be_computed_with() -> None:
    attempt = attempt_of("ab", {"a": 1e6, "b": 2e6})
    attempt.pushes["a"]["b"] = attempt.pushes["b"]["a"] = 5e-324
    attempt.fetches["a"], attempt.fetches["b"] = (0.0, 5e-324), (5e-324, 0.0)
    rates: dict[str, float] = {"a": 1e6}
    for _ in range(60):
        follow(rates, attempt)
        assert sum(shares(64, [*rates.values(), None], 3)) == 64
    assert all(isfinite(rate) and rate > 0.0 for rate in rates.values())


def test_a_rate_follows_slowly_and_never_far_at_once() -> None:
    rates: dict[str, float] = {}
    slow, fast = dict.fromkeys("abc", 1e6), dict.fromkeys("abc", 1e9)
    follow(rates, attempt_of("abc", slow))
    assert rates == pytest.approx(slow), "the first sample is all that is known"
    follow(rates, attempt_of("abc", fast))
    assert rates == pytest.approx(dict.fromkeys("abc", 1e6 + FOLLOW * (MOST_CHANGE - 1.0) * 1e6))
    for _ in range(60):
        follow(rates, attempt_of("abc", fast))
    assert rates == pytest.approx(fast, rel=1e-6)


def test_a_plan_gives_the_fast_more_and_the_slow_nothing() -> None:
    machine = Machine(peers=4, run={"start_peers": 4}, grpo={"prompts_per_round": 12})
    machine.start()
    machine.contribute(*machine.peers)
    assert [reducer.chunks for reducer in machine.plan.reducers] == [1, 1, 1], "three chunks"
    machine.exchange()
    slowest = machine.peers[0]
    report = machine.step_report()
    for blob in report.spans:
        blob.size = SIZE
    reducers = [reducer.peer for reducer in machine.plan.reducers]
    for peer in machine.peers:
        del report.seconds[:]
        report.seconds.extend(0.0 if peer == other else 9.0 if other == slowest else 1.0 for other in reducers)
        assert machine.report(peer, report).accepted
    machine.contribute(*machine.peers)
    assert [reducer.peer for reducer in machine.plan.reducers] == machine.peers[1:], "nobody waits for it"
    assert machine.state.rates[slowest] < machine.state.rates[machine.peers[1]]
    machine.check_replay()


def test_without_measurements_the_split_is_even() -> None:
    for chunks, parts in product(range(1, 30), range(1, 7)):
        sizes = shares(chunks, [None] * parts, parts + 1)
        assert sizes == [len(span) for span in split_evenly(chunks, parts)]
