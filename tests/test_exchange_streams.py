"""How many streams and dials undisturbed exchanges take, and how their streams end."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from support.runs import IntegerLearner, signed_run, small_config
from support.streams import on_serving, on_stream, only_pushes
from support.swarm import Swarm

from hivegrpo.peer.swarm import directory
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.reducer import SpanReducer
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport import striped
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork
from hivegrpo.protocol.transport.striped import StripedStream

PEERS, VERSIONS, VALUES = 3, 3, 100_000


@pytest.mark.parametrize("lane_bytes", [striped.LANE_BYTES, 8 << 10], ids=["one_lane", "lanes"])
@pytest.mark.parametrize("slower", [0.0, 0.1], ids=["acks_at_once", "acks_after_the_seal"])
def test_spans_come_back_on_the_streams_that_took_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, lane_bytes: int
) -> None:
    receive = SpanReducer.receive
    monkeypatch.setattr(striped, "LANE_BYTES", lane_bytes)

    async def receiving(reducer: SpanReducer, stream: Stream, header: Opened[pb.PushHeader]) -> None:
        await receive(reducer, stream, header)
        await asyncio.sleep(slower)

    monkeypatch.setattr(SpanReducer, "receive", receiving)
    monkeypatch.setattr(directory, "HEAD_START_SECONDS", 3600.0)  # nobody waits so long: a push ends the wait
    opened: Counter[str] = Counter()
    pushes: set[Stream] = set()

    def count(transport: Transport) -> Transport:
        open_stream = transport.open_stream

        async def opening(peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
            opened[name] += 1
            stream = await open_stream(peer_id, name, timeout, lanes)
            if name == "push":
                pushes.add(stream)
            return stream

        transport.open_stream = opening  # type: ignore[method-assign]  # it only looks on
        return transport

    async def scenario() -> None:
        async with asyncio.timeout(60):
            patient = {"lease": 60.0, "exchange": 30.0, "step": 30.0, "grace": 30.0}  # a slow disk leaves nobody out
            config = small_config(run={"start_peers": PEERS, "versions": VERSIONS}, timing=patient)
            coordinator = Identity.generate()
            swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)
            node = await swarm.start_coordinator()
            for name in ("a", "b", "c"):
                await swarm.start_peer(name, IntegerLearner(VALUES), wrap=count)
            await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
            assert all(not peer.transport.rejected for peer in swarm.peers.values())
            await node.leave()

    asyncio.run(scenario())
    assert opened["push"] == VERSIONS * PEERS * (PEERS - 1)
    assert opened["span"] == 0
    assert {isinstance(stream, StripedStream) for stream in pushes} == {lane_bytes < 16 << 10}
    assert len(pushes) == PEERS * (PEERS - 1), "the next version has the streams of the one before"


@pytest.mark.parametrize("name", ["span", "pull", "chain"])
def test_who_sends_last_does_not_close_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """p2pd may drop what a reader has not read yet when the sender closes."""
    ends: list[str] = []

    def look(stream: Stream) -> None:
        close = stream.close

        async def closing() -> None:
            if stream.bytes_received > 100:  # it got what it asked for
                with pytest.raises(RemoteError) as told:
                    await stream.receive(0, 0.3)
                ends.append(told.value.message)
            await close()

        monkeypatch.setattr(stream, "close", closing)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            patient = {"lease": 60.0, "exchange": 30.0, "step": 30.0, "grace": 30.0}
            config = small_config(
                run={"start_peers": PEERS, "versions": 1}, averaging={"audit_rate": 1.0}, timing=patient
            )
            coordinator = Identity.generate()
            swarm = Swarm(tmp_path, config, signed_run(coordinator, config, VALUES), coordinator)
            node = await swarm.start_coordinator()
            look_on, part = on_stream(name, look), on_serving("push", only_pushes)
            for peer in ("a", "b", "c"):
                await swarm.start_peer(peer, IntegerLearner(VALUES), wrap=lambda transport: look_on(part(transport)))
            await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
            await node.leave()

    asyncio.run(scenario())
    assert ends
    assert all("within 0.3 s" in told for told in ends), ends


def test_a_peer_is_dialled_once_and_again_after_a_stream_to_it_failed() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        one, other = network.join(Identity.generate()), network.join(Identity.generate())
        dials, connect = 0, one.connect

        async def dialling(addresses: list[str], timeout: float = 10.0) -> str:
            nonlocal dials
            dials += 1
            return await connect(addresses, timeout)

        async def serve(stream: Stream) -> None:
            raise FrameError("nothing to say")

        one.connect = dialling  # type: ignore[method-assign]  # it only looks on
        known = Directory(one)
        known.learn([pb.Endpoint(peer=other.peer_id, addresses=other.addresses())])
        await other.serve_stream("push", serve)
        for _ in range(3):
            async with await known.open_stream(other.peer_id, "push"):
                pass
        assert dials == 1
        await other.close()
        with pytest.raises(RemoteError):
            await known.open_stream(other.peer_id, "push")
        assert dials == 2
        again = network.join(other.peer_id)
        await again.serve_stream("push", serve)
        async with await known.open_stream(other.peer_id, "push"):
            pass
        assert dials == 3
        await one.close()
        await again.close()

    asyncio.run(scenario())
