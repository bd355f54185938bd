"""Streams in lanes, on the network in memory and on libp2p alike."""

import asyncio
from random import Random

import pytest
from support.beds import MIB, PATIENCE, Bed, on_both_networks, within

from hivegrpo.protocol.errors import RemoteError
from hivegrpo.protocol.transport import striped
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.serving import ServingTransport
from hivegrpo.protocol.transport.striped import LANE, LANE_BYTES, MAX_LANES, StripedStream, hellos, lanes_for

LANES = 5


async def until(told: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE):
        await told.wait()


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive(MIB, PATIENCE))


@on_both_networks
def test_frames_keep_their_order_each_way(bed: Bed) -> None:
    random = Random(7)
    frames = [random.randbytes(random.choice((0, 1, 100, 70_000, 300_000))) for _ in range(40)]

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        async with await client.open_stream(server.peer_id, "echo", lanes=LANES) as stream:
            assert isinstance(stream, StripedStream)
            assert stream.lanes == LANES

            async def read() -> list[bytes]:
                return [await stream.receive(MIB, PATIENCE) for _ in frames]

            reading = asyncio.create_task(read())
            for frame in frames:
                await stream.send(frame, PATIENCE)
            assert await reading == frames
            framing = 4 * len(frames)
            assert stream.bytes_received == framing + sum(map(len, frames))
            assert stream.bytes_sent == stream.bytes_received + LANES * (4 + striped.HELLO_BYTES)

    bed(scenario)


