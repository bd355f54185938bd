"""Where peers can be dialled, as far as anyone said."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.errors import HiveError, RemoteError
from hivegrpo.protocol.transport.base import Stream, Transport

MAX_KNOWN = 4096

HEAD_START_SECONDS = 0.3
"""How long the higher of two peer ids waits for the other's dial: longer than a packet takes anywhere."""


class Directory:
    """Addresses by peer id; dials on the way to opening a stream. The transport proves who answers at an address."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._addresses: dict[str, list[str]] = {}
        self._awaited: dict[str, asyncio.Event] = {}
        """Peers whose dial is waited for."""
        self._reached: set[str] = set()
        """Peers to which the last stream could be opened: asking for a connection again would be a round trip more."""

    def learn(self, endpoints: Iterable[pb.Endpoint | pb.Reducer]) -> None:
        """Remember addresses; the newest win, the oldest are forgotten beyond `MAX_KNOWN` peers."""
        for endpoint in endpoints:
            if endpoint.peer != self._transport.peer_id and endpoint.addresses:
                self._addresses.pop(endpoint.peer, None)
                self._addresses[endpoint.peer] = list(endpoint.addresses)
        while len(self._addresses) > MAX_KNOWN:
            del self._addresses[next(iter(self._addresses))]

    def known(self) -> list[str]:
        """Peers with an address, the newest first."""
        return list(reversed(self._addresses))

    async def reach(self, peer_id: str, timeout: float = 10.0) -> None:
        """Make sure there is a connection, as far as an address is known; RemoteError if it cannot be dialled."""
        addresses = self._addresses.get(peer_id)
        if addresses:
            try:
                await self._transport.connect(addresses, timeout)
            except HiveError as error:
                raise RemoteError(f"cannot dial {peer_id}: {error}") from error

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
        """Open a stream; dial first, unless the last one to that peer could be opened and this one can, too."""
        if peer_id in self._reached:
            self._reached.discard(peer_id)
            with suppress(RemoteError):
                return self._has_reached(peer_id, await self._transport.open_stream(peer_id, name, timeout, lanes))
        await self._let_dial(peer_id)
        await self.reach(peer_id, timeout)
        return self._has_reached(peer_id, await self._transport.open_stream(peer_id, name, timeout, lanes))

    async def give_back(self, stream: Stream, name: str) -> None:
        """See `Transport.give_back`."""
        await self._transport.give_back(stream, name)

    def met(self, peer_id: str) -> None:
        """That peer has opened a stream to this one, so there is a connection."""
        arrived = self._awaited.get(peer_id)
        if arrived is not None:
            arrived.set()

    async def _let_dial(self, peer_id: str) -> None:
        """Of two that want to reach each other, the one with the lower peer id dials first.

        A plan tells both at the same moment. Where packets take a while, both dials would cross and fail, and so would
        the next ones, for as long as libp2p's backoff on either side keeps step with the other's.
        """
        if self._transport.peer_id < peer_id:
            return
        arrived = self._awaited.setdefault(peer_id, asyncio.Event())
        with suppress(TimeoutError):
            async with asyncio.timeout(HEAD_START_SECONDS):
                await arrived.wait()
        self._awaited.pop(peer_id, None)

    def _has_reached(self, peer_id: str, stream: Stream) -> Stream:
        if len(self._reached) >= MAX_KNOWN:
            self._reached.clear()
        self._reached.add(peer_id)
        return stream
