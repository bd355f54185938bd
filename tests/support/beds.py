"""Two connected nodes, in memory or over libp2p: `pytestmark = on_both_networks` gives every test its `bed`."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.memory import MemoryNetwork
from hivegrpo.protocol.transport.serving import ServingTransport

MIB = 1 << 20
PATIENCE = 30.0
"""More than any step takes; running into it is a failure."""


async def within(condition: Callable[[], bool]) -> None:
    """Turns of the loop until a condition holds that no event tells of."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


Scenario = Callable[[ServingTransport, ServingTransport], Awaitable[None]]
Bed = Callable[[Scenario], None]


async def _two_in_memory() -> tuple[ServingTransport, ServingTransport]:
    network = MemoryNetwork()
    return network.join(Identity.generate()), network.join(Identity.generate())


async def _two_over_libp2p() -> tuple[ServingTransport, ServingTransport]:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    server = await P2PTransport.create(Identity.generate())
    return server, await P2PTransport.create(Identity.generate(), initial_peers=server.addresses())


def _bed(two: Callable[[], Awaitable[tuple[ServingTransport, ServingTransport]]]) -> Bed:
    """Plays a scenario with a server and a client that has connected to it, and checks that no task is left over."""

    async def play(scenario: Scenario) -> None:
        server, client = await two()
        try:
            assert await client.connect(server.addresses()) == server.peer_id
            async with asyncio.timeout(PATIENCE):
                await scenario(server, client)
        finally:
            await client.close()
            await server.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    return lambda scenario: asyncio.run(play(scenario))


on_both_networks = pytest.mark.parametrize(
    "bed",
    [
        pytest.param(_bed(_two_in_memory), id="memory"),
        pytest.param(_bed(_two_over_libp2p), id="libp2p", marks=pytest.mark.slow),
    ],
)


async def echo_call(request: bytes, remote: str) -> bytes:
    return request + b" from " + remote.encode()


async def send_raw(stream: Stream, data: bytes) -> None:
    """Bytes that are no frame, as a hostile node may send them."""
    assert isinstance(stream, FramedStream)
    stream._writer.write(data)
    await stream._writer.drain()
