"""How vectors are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.reducer import SpanLayout
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import CHUNK_VALUES, RUN_CHUNKS, equal_parts, runs


@given(lengths=st.lists(st.integers(1, 3), max_size=60), most=st.integers(1, 9))
def test_runs_are_of_equal_chunks_and_none_could_be_longer(lengths: list[int], most: int) -> None:
    found = list(runs(lengths, most))
    assert [index for run in found for index in run] == list(range(len(lengths)))
    for run in found:
        assert 1 <= len(run) <= most
        assert len({lengths[index] for index in run}) == 1
        if run.stop < len(lengths) and len(run) < most:
            assert lengths[run.stop] != lengths[run.start]


@pytest.mark.parametrize("codec", ["fp32", "mxint8"])
def test_a_senders_chunks_travel_eight_to_a_frame(codec: str) -> None:
    plan = pb.RoundPlan(codec=codec, values=20 * CHUNK_VALUES + 7, reducers=[pb.Reducer(first=2, chunks=19)])
    layout = SpanLayout.of(plan, 0)
    size, last = (get_codec(codec).encoded_size(values) for values in (CHUNK_VALUES, 7))
    assert [len(run) for run, _ in layout.frames()] == [RUN_CHUNKS, RUN_CHUNKS, 2, 1]
    chunks = [bytes([index]) * (size if index < 18 else last) for index in range(19)]
    frames = layout.pack(chunks)
    assert [len(frame) for frame in frames] == [8 * size, 8 * size, 2 * size, last]
    assert [length for _, length in layout.frames()] == [8 * size, 8 * size, 2 * size, last]
    cut = [equal_parts(frame, len(run)) for (run, _), frame in zip(layout.frames(), frames, strict=True)]
    assert [chunk for part in cut for chunk in part] == chunks
