"""Over libp2p: a coordinator that is started from an old copy of its home, and who notices."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.chains import ChainMaker
from support.processes import machine
from support.scripted import KNOWN_ANSWER, Node, ScriptedPeer, is_version, run

from hivegrpo.cli.launch_watch import watch
from hivegrpo.cli.output import Record
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import FOLLOW, Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.envelope import PROTOCOL, parse, sign
from hivegrpo.protocol.errors import ChainError, ReplayError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES
from hivegrpo.protocol.transport.memory import MemoryNetwork

pytestmark = pytest.mark.slow


async def make_homes(folder: Path) -> Node:
    """A coordinator's home after the last of two versions, and `backup`, a copy from before version 2."""
    node = Node(folder / "home", MemoryNetwork())
    peers = [ScriptedPeer(node) for _ in range(3)]
    for peer in peers:
        peer.mute.add("Seal")
    async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
        for peer in peers:
            await peer.until(lambda message: isinstance(message, pb.Seal))
    shutil.copytree(node.home, folder / "backup")
    for peer in peers:
        peer.mute.clear()
    async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
        for peer in peers:
            await peer.until(is_version(2))
    return node


@asynccontextmanager
async def serving(node: Node, home: Path) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """The node's coordinator behind p2pd, from a home; its address, and what becomes of it."""
    from hivegrpo.protocol.transport.p2p import P2PTransport

    transport = await P2PTransport.create(node.identity, dht=False)
    log = EventLog(home / LOG_FILE, node.run_id)
    stop = asyncio.Event()
    coordinator = Coordinator(
        identity=node.identity,
        transport=transport,
        log=log,
        run=node.run,
        config=node.config,
        home=home,
        blobs=BlobStore(home / "blobs"),
    )
    task = asyncio.create_task(coordinator.run(stop))
    try:
        yield transport.addresses()[0], task
    finally:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)
        await transport.close()
        log.close()


async def watched(address: str, home: Path) -> list[Record]:
    """What a reader sees at an address, and what it remembers of it in `home`."""
    from hivegrpo.protocol.transport.p2p import P2PTransport

    records: list[Record] = []
    transport = await P2PTransport.create(Identity.generate(), dht=False)
    try:
        await watch(transport, address, records.append, sleep=asyncio.sleep, home=home, once=True)
    finally:
        await transport.close()
    return records


async def join(node: Node, address: str, head: pb.Signed) -> pb.Ack:
    """What a peer that holds `head` is answered."""
    from hivegrpo.protocol.transport.p2p import P2PTransport

    peer = Identity.generate()
    transport = await P2PTransport.create(peer, dht=False)
    try:
        coordinator = await transport.connect([address])
        async with await transport.open_stream(coordinator, FOLLOW) as stream:
            message = pb.Join(protocol=PROTOCOL, known_answer=KNOWN_ANSWER, head=head)
            await stream.send(sign(peer, node.run_id, message).SerializeToString())
            return parse(pb.Ack, await stream.receive(MAX_CALL_BYTES))
    finally:
        await transport.close()


def test_an_old_copy_is_noticed_by_a_reader_and_stopped_by_the_first_peer(tmp_path: Path) -> None:
    async def test() -> None:
        node = await make_homes(tmp_path)
        async with serving(node, node.home) as (address, _):
            _, version = await watched(address, tmp_path / "reader")
            assert version["version"] == 2
        head = node.coordinator.chain.chain.entries[2].manifest.signed
        async with serving(node, tmp_path / "backup") as (address, coordinator):
            with pytest.raises(ReplayError, match="ends before version 2"):
                await watched(address, tmp_path / "reader")
            assert not coordinator.done()
            ack = await join(node, address, head)
            assert ack.reason.startswith("fork: A peer holds version 2")
            with pytest.raises(ChainError, match="this home is older than the run") as caught:
                await coordinator
            assert caught.value.exit_code == 76
            assert "Start the coordinator from the newer home folder" in caught.value.hint

    run(test())


@pytest.mark.skipif(find_spec("libp2p") is None, reason="needs the extra: pip install 'hivegrpo[watch]'")
def test_the_command_reads_a_chain_that_p2pd_serves(tmp_path: Path) -> None:
    """py-libp2p, in a process of its own; then a forged head, under the same address."""
    from hivegrpo.protocol.transport.p2p import P2PTransport

    maker = ChainMaker(versions=600)
    chain = maker.chain()
    for version in range(300):
        chain.append(maker.entry(version))

    async def test() -> None:
        async with machine(tmp_path) as host:
            server = await P2PTransport.create(maker.identity, dht=False)
            try:
                await serve_chain(server, chain)
                command = ("watch", server.addresses()[0], "--once", "--json")
                reader = await host.hivegrpo(*command)
                assert await reader.ended() == 0
                assert [record["version"] for record in reader.records] == [299, 299]
                assert reader.records[1]["manifest"] == maker.head.hex()
                chain.entries[299].manifest.signed.signature = bytes(64)
                reader = await host.hivegrpo(*command)
                assert await reader.ended() == 76
                assert reader.records[-1]["error"] == "ForgedError"
            finally:
                await server.close()

    asyncio.run(test())
