"""Reports that are read and checked once: they say what their bytes say, and no check is left out."""

import pytest

from hivegrpo.coordinator.readings import (
    check_senders,
    check_vote,
    contribution_of,
    reducers_of,
    senders_of,
    vote_of,
)
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.errors import FrameError

SENDERS = pb.SenderReport(
    plan=b"p" * 32,
    complete=[
        pb.Complete(peer="a", norm_squared=b"\x01\x00", seconds=1.5),
        pb.Complete(peer="b", norm_squared=b"", seconds=0.0),
    ],
    refused=[pb.Refused(peer="c", reason="too large")],
)

VOTE = pb.StepReport(
    version=3,
    plan=b"p" * 32,
    seal=b"s" * 32,
    spans=[pb.Blob(root=b"x" * 32, size=7), pb.Blob(root=b"y" * 32, size=9)],
    state_root=b"r" * 32,
    receipts=[b"1" * 64, b"2" * 64],
    seconds=[0.5, 0.0],
    dots=[1.0],
)


def plan(reducers: int) -> bytes:
    peers = [f"peer {index}" for index in range(reducers)]
    return pb.RoundPlan(
        contributors=[pb.Contributor(peer=peer) for peer in peers], reducers=[pb.Reducer(peer=peer) for peer in peers]
    ).SerializeToString()


def test_a_reducers_report_is_read() -> None:
    said = senders_of(SENDERS.SerializeToString())
    assert (said.plan, said.norms, said.seconds) == (b"p" * 32, {"a": 256, "b": 0}, {"a": 1.5, "b": 0.0})
    assert said.refused == {"c": "too large"}


def test_a_contribution_and_a_plans_reducers_are_read() -> None:
    said = pb.Contribution(lease=3, used=[0, 2], weight=7, metrics={"reward": 0.5})
    assert contribution_of(said.SerializeToString()) == said
    assert reducers_of(plan(3)) == ("peer 0", "peer 1", "peer 2")


def test_a_vote_is_read() -> None:
    vote = vote_of(VOTE.SerializeToString())
    assert (vote.version, vote.plan, vote.seal) == (3, b"p" * 32, b"s" * 32)
    assert vote.ballot == (b"r" * 32, ((b"x" * 32, 7), (b"y" * 32, 9)))
    assert (vote.receipts, vote.seconds, vote.dots) == ((b"1" * 64, b"2" * 64), (0.5, 0.0), (1.0,))


def test_the_same_bytes_are_checked_anew_for_another_roster_or_plan() -> None:
    senders, vote = SENDERS.SerializeToString(), VOTE.SerializeToString()
    check_senders(senders, frozenset("abc"))
    check_vote(vote, plan(2))
    with pytest.raises(FrameError, match="not in the plan's roster"):
        check_senders(senders, frozenset("ac"))
    with pytest.raises(FrameError, match="2 spans for 3 reducers"):
        check_vote(vote, plan(3))


def test_what_makes_no_sense_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(FrameError, match="Contribution"):
            contribution_of(b"\xff")
        with pytest.raises(FrameError, match="SenderReport"):
            senders_of(b"\xff")
        with pytest.raises(FrameError, match="StepReport"):
            vote_of(b"\xff")
        with pytest.raises(FrameError, match="roster"):
            check_senders(SENDERS.SerializeToString(), frozenset("a"))
