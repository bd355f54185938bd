"""What only the real network has: p2pd, ports, signals and a DHT."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from hivegrpo.protocol.errors import BusyError, ConfigError, RemoteError, UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.daemon import check_port

pytestmark = pytest.mark.slow

PATIENCE = 30.0
"""More than any step takes; running into it is a failure."""


async def echo_call(request: bytes, remote: str) -> bytes:
    return request


async def echo(stream: Stream) -> None:
    while True:
        await stream.send(await stream.receive(1000))


def leftovers() -> set[str]:
    """Sockets and folders of p2pd that nobody cleaned up."""
    folders = {Path(tempfile.gettempdir()), Path("/tmp")}
    return {str(path) for folder in folders for path in folder.glob("hive*") if not path.name.endswith(".lock")}


def test_nothing_is_left_of_a_node_that_closed() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        before = leftovers()
        node = await P2PTransport.create(Identity.generate())
        await node.serve_stream("echo", echo)
        child = psutil.Process(node.p2pd_pid)
        assert child.parent() == psutil.Process()
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        mine = leftovers() - before
        assert mine
        await node.close()
        assert not child.is_running()
        assert not mine & leftovers()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_a_busy_port_is_named_with_what_to_do_and_free_again_after_the_node() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        node = await P2PTransport.create(Identity.generate(), dht=False)
        port = int(node.addresses()[0].split("/")[4])
        with pytest.raises(BusyError, match=f"Port {port} on 127.0.0.1 is in use") as caught:
            await P2PTransport.create(Identity.generate(), port=port)
        assert "--port" in caught.value.hint
        client = await P2PTransport.create(Identity.generate(), dht=False)
        await client.connect(node.addresses())
        await node.close()
        again = await P2PTransport.create(Identity.generate(), port=port, dht=False)
        assert again.addresses() == [f"/ip4/127.0.0.1/tcp/{port}/p2p/{again.peer_id}"]
        await client.close()
        await again.close()

    asyncio.run(scenario())


def test_another_node_at_the_address_is_not_the_one_that_was_meant() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        node, client = await asyncio.gather(*(P2PTransport.create(Identity.generate(), dht=False) for _ in range(2)))
        address = node.addresses()[0].replace(node.peer_id, Identity.generate().peer_id)
        with pytest.raises(UnreachableError, match="another node answers there"):
            await client.connect([address], timeout=5)
        await client.close()
        await node.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "failed to dial: failed to dial 12D3Koo: all dials failed\n"
            "  * [/ip4/127.0.0.1/tcp/1] dial tcp4 127.0.0.1:1: connect: connection refused",
            "connection refused",
        ),
        ("x\n  * [/ip4/192.0.2.1/tcp/1] dial tcp4 0.0.0.0:0->192.0.2.1:1: i/o timeout", "i/o timeout"),
        ("failed to negotiate protocol: protocols not supported: [a]", "protocols not supported: [a]"),
        ("failed to dial: failed to dial 12D3Koo: no good addresses", "no good addresses"),
        ("routing: not\x1b found", "routing: not? found"),
        ("", "p2pd gives no reason"),
    ],
)
def test_of_what_p2pd_says_the_reason_is_shown(said: str, reason: str) -> None:
    from hivegrpo.protocol.transport.p2p import _reason

    assert _reason(f"Connect failed. msg={said}") == reason


def test_a_port_is_not_busy_with_connections_that_are_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["localhost", "203.0.113.7"])
def test_a_host_that_is_not_this_machines_address_is_a_config_error(host: str) -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    with pytest.raises(ConfigError, match=host):
        asyncio.run(P2PTransport.create(Identity.generate(), host=host))


def test_everything_works_without_a_dht_and_when_nobody_to_join_answers() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        alone = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
        with capture_logs() as logs:
            off = await P2PTransport.create(Identity.generate(), dht=False)
            unlucky = await P2PTransport.create(Identity.generate(), initial_peers=[alone])
        assert [each["peers"] for each in logs if each["log_level"] == "warning"] == [[alone]]
        await off.serve_call("echo", echo_call)
        await unlucky.connect(off.addresses())
        assert await unlucky.call(off.peer_id, "echo", b"hello") == b"hello"
        for node in (off, unlucky):
            await node.announce("head", b"hint", ttl=60)
        assert await off.find("head") == {}
        assert await unlucky.find("head") == {unlucky.peer_id: b"hint"}
        await off.close()
        await unlucky.close()

    asyncio.run(scenario())


def test_a_node_whose_p2pd_ended_says_so_and_fails_at_once() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        server, client = await P2PTransport.create(Identity.generate()), await P2PTransport.create(Identity.generate())
        await server.serve_stream("echo", echo)
        await client.connect(server.addresses())
        stream = await client.open_stream(server.peer_id, "echo")
        with capture_logs() as logs:
            psutil.Process(client.p2pd_pid).kill()
            await asyncio.wait_for(client.lost.wait(), PATIENCE)
        assert [each["exit_code"] for each in logs if each["log_level"] == "error"] == [-9]
        with pytest.raises(RemoteError):
            await stream.receive(1000, PATIENCE)
        with pytest.raises(RemoteError):
            await client.open_stream(server.peer_id, "echo")
        assert await client.find("head") == {}
        await client.close()
        await server.close()

    asyncio.run(scenario())


def test_hints_that_nobody_waits_for_leave_nothing_behind() -> None:
    from hivegrpo.protocol.transport.p2p import P2PTransport

    async def scenario() -> None:
        first = await P2PTransport.create(Identity.generate())
        second = await P2PTransport.create(Identity.generate(), initial_peers=first.addresses())
        assert [await second.find(f"key {number}", timeout=0.0) for number in range(20)] == [{}] * 20
        leaving = [asyncio.create_task(second.announce("key", b"hint", ttl=60)) for _ in range(20)]
        await asyncio.sleep(0)
        await second.close()
        await first.close()
        await asyncio.gather(*leaving)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())


def test_the_dht_takes_small_hints_of_peers_only_and_so_many() -> None:
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils.serializer import MSGPackSerializer
    from hivemind.utils.timed_storage import get_dht_time

    from hivegrpo.protocol.transport import p2p

    pack = MSGPackSerializer.dumps
    key, peer, soon = bytes(20), pack(Identity.generate().peer_id), get_dht_time() + 60
    accepts = p2p._HintValidator().validate
    for size in (0, 255, 256, 8 << 10):
        assert accepts(DHTRecord(key, peer, pack(bytes(size)), soon))
    for record in (
        DHTRecord(key, peer, pack(bytes((8 << 10) + 1)), soon),
        DHTRecord(key, peer, pack("text"), soon),
        DHTRecord(key, peer, pack(b"x") + b"\0", soon),
        DHTRecord(key, peer, b"\xc5", soon),
        DHTRecord(key, peer, b"", soon),
        DHTRecord(key, pack("me"), pack(b"x"), soon),
        DHTRecord(key, pack(None), pack(b"x"), soon),
        DHTRecord(key, b"", pack(b"x"), soon),
        DHTRecord(key, peer, pack(b"x"), soon + 2 * p2p.MAX_HINT_SECONDS),
    ):
        assert not accepts(record)

    storage = p2p._HintStorage(p2p.MAX_KEYS)
    stored = [storage.store_subkey(1, number, b"x", soon) for number in range(p2p.MAX_HINTS + 1)]
    assert stored == [True] * p2p.MAX_HINTS + [False]
    assert storage.store_subkey(1, 0, b"y", soon + 1)


HOST = """
import asyncio, logging, signal, structlog
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.p2p import P2PTransport

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))

async def main():
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    node = await P2PTransport.create(Identity.generate())
    print(node.p2pd_pid, flush=True)
    logging.getLogger("hivemind.dht").warning("as hivemind says of every peer that is away")
    await interrupted.wait()
    await asyncio.sleep(0.2)
    print("p2pd", "lost" if node.lost.is_set() else "alive", flush=True)
    await node.close()

asyncio.run(main())
"""


@contextmanager
def host() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that holds a node, in a process group of its own; and its p2pd."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, psutil.Process(int(process.stdout.readline()))
        finally:
            process.kill()


def test_p2pd_goes_when_its_host_is_killed() -> None:
    with host() as (process, p2pd):
        process.kill()
        p2pd.wait(timeout=5)


def test_ctrl_c_reaches_the_host_only_and_the_terminal_stays_quiet() -> None:
    with host() as (process, p2pd):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (0, "p2pd alive\n", "")
        assert not p2pd.is_running()
