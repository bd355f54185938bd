"""Connections, streams and hints, on the network in memory and on libp2p alike."""

import asyncio
import os
import socket
import tracemalloc

import pytest
from structlog.testing import capture_logs
from support.beds import MIB, PATIENCE, Bed, echo_call, on_both_networks, send_raw

from hivegrpo.protocol.errors import ConfigError, FrameError, RemoteError, UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport import serving
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream
from hivegrpo.protocol.transport.serving import ServingTransport

pytestmark = on_both_networks


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive(MAX_FRAME_BYTES, PATIENCE))


def test_a_handlers_bug_is_logged_and_does_not_tell_the_caller_more(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def fail(request: bytes, remote: str) -> bytes:
            raise KeyError("secret")

        async def fail_stream(stream: Stream) -> None:
            raise KeyError("secret")

        await server.serve_call("fail", fail)
        await server.serve_stream("fail", fail_stream)
        with capture_logs() as logs:
            with pytest.raises(RemoteError, match=r"internal error$"):
                await client.call(server.peer_id, "fail", b"")
            stream = await client.open_stream(server.peer_id, "fail")
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(MIB, PATIENCE)
        errors = [each for each in logs if each["log_level"] == "error"]
        assert len(errors) == 2
        assert all(each["exc_info"] for each in errors)
        assert server.rejected == {}

    bed(scenario)


def test_what_is_not_served_is_refused(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        with pytest.raises(RemoteError):
            await client.call(server.peer_id, "nothing", b"")
        with pytest.raises(RemoteError):
            await client.open_stream(server.peer_id, "nothing")
        await server.serve_call("echo", echo_call)
        with pytest.raises(RemoteError, match="no call 'nothing' here"):
            await client.call(server.peer_id, "nothing", b"")

    bed(scenario)


def test_a_node_does_not_dial_itself(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_call("echo", echo_call)
        with pytest.raises(RemoteError, match="itself"):
            await server.call(server.peer_id, "echo", b"")

    bed(scenario)


def test_frames_arrive_whole_in_order_and_counted(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        ends: list[Stream] = []

        async def back(stream: Stream) -> None:
            ends.append(stream)
            await echo(stream)

        await server.serve_stream("echo", back)
        frames = [os.urandom(MIB) for _ in range(3)] + [b"", b"x", bytes(MAX_FRAME_BYTES)]
        async with await client.open_stream(server.peer_id, "echo") as stream:
            assert stream.remote == server.peer_id
            for frame in frames:
                await stream.send(memoryview(frame))
                assert await stream.receive(MAX_FRAME_BYTES) == frame
            total = sum(4 + len(frame) for frame in frames)
            assert (stream.bytes_sent, stream.bytes_received) == (total, total)
            assert (ends[0].bytes_sent, ends[0].bytes_received) == (total, total)
            assert ends[0].remote == client.peer_id
            with pytest.raises(FrameError):
                await stream.send(bytes(MAX_FRAME_BYTES + 1))

    bed(scenario)


def test_a_frame_may_come_in_pieces(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def dribble(stream: Stream) -> None:
            await send_raw(stream, (5 * 200_000).to_bytes(4, "big"))
            for _ in range(5):
                stream._writer.write(bytes(200_000))  # type: ignore[attr-defined]  # all before the reader wakes up
            await stream.receive(1, PATIENCE)

        await server.serve_stream("dribble", dribble)
        async with await client.open_stream(server.peer_id, "dribble") as stream:
            assert await stream.receive(MIB) == bytes(5 * 200_000)
            await stream.send(b"")

    bed(scenario)


def test_an_announced_giant_is_refused_before_its_body_is_read(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        outcome: asyncio.Future[tuple[Exception, int]] = asyncio.get_running_loop().create_future()

        async def read(stream: Stream) -> None:
            tracemalloc.start()
            try:
                await stream.receive(MIB, PATIENCE)
            except FrameError as error:
                outcome.set_result((error, tracemalloc.get_traced_memory()[1]))
                raise
            finally:
                tracemalloc.stop()

        await server.serve_stream("read", read)
        stream = await client.open_stream(server.peer_id, "read")
        await send_raw(stream, (1 << 30).to_bytes(4, "big") + bytes(1000))
        error, peak = await outcome
        assert "1073741824 bytes" in str(error)
        assert peak < MIB
        with pytest.raises(RemoteError):
            await stream.receive(MIB, PATIENCE)
        assert server.rejected == {"FrameError": 1}

    bed(scenario)


def test_a_sender_waits_for_a_slow_receiver_and_loses_nothing(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        gate, total = asyncio.Event(), 64
        received: list[int] = []

        async def read(stream: Stream) -> None:
            await gate.wait()
            for _ in range(total):
                received.append((await stream.receive(MIB, PATIENCE))[0])
            await stream.send(b"all")

        async def write(stream: Stream) -> None:
            for number in range(total):
                await stream.send(bytes([number]) * MIB, PATIENCE)

        await server.serve_stream("read", read)
        async with await client.open_stream(server.peer_id, "read") as stream:
            writing = asyncio.create_task(write(stream))
            done, _ = await asyncio.wait({writing}, timeout=0.5)
            assert not done
            assert stream.bytes_sent < total * MIB
            gate.set()
            await writing
            assert await stream.receive(MIB, PATIENCE) == b"all"
        assert received == list(range(total))

    bed(scenario)


def test_a_receiver_that_never_reads_ends_the_stream_in_time(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def sleep(stream: Stream) -> None:
            await asyncio.Event().wait()

        async def write(stream: Stream) -> None:
            for _ in range(64):
                await stream.send(bytes(MIB), timeout=0.3)

        await server.serve_stream("sleep", sleep)
        stream = await client.open_stream(server.peer_id, "sleep")
        with pytest.raises(RemoteError, match=r"did not take a frame within 0\.3 s"):
            await write(stream)
        with pytest.raises(RemoteError, match="closed"):
            await stream.send(b"")

    bed(scenario)


def test_a_stream_outlives_a_receive_that_timed_out(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        halfway, gate = asyncio.Event(), asyncio.Event()

        async def dawdle(stream: Stream) -> None:
            await send_raw(stream, (5).to_bytes(4, "big") + b"he")
            halfway.set()
            await gate.wait()
            await send_raw(stream, b"llo")
            await stream.receive(1, PATIENCE)

        await server.serve_stream("dawdle", dawdle)
        async with await client.open_stream(server.peer_id, "dawdle") as stream:
            await halfway.wait()
            with pytest.raises(RemoteError, match=r"within 0\.2 s"):
                await stream.receive(10, timeout=0.2)
            gate.set()
            assert await stream.receive(10) == b"hello"
            await stream.send(b"")

    bed(scenario)


def test_whoever_lingers_closes_when_the_other_side_has_or_when_its_time_is_up(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        lingered = asyncio.Event()

        async def say_goodbye(stream: Stream) -> None:
            seconds = float(await stream.receive(10))
            await stream.send(b"goodbye")
            await stream.linger(seconds)
            lingered.set()

        await server.serve_stream("linger", say_goodbye)
        async with await client.open_stream(server.peer_id, "linger") as stream:
            await stream.send(b"60")
            assert await stream.receive(10) == b"goodbye"
            with pytest.raises(RemoteError, match=r"within 0\.2 s"):
                await stream.receive(10, timeout=0.2)
            assert not lingered.is_set()
        async with asyncio.timeout(PATIENCE):
            await lingered.wait()
        lingered.clear()
        async with await client.open_stream(server.peer_id, "linger") as stream:
            await stream.send(b"0.1")
            assert await stream.receive(10) == b"goodbye"
            async with asyncio.timeout(PATIENCE):
                await lingered.wait()
        async with await client.open_stream(server.peer_id, "linger") as stream:
            await stream.send(b"60")
            assert await stream.receive(10) == b"goodbye"
            await stream.send(b"more")
            with pytest.raises(RemoteError, match="ended"):
                await stream.receive(10, PATIENCE)
        assert server.rejected == {"FrameError": 1}

    bed(scenario)


def test_the_end_of_a_stream_is_a_remote_error_on_both_sides(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        ended = asyncio.Event()

        async def say_goodbye(stream: Stream) -> None:
            await stream.send(b"goodbye")

        async def listen(stream: Stream) -> None:
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(MIB, PATIENCE)
            ended.set()

        await server.serve_stream("goodbye", say_goodbye)
        await server.serve_stream("listen", listen)
        async with await client.open_stream(server.peer_id, "goodbye") as stream:
            assert await stream.receive(MIB) == b"goodbye"
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(MIB, PATIENCE)
        stream = await client.open_stream(server.peer_id, "listen")
        await stream.close()
        await stream.close()
        await ended.wait()
        with pytest.raises(RemoteError):
            await stream.send(b"")
        assert server.rejected == {}

    bed(scenario)


def test_a_stream_that_was_given_back_is_taken_again(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.5)

    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        served: list[Stream] = []

        async def twice(stream: Stream) -> None:
            served.append(stream)
            for _ in range(2):
                await stream.send(await stream.receive(MIB, PATIENCE))

        async def used() -> Stream:
            stream = await client.open_stream(server.peer_id, "twice")
            await stream.send(b"hello")
            assert await stream.receive(MIB) == b"hello"
            return stream

        await server.serve_stream("twice", twice)
        await server.serve_stream("other", echo)
        first = await used()
        await client.give_back(first, "twice")
        async with await client.open_stream(server.peer_id, "other") as other:
            assert other is not first
        again = await used()
        assert again is first
        assert len(served) == 1
        await client.give_back(again, "twice")
        await asyncio.sleep(0.1)
        fresh = await used()
        assert fresh is not first, "a stream that has ended is of no use to anybody"
        await client.give_back(fresh, "twice")
        await asyncio.sleep(1.0)
        assert await used() is not fresh, "nobody wanted it in time"
        await first.close()

    bed(scenario)


def test_a_peer_has_so_many_streams_and_no_more(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        gone = asyncio.Queue[None]()

        async def greet(stream: Stream) -> None:
            await stream.send(b"hello")
            with pytest.raises(RemoteError):
                await stream.receive(MIB, PATIENCE)
            gone.put_nowait(None)

        await server.serve_stream("greet", greet, max_per_peer=2)
        first, second = [await client.open_stream(server.peer_id, "greet") for _ in range(2)]
        assert [await first.receive(MIB), await second.receive(MIB)] == [b"hello"] * 2
        third = await client.open_stream(server.peer_id, "greet")
        with pytest.raises(RemoteError):
            await third.receive(MIB, PATIENCE)
        assert server.rejected == {"RemoteError": 1}
        await first.close()
        await gone.get()
        fourth = await client.open_stream(server.peer_id, "greet")
        assert await fourth.receive(MIB) == b"hello"

    bed(scenario)


def test_nobody_there_is_unreachable_and_says_what_to_check(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        nobody = Identity.generate().peer_id
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"/ip4/127.0.0.1/tcp/{unused.getsockname()[1]}/p2p/{nobody}"
            with pytest.raises(UnreachableError, match=f"Nobody answers at {address}") as caught:
                await client.connect([address], timeout=5)
        assert caught.value.hint
        with pytest.raises(RemoteError):
            await client.call(nobody, "echo", b"", timeout=5)
        with pytest.raises(ConfigError, match="2 nodes"):
            await client.connect([*server.addresses(), address])

    bed(scenario)


def test_hints_are_found_by_key_and_peer(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        assert await client.find("head") == {}
        large = os.urandom(8 << 10)
        await server.announce("head", b"from the server", ttl=60)
        await client.announce("head", large, ttl=60)
        both = {server.peer_id: b"from the server", client.peer_id: large}
        assert await client.find("head") == both
        assert await server.find("head") == both
        with pytest.raises(FrameError):
            await client.announce("head", large + b"!", ttl=60)

    bed(scenario)


def test_closing_ends_streams_and_may_be_repeated(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        ended = asyncio.Event()

        async def wait(stream: Stream) -> None:
            with pytest.raises(RemoteError):
                await stream.receive(MIB, PATIENCE)
            ended.set()

        await server.serve_stream("echo", echo)
        await server.serve_call("echo", echo_call)
        await client.serve_stream("wait", wait)
        await client.call(server.peer_id, "echo", b"")
        await server.open_stream(client.peer_id, "wait")
        stream = await client.open_stream(server.peer_id, "echo")
        await stream.send(b"hello")
        assert await stream.receive(MIB) == b"hello"
        await server.close()
        await server.close()
        with pytest.raises(RemoteError):
            await stream.receive(MIB, PATIENCE)
        await ended.wait()
        with pytest.raises(RemoteError):
            await client.call(server.peer_id, "echo", b"", timeout=5)
        with pytest.raises(RemoteError, match="closed"):
            await server.call(client.peer_id, "echo", b"")
        with pytest.raises(UnreachableError):
            await client.connect(server.addresses(), timeout=5)

    bed(scenario)
