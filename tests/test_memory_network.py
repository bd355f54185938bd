"""What the network in memory can do beyond the transport's contract: faults, clocks and latency."""

import asyncio

import pytest

from hivegrpo.protocol.errors import RemoteError, UnreachableError
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport


async def echo_call(request: bytes, remote: str) -> bytes:
    return request + b" from " + remote.encode()


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive(1000))


async def three() -> tuple[MemoryNetwork, list[MemoryTransport]]:
    network = MemoryNetwork()
    nodes = [network.join(name) for name in ("ada", "bob", "cleo")]
    for node in nodes:
        await node.serve_call("echo", echo_call)
        await node.serve_stream("echo", echo)
        for other in nodes:
            if other is not node:
                await node.connect(other.addresses())
    return network, nodes


def test_a_partition_breaks_streams_between_its_sides_until_it_heals() -> None:
    async def scenario() -> None:
        network, (ada, bob, cleo) = await three()
        across, within = await ada.open_stream("cleo", "echo"), await ada.open_stream("bob", "echo")
        network.partition(["ada", "bob"], ["cleo"])
        with pytest.raises(RemoteError):
            await across.receive(1000)
        with pytest.raises(RemoteError, match="cannot be reached"):
            await bob.call("cleo", "echo", b"")
        with pytest.raises(UnreachableError):
            await cleo.connect(ada.addresses())
        await within.send(b"hello")
        assert await within.receive(1000) == b"hello"
        network.heal()
        assert await bob.call("cleo", "echo", b"hello") == b"hello from bob"

    asyncio.run(scenario())


def test_a_crash_stops_a_node_where_it_is_and_others_see_its_streams_break() -> None:
    async def scenario() -> None:
        network, (ada, bob, _) = await three()
        entered, done = asyncio.Event(), False

        async def work(request: bytes, remote: str) -> bytes:
            nonlocal done
            entered.set()
            await asyncio.sleep(0)
            done = True
            return b""

        await bob.serve_call("work", work)
        calling = asyncio.create_task(ada.call("bob", "work", b""))
        stream = await ada.open_stream("bob", "echo")
        await entered.wait()
        network.crash("bob")
        with pytest.raises(RemoteError):
            await calling
        with pytest.raises(RemoteError):
            await stream.receive(1000)
        with pytest.raises(RemoteError):
            await bob.call("ada", "echo", b"")
        assert not done
        again = network.join("bob")
        await again.serve_call("echo", echo_call)
        assert await ada.call("bob", "echo", b"hello") == b"hello from ada"

    asyncio.run(scenario())


def test_two_nodes_that_never_met_cannot_talk() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        ada, bob = network.join("ada"), network.join("bob")
        await bob.serve_call("echo", echo_call)
        with pytest.raises(RemoteError, match="not connected"):
            await ada.call("bob", "echo", b"")

    asyncio.run(scenario())


def test_hints_expire_by_the_networks_clock() -> None:
    async def scenario() -> None:
        now = 100.0
        network = MemoryNetwork(clock=lambda: now)
        ada, bob = network.join("ada"), network.join("bob")
        await ada.announce("head", b"old", ttl=10)
        now = 109.9
        assert await bob.find("head") == {"ada": b"old"}
        now = 110.0
        assert await bob.find("head") == {}

    asyncio.run(scenario())


def test_latency_delays_what_is_sent_and_keeps_its_order() -> None:
    async def scenario() -> None:
        network = MemoryNetwork(latency=0.02)
        ada, bob = network.join("ada"), network.join("bob")
        await bob.serve_stream("echo", echo)
        await ada.connect(bob.addresses())
        stream = await ada.open_stream("bob", "echo")
        clock = asyncio.get_running_loop().time
        start = clock()
        for number in range(100):
            await stream.send(bytes([number]))
        assert b"".join([await stream.receive(1) for _ in range(100)]) == bytes(range(100))
        assert clock() - start >= 2 * 0.02
        await ada.close()
        await bob.close()

    asyncio.run(scenario())
