"""A span that is sent while it is made."""

import asyncio

from hivegrpo.peer.swarm.making import SpanInMaking, frame_sizes, split_frames
from hivegrpo.protocol.chunks import SPAN_FRAME_BYTES


def test_frames_are_there_as_soon_as_they_are_whole_and_all_readers_have_all() -> None:
    data = bytes(range(256)) * (3 * SPAN_FRAME_BYTES // 256) + b"the rest"

    async def scenario() -> None:
        making = SpanInMaking()
        early = making.frames()
        first = asyncio.ensure_future(anext(early))
        await asyncio.to_thread(making.add, data[: SPAN_FRAME_BYTES + 5])
        assert await first == data[:SPAN_FRAME_BYTES], "before the span is whole"
        await asyncio.to_thread(making.add, data[SPAN_FRAME_BYTES + 5 :])
        making.end()
        rest = [frame async for frame in early]
        late = [frame async for frame in making.frames()]
        frames = list(split_frames(data))
        assert late == [data[:SPAN_FRAME_BYTES], *rest] == frames[:3], "what is no whole frame is not here"

    asyncio.run(asyncio.wait_for(scenario(), 20.0))
    assert frame_sizes(len(data)) == list(map(len, split_frames(data)))


def test_readers_end_with_a_span_that_is_given_up() -> None:
    async def scenario() -> None:
        making = SpanInMaking()
        reading = asyncio.ensure_future(anext(making.frames(), None))
        await asyncio.sleep(0)
        making.end()
        assert await reading is None

    asyncio.run(asyncio.wait_for(scenario(), 20.0))
