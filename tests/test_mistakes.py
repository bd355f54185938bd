"""Mistakes that only show on the network: a wrong or dead address, a port that is taken."""

import asyncio
import socket
from pathlib import Path

import pytest
from support.processes import addition_config, machine

from hivegrpo.peer.daemon import run_peer
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

SOMEBODY = Identity.generate()


def test_an_address_where_no_run_is_served_is_explained(tmp_path: Path) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        network.join(SOMEBODY)

        async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
            return network.join(identity)

        settings = PeerConfig(home=tmp_path / "peer")
        address = network.address(SOMEBODY.peer_id)
        await run_peer(address, settings, asyncio.Event(), lambda record: None, make_transport=make_transport)

    with pytest.raises(UnreachableError, match="serves no run") as refused:
        asyncio.run(scenario())
    assert refused.value.exit_code == 69


@pytest.mark.slow
def test_an_unreachable_coordinator_and_a_busy_port_have_their_exit_codes(tmp_path: Path) -> None:
    config = addition_config(tmp_path)

    async def scenario() -> None:
        async with machine(tmp_path) as host:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                busy = await host.coordinator(config, "--port", str(port))
                assert await busy.ended() == 75
                assert str(port) in busy.lines[-1]
            gone = await host.peer(f"/ip4/127.0.0.1/tcp/{port}/p2p/{SOMEBODY.peer_id}", "lonely")
            assert await gone.ended() == 69
            assert gone.lines[-1].startswith("Error: ")

    asyncio.run(scenario())
