"""The light client's place in the network: py-libp2p, which runs on trio. The only module that imports either.

It cannot share a process with hivemind: both register the protobuf file crypto.proto. It listens nowhere, serves
nothing, and has a fresh identity each time.
"""

import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.errors import ConfigError, RemoteError, UnreachableError
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.frames import CLOSE_SECONDS
from hivegrpo.protocol.transport.lightstream import LightStream
from hivegrpo.protocol.transport.serving import PROTOCOL

# py-libp2p logs each failed dial as an error; what matters of it is raised, and shown once.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)

_FAILURES = (BaseLibp2pError, EOFError, OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError)
"""What py-libp2p raises when the other side, or the line, fails."""


class LightTransport:
    """Dials, and opens streams; see `Dials`. Use `run_light`."""

    def __init__(self, host: IHost) -> None:
        self._host = host

    @staticmethod
    async def sleep(seconds: float) -> None:
        """In the loop that this transport runs in."""
        await trio.sleep(seconds)

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        parsed = [parse_address(address) for address in addresses]
        peers = {peer_id for peer_id, _ in parsed}
        if len(peers) != 1:
            raise ConfigError(f"{len(peers)} nodes in one list of addresses.", "Give the addresses of one node.")
        (peer_id,) = peers
        info = PeerInfo(ID.from_string(peer_id), [Multiaddr(address) for _, address in parsed])
        try:
            with _bounded(timeout):
                await self._host.connect(info)
        except RemoteError as error:
            raise UnreachableError(
                f"Nobody answers at {', '.join(addresses)}: {error.message}.",
                "Check that the node there is running, that the address is the one it printed, and that its port is "
                "open.",
            ) from None
        return peer_id

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> LightStream:
        peer = ID.from_string(peer_id)
        try:
            with _bounded(timeout):
                stream = await self._host.new_stream(peer, [TProtocol(PROTOCOL + name)])
        except RemoteError:
            # The connection may be one that only the other side knows to be gone: the next `connect` dials anew.
            with suppress(RemoteError), _bounded(CLOSE_SECONDS):
                await self._host.disconnect(peer)
            raise
        return LightStream(stream, peer_id, _bounded)


def run_light(work: Callable[[LightTransport], Awaitable[None]]) -> None:
    """Run `work` in a loop of trio, until it is done or a SIGINT or SIGTERM comes; raises what it raises."""
    failure = trio.run(_run, work)
    if failure is not None:
        raise failure


async def _run(work: Callable[[LightTransport], Awaitable[None]]) -> Exception | None:
    """Work in a host. What it raises is returned: a nursery would make a group of it."""
    host = new_host()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        async with host.run(listen_addrs=[]):
            try:
                await work(LightTransport(host))
            except Exception as error:  # noqa: BLE001 - handed to the caller
                failure = error
            # Whatever the host still waits for is cancelled if it takes its time.
            nursery.cancel_scope.deadline = trio.current_time() + CLOSE_SECONDS
        nursery.cancel_scope.cancel()
    return failure


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """See `lightstream.Bounded`."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise RemoteError(f"no answer within {seconds:g} s") from None
    except _FAILURES as error:
        raise RemoteError(printable(str(error)) or type(error).__name__) from None
