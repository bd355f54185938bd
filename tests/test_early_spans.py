"""Spans come on the streams that took the pushes, asked for before they are there: nobody waits for two round trips."""

import asyncio
from pathlib import Path

from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryTransport

VALUES = 40_000
PATIENCE = 60.0


class CountingTransport(MemoryTransport):
    """Notes the names of the streams that it opens."""

    opened: list[str]

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> Stream:
        self.opened.append(name)
        return await super().open_stream(peer_id, name, timeout)


def count(transport: Transport) -> CountingTransport:
    assert isinstance(transport, MemoryTransport)
    transport.__class__ = CountingTransport
    assert isinstance(transport, CountingTransport)
    transport.opened = []
    return transport


def test_a_span_comes_on_the_stream_that_took_the_push(tmp_path: Path) -> None:
    config = small_config()
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)

    async def scenario() -> None:
        await swarm.start_coordinator()
        learners = (IntegerLearner(VALUES), IntegerLearner(VALUES))
        nodes = [await swarm.start_peer(f"peer {index}", learner, count) for index, learner in enumerate(learners)]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(node.task for node in nodes))
        for node in nodes:
            assert isinstance(node.transport, CountingTransport)
            assert node.transport.opened.count("push") == config.run.versions
            assert "span" not in node.transport.opened
        assert swarm.coordinator is not None
        await swarm.coordinator.leave()

    asyncio.run(scenario())
    assert_invariants(swarm)
