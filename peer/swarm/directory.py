"""Where peers can be dialled, as far as anyone said."""

from collections.abc import Iterable
from contextlib import suppress

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.errors import HiveError, RemoteError
from hivegrpo.protocol.transport.base import Stream, Transport

MAX_KNOWN = 4096


class Directory:
    """Addresses by peer id; dials on the way to opening a stream. The transport proves who answers at an address."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._addresses: dict[str, list[str]] = {}
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

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> Stream:
        """Open a stream; dial first, unless the last one to that peer could be opened and this one can, too."""
        if peer_id in self._reached:
            self._reached.discard(peer_id)
            with suppress(RemoteError):
                return self._has_reached(peer_id, await self._transport.open_stream(peer_id, name, timeout))
        await self.reach(peer_id, timeout)
        return self._has_reached(peer_id, await self._transport.open_stream(peer_id, name, timeout))

    def _has_reached(self, peer_id: str, stream: Stream) -> Stream:
        if len(self._reached) >= MAX_KNOWN:
            self._reached.clear()
        self._reached.add(peer_id)
        return stream
