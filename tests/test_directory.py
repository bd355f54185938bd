"""Of two peers that want to reach each other at the same moment, one dials."""

import asyncio
from collections.abc import Awaitable, Callable

from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport

PATIENCE = 20.0
Scenario = Callable[[MemoryTransport, MemoryTransport, list[str]], Awaitable[None]]


def play(scenario: Scenario) -> list[str]:
    """Who dialled, in order; the scenario gets the lower and the higher node, which have never met."""
    dialled: list[str] = []

    class Noting(MemoryTransport):
        async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
            dialled.append(self.peer_id)
            return await super().connect(addresses, timeout)

    async def run() -> None:
        network = MemoryNetwork()
        keys = sorted((Identity.generate() for _ in range(2)), key=lambda key: key.peer_id)
        low, high = (network.join(key) for key in keys)
        low.__class__ = high.__class__ = Noting
        async with asyncio.timeout(PATIENCE):
            await scenario(low, high, dialled)
        await low.close()
        await high.close()

    asyncio.run(run())
    return dialled


def directory_of(node: MemoryTransport, other: MemoryTransport) -> Directory:
    directory = Directory(node)
    directory.learn([pb.Endpoint(peer=other.peer_id, addresses=other.addresses())])
    return directory


async def ignore(_: Stream) -> None:
    """Nothing is said."""


def test_the_lower_peer_id_dials_first() -> None:
    async def both(low: MemoryTransport, high: MemoryTransport, dialled: list[str]) -> None:
        below, above = directory_of(low, high), directory_of(high, low)

        async def meet(stream: Stream) -> None:
            assert dialled == [low.peer_id], "the higher one waits"
            above.met(stream.remote)

        await low.serve_stream("x", ignore)
        await high.serve_stream("x", meet)
        waiting = asyncio.create_task(above.open_stream(low.peer_id, "x"))
        await asyncio.sleep(0)
        streams = [await below.open_stream(high.peer_id, "x"), await waiting]
        assert dialled == [low.peer_id, high.peer_id]
        for stream in streams:
            await stream.close()

    play(both)


def test_the_higher_peer_id_does_not_wait_for_ever() -> None:
    async def alone(low: MemoryTransport, high: MemoryTransport, dialled: list[str]) -> None:
        await low.serve_stream("x", ignore)
        above = directory_of(high, low)
        await (await above.open_stream(low.peer_id, "x")).close()
        await (await above.open_stream(low.peer_id, "x")).close()
        assert dialled == [high.peer_id], "once reached, it is not dialled again"

    play(alone)
