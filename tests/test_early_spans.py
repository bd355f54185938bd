"""Spans are asked for before they are there, so that nobody waits for two round trips after the seal."""

import asyncio
from pathlib import Path

from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.peer.swarm.exchange import SPAN
from hivegrpo.peer.swarm.session import REPORT
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryTransport

VALUES = 40_000
PATIENCE = 60.0


class HoldingTransport(MemoryTransport):
    """Holds this peer's report as a reducer, without which there is no seal, until it has asked for a span."""

    asked: asyncio.Event
    streams: list[Stream]

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> Stream:
        stream = await super().open_stream(peer_id, name, timeout)
        if name == SPAN:
            self.streams.append(stream)
            self.asked.set()
        return stream

    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        if name == REPORT and parse(pb.Signed, request).type == "SenderReport":
            await self.asked.wait()
            self.asked.clear()
        return await super().call(peer_id, name, request, timeout)


def hold(transport: Transport) -> HoldingTransport:
    assert isinstance(transport, MemoryTransport)
    transport.__class__ = HoldingTransport
    assert isinstance(transport, HoldingTransport)
    transport.asked, transport.streams = asyncio.Event(), []
    return transport


def test_a_span_is_asked_for_before_the_seal_and_once(tmp_path: Path) -> None:
    config = small_config()
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)

    async def scenario() -> None:
        await swarm.start_coordinator()
        learners = (IntegerLearner(VALUES), IntegerLearner(VALUES))
        nodes = [await swarm.start_peer(f"peer {index}", learner, hold) for index, learner in enumerate(learners)]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(node.task for node in nodes))
        for node in nodes:
            assert isinstance(node.transport, HoldingTransport)
            assert len(node.transport.streams) == config.run.versions
        assert swarm.coordinator is not None
        await swarm.coordinator.leave()

    asyncio.run(scenario())
    assert_invariants(swarm)
