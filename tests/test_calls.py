"""Unary calls, on the network in memory and on libp2p alike."""

import asyncio
import os

import pytest
from structlog.testing import capture_logs
from support.beds import PATIENCE, Bed, echo_call, on_both_networks, send_raw

from hivegrpo.protocol.errors import FrameError, RemoteError, StaleError
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES
from hivegrpo.protocol.transport.serving import CALLS_AT_ONCE, ServingTransport

pytestmark = on_both_networks


def test_a_call_reaches_its_handler_and_names_the_caller(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        await server.serve_call("echo", echo_call)
        await client.serve_call("echo", echo_call)
        assert await client.call(server.peer_id, "echo", b"hello") == b"hello from " + client.peer_id.encode()
        assert await client.call(server.peer_id, "echo", b"") == b" from " + client.peer_id.encode()
        assert await server.call(client.peer_id, "echo", b"back") == b"back from " + server.peer_id.encode()

    bed(scenario)


def test_many_calls_at_once_are_all_answered_a_few_at_a_time(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        active, most = 0, 0
        two = asyncio.Event()

        async def count(request: bytes, remote: str) -> bytes:
            nonlocal active, most
            active += 1
            most = max(most, active)
            if active > 1:
                two.set()
            await two.wait()
            active -= 1
            return request

        await server.serve_call("count", count)
        questions = [str(number).encode() for number in range(50)]
        answers = await asyncio.gather(*(client.call(server.peer_id, "count", each, PATIENCE) for each in questions))
        assert answers == questions
        assert 1 < most <= CALLS_AT_ONCE
        assert server.rejected == {}

    bed(scenario)


def test_a_handlers_wire_error_is_counted_and_reaches_the_caller(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def refuse(request: bytes, remote: str) -> bytes:
            raise StaleError("for version 3,\x1b[31m not 4")

        await server.serve_call("refuse", refuse)
        with capture_logs() as logs:
            with pytest.raises(RemoteError, match=r"StaleError: for version 3,\?\[31m not 4"):
                await client.call(server.peer_id, "refuse", b"")
            with pytest.raises(RemoteError):
                await client.call(server.peer_id, "refuse", b"")
        assert server.rejected == {"StaleError": 2}
        warnings = [each for each in logs if each["log_level"] == "warning"]
        assert [(each["error"], each["peer"]) for each in warnings] == [("StaleError", client.peer_id)] * 2

    bed(scenario)


def test_a_flood_of_bad_input_is_counted_but_does_not_flood_the_log(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def refuse(request: bytes, remote: str) -> bytes:
            raise StaleError("again")

        await server.serve_call("refuse", refuse)
        with capture_logs() as logs:
            for _ in range(100):
                with pytest.raises(RemoteError):
                    await client.call(server.peer_id, "refuse", b"")
        assert server.rejected == {"StaleError": 100}
        assert sum(each["log_level"] == "warning" for each in logs) < 20

    bed(scenario)


def test_calls_have_a_largest_size_each_way(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        async def resize(request: bytes, remote: str) -> bytes:
            return bytes(int(request)) if len(request) < 10 else request

        await server.serve_call("resize", resize)
        largest = os.urandom(MAX_CALL_BYTES)
        assert await client.call(server.peer_id, "resize", largest, PATIENCE) == largest
        with pytest.raises(FrameError):
            await client.call(server.peer_id, "resize", largest + b"!")
        with capture_logs() as logs, pytest.raises(RemoteError, match="too large"):
            await client.call(server.peer_id, "resize", str(MAX_CALL_BYTES + 1).encode())
        assert [each["event"] for each in logs if each["log_level"] == "error"] == ["answer too large"]

        oversized = b"\x06resize" + largest + b"!"
        for raw in (b"\0\0\0\0", len(oversized).to_bytes(4, "big") + oversized):
            stream = await client.open_stream(server.peer_id, "call")
            await send_raw(stream, raw)
            assert (await stream.receive(1000, PATIENCE)).startswith(b"\1FrameError")
            await stream.close()
        assert server.rejected == {"FrameError": 2}

    bed(scenario)


def test_a_call_that_is_not_answered_fails_in_time_and_the_next_one_works(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        gate = asyncio.Event()

        async def wait(request: bytes, remote: str) -> bytes:
            await gate.wait()
            return b"late"

        await server.serve_call("wait", wait)
        await server.serve_call("echo", echo_call)
        with pytest.raises(RemoteError, match=r"within 0\.2 s"):
            await client.call(server.peer_id, "wait", b"", timeout=0.2)
        assert (await client.call(server.peer_id, "echo", b"hello")).startswith(b"hello")
        gate.set()
        assert await client.call(server.peer_id, "wait", b"") == b"late"
        assert server.rejected == {}

    bed(scenario)


def test_a_call_that_waits_for_its_turn_fails_in_time_too(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        gate, entered = asyncio.Event(), asyncio.Semaphore(0)

        async def wait(request: bytes, remote: str) -> bytes:
            entered.release()
            await gate.wait()
            return b"late"

        await server.serve_call("wait", wait)
        waiting = [asyncio.create_task(client.call(server.peer_id, "wait", b"")) for _ in range(CALLS_AT_ONCE)]
        for _ in waiting:
            await entered.acquire()
        with pytest.raises(RemoteError, match=r"within 0\.1 s"):
            await client.call(server.peer_id, "wait", b"", timeout=0.1)
        gate.set()
        assert await asyncio.gather(*waiting) == [b"late"] * CALLS_AT_ONCE

    bed(scenario)