@on_both_networks
def test_every_lane_carries_its_share(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        async with await client.open_stream(server.peer_id, "echo", lanes=LANES) as stream:
            assert isinstance(stream, StripedStream)
            for _ in range(2 * LANES):
                await stream.send(bytes(1000))
                await stream.receive(MIB, PATIENCE)
            assert {lane.bytes_received for lane in stream._lanes} == {2 * (4 + 1000)}

    bed(scenario)


@on_both_networks
def test_a_stream_in_lanes_that_was_given_back_is_taken_again(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        first = await client.open_stream(server.peer_id, "echo", lanes=LANES)
        await first.send(b"one")
        assert await first.receive(MIB, PATIENCE) == b"one"
        await client.give_back(first, "echo")
        again = await client.open_stream(server.peer_id, "echo", lanes=LANES)
        assert again is first
        await again.send(b"two")
        assert await again.receive(MIB, PATIENCE) == b"two"
        await again.close()
        other = await client.open_stream(server.peer_id, "echo", lanes=LANES)
        assert other is not first
        await other.close()

    bed(scenario)


@on_both_networks
def test_all_lanes_end_with_the_stream(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def once(stream: Stream) -> None:
            await stream.receive(MIB, PATIENCE)

        await server.serve_stream("once", once, lanes=True)
        async with await client.open_stream(server.peer_id, "once", lanes=LANES) as stream:
            await stream.send(b"that is all")
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(MIB, PATIENCE)
        await within(lambda: not (server._served or server._streams))
        assert server.rejected == {}

    bed(scenario)


@on_both_networks
def test_a_send_that_is_cancelled_ends_every_lane(bed: Bed) -> None:
    """Whether that frame has left, nobody can tell: after it the turns could differ."""

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        taken, told = asyncio.Event(), asyncio.Event()

        async def ignore(stream: Stream) -> None:
            taken.set()
            await until(told)

        await server.serve_stream("ignore", ignore, lanes=True)
        stream = await client.open_stream(server.peer_id, "ignore", lanes=2)
        assert isinstance(stream, StripedStream)
        await until(taken)

        async def flood() -> None:
            while True:
                await stream.send(bytes(MIB), None)

        sending = asyncio.create_task(flood())
        await asyncio.sleep(0.3)
        sending.cancel()
        await asyncio.wait([sending])
        assert not stream.usable
        assert not client._streams
        with pytest.raises(RemoteError):
            await stream.send(b"more")
        told.set()

    bed(scenario)


@on_both_networks
@pytest.mark.parametrize(
    "hello",
    [b"", *(bytes(16) + bytes(rest) for rest in ((0,), (2, 2), (0, 1), (0, MAX_LANES + 1)))],
    ids=["empty", "short", "place_beyond", "only_one", "too_many"],
)
def test_a_lane_that_does_not_say_which_it_is_is_refused_at_once(
    bed: Bed, monkeypatch: pytest.MonkeyPatch, hello: bytes
) -> None:
    monkeypatch.setattr(striped, "LANE_SECONDS", 3600.0)

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        async with await client.open_stream(server.peer_id, "echo" + LANE) as lane:
            await lane.send(hello)
            with pytest.raises(RemoteError, match=r"ended the stream|broke"):
                await lane.receive(MIB, 5.0)
        assert server.rejected == {"FrameError": 1}

    bed(scenario)


@on_both_networks
def test_a_second_lane_in_the_same_place_is_refused_and_the_stream_served(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        first, second = hellos(2)
        lanes = [await client.open_stream(server.peer_id, "echo" + LANE) for _ in range(4)]
        await lanes[0].send(first)
        for lane, hello in ((lanes[1], first), (lanes[2], second[:-1] + b"\x03")):
            await asyncio.sleep(0.1)
            await lane.send(hello)
            with pytest.raises(RemoteError):
                await lane.receive(MIB, PATIENCE)
        assert server.rejected == {"FrameError": 2}
        await lanes[3].send(second)
        await lanes[0].send(b"hello")
        assert await lanes[0].receive(MIB, PATIENCE) == b"hello"
        for lane in lanes:
            await lane.close()

    bed(scenario)


@on_both_networks
def test_lanes_that_wait_in_vain_for_the_others_end(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striped, "LANE_SECONDS", 0.3)
    served = False

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def serve(stream: Stream) -> None:
            nonlocal served
            served = True

        await server.serve_stream("some", serve, lanes=True)
        lanes = [await client.open_stream(server.peer_id, "some" + LANE) for _ in range(2)]
        for lane, hello in zip(lanes, hellos(3), strict=False):
            await lane.send(hello)
        for lane in lanes:
            with pytest.raises(RemoteError, match="ended"):
                await lane.receive(MIB, PATIENCE)
            await lane.close()
        silent = await client.open_stream(server.peer_id, "some" + LANE)
        with pytest.raises(RemoteError, match="ended"):
            await silent.receive(MIB, PATIENCE)
        await silent.close()
        assert server.rejected == {"FrameError": 2, "RemoteError": 1}

    bed(scenario)
    assert not served


@on_both_networks
def test_lanes_whose_stream_never_will_be_whole_end_at_once(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striped, "LANE_SECONDS", 3600.0)

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        lanes = [await client.open_stream(server.peer_id, "echo" + LANE) for _ in range(2)]
        for lane, hello in zip(lanes, hellos(3), strict=False):
            await lane.send(hello)
        await asyncio.sleep(0.2)
        await lanes[0].close()
        with pytest.raises(RemoteError, match="ended"):
            await lanes[1].receive(MIB, 5.0)
        await lanes[1].close()

    bed(scenario)


@on_both_networks
def test_no_more_streams_in_lanes_are_served_at_once_than_others(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, max_per_peer=2, lanes=True)
        streams = [await client.open_stream(server.peer_id, "echo", lanes=2) for _ in range(3)]
        answers = []
        for stream in streams:
            try:
                await stream.send(b"here")
                answers.append(await stream.receive(MIB, PATIENCE))
            except RemoteError:
                answers.append(None)
        assert sorted(answers, key=str) == [None, b"here", b"here"]
        assert server.rejected == {"RemoteError": 1}
        for stream in streams:
            await stream.close()
        await within(lambda: not (server._served or server._streams))
        async with await client.open_stream(server.peer_id, "echo", lanes=2) as again:
            await again.send(b"again")
            assert await again.receive(MIB, PATIENCE) == b"again"

    bed(scenario)


@on_both_networks
def test_a_kept_stream_with_other_lanes_is_not_taken(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        for lanes in (1, 3, 2, 1):
            stream = await client.open_stream(server.peer_id, "echo", lanes=lanes)
            assert isinstance(stream, FramedStream | StripedStream)
            assert stream.lanes == lanes
            await stream.send(b"one")
            assert await stream.receive(MIB, PATIENCE) == b"one"
            await client.give_back(stream, "echo")

    bed(scenario)


@on_both_networks
def test_who_does_not_serve_lanes_refuses_all(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("plain", echo)
        with pytest.raises(RemoteError):
            await client.open_stream(server.peer_id, "plain", lanes=LANES)
        assert not client._streams

    bed(scenario)


@on_both_networks
def test_a_lane_that_cannot_be_opened_ends_the_others(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, lanes=True)
        open_one, opened = client._open, 0

        async def opening(peer_id: str, name: str) -> FramedStream:
            nonlocal opened
            opened += 1
            if opened == LANES:
                await asyncio.sleep(0.2)
                raise RemoteError("no more streams")
            return await open_one(peer_id, name)

        monkeypatch.setattr(client, "_open", opening)
        with pytest.raises(RemoteError, match="no more streams"):
            await client.open_stream(server.peer_id, "echo", lanes=LANES)
        assert opened == LANES
        assert not client._streams

    bed(scenario)


@on_both_networks
def test_a_peers_lanes_are_counted(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_stream("echo", echo, max_per_peer=1, lanes=True)
        most = await client.open_stream(server.peer_id, "echo", lanes=MAX_LANES)
        await most.send(b"here")
        assert await most.receive(MIB, PATIENCE) == b"here"

        async def one_more() -> None:
            more = await client.open_stream(server.peer_id, "echo", lanes=2)
            await more.send(b"too much")
            await more.receive(MIB, PATIENCE)

        with pytest.raises(RemoteError):
            await one_more()
        await most.send(b"still here")
        assert await most.receive(MIB, PATIENCE) == b"still here"
        await most.close()

    bed(scenario)


def test_as_many_lanes_as_let_everything_be_under_way() -> None:
    sizes = (0, 1, LANE_BYTES, LANE_BYTES + 1, 5 * LANE_BYTES, 100 * LANE_BYTES)
    assert [lanes_for(size) for size in sizes] == [1, 1, 1, 2, 5, MAX_LANES]
    assert [lanes_for(100 * LANE_BYTES, most) for most in (0, 1, 3, 100)] == [1, 1, 3, MAX_LANES]
