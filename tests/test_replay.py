"""The averaged gradient, while its spans come."""

import pytest
import torch

from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import encode_vector
from hivegrpo.peer.swarm.replay import AveragedGradient
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import CommitmentError

VALUES = 3 * CHUNK_VALUES + 100
REDUCERS = [pb.Reducer(first=first, chunks=chunks) for first, chunks in ((0, 1), (1, 2), (3, 1))]
PLAN = pb.RoundPlan(codec="fp32", values=VALUES, reducers=REDUCERS)
VECTOR = torch.arange(VALUES, dtype=torch.float32)
CHUNKS = encode_vector(get_codec("fp32"), VECTOR)
SPANS = [CHUNKS[0], CHUNKS[1] + CHUNKS[2], CHUNKS[3]]


@pytest.mark.parametrize("order", [(), (0,), (2, 1), (1, 2, 0), (1, 1)])
def test_spans_are_decoded_as_they_come_in_any_order(order: tuple[int, ...]) -> None:
    gradient = AveragedGradient(PLAN)
    for index in order:
        gradient.add(index, SPANS[index])
    assert torch.equal(gradient.take(SPANS), VECTOR)


def test_what_was_added_is_not_decoded_again_and_what_was_taken_is_gone() -> None:
    gradient = AveragedGradient(PLAN)
    gradient.add(1, SPANS[1])
    other = [bytes(len(span)) for span in SPANS]
    taken = gradient.take(other)
    assert torch.equal(taken[CHUNK_VALUES : 3 * CHUNK_VALUES], VECTOR[CHUNK_VALUES : 3 * CHUNK_VALUES])
    assert not taken[:CHUNK_VALUES].any()
    assert not gradient.take(other).any()


@pytest.mark.parametrize(
    "span", [SPANS[0][:-4], SPANS[0] + bytes(4), torch.full((CHUNK_VALUES,), torch.inf).numpy().tobytes()]
)
def test_a_span_that_the_codec_does_not_make_is_refused_and_may_come_again(span: bytes) -> None:
    gradient = AveragedGradient(PLAN)
    with pytest.raises(CommitmentError):
        gradient.add(0, span)
    with pytest.raises(CommitmentError):
        gradient.take([span, *SPANS[1:]])
    assert torch.equal(gradient.take(SPANS), VECTOR)
