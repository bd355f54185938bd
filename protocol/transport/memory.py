"""A network in memory: the transport's contract without sockets, processes or clocks, for tests and simulations.

    network = MemoryNetwork()
    alice, bob = network.join("alice"), network.join("bob")
    await alice.connect(bob.addresses())

Nodes meet real asyncio streams with real back-pressure and the same frames as over libp2p, so hostile bytes can be
sent too. Nothing sleeps unless a latency is asked for, and a loop that runs the same tasks delivers in the same order.
To inject a fault, wrap or subclass the transport that `join` returns, or use `cut`, `partition` and `crash`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import combinations

from hivegrpo.protocol.errors import ConfigError, FrameError, RemoteError, UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.rate import UploadCap
from hivegrpo.protocol.transport.serving import MAX_HINT_BYTES, ServingTransport

STREAM_BUFFER = 64 << 10
"""Bytes after which a receiver that does not read makes its sender wait (asyncio's own default)."""


class MemoryNetwork:
    """Who is there, which links are up, and the hints that were left."""

    def __init__(self, latency: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`latency`: seconds that bytes take from one node to another; `clock`: what hints expire by."""
        self.latency = latency
        self._clock = clock
        self._nodes: dict[str, MemoryTransport] = {}
        self._ports: dict[str, int] = {}
        self._cuts: set[frozenset[str]] = set()
        self._pipes: dict[frozenset[str], set[_Pipe]] = defaultdict(set)
        self._hints: dict[str, dict[str, tuple[bytes, float]]] = defaultdict(dict)

    def join(self, node: Identity | str, upload: UploadCap | None = None) -> MemoryTransport:
        """A new node; one that crashed or closed may join again under its old peer id, and keeps its address."""
        peer_id = node.peer_id if isinstance(node, Identity) else node
        assert peer_id not in self._nodes, f"{peer_id} is in the network already"
        self._ports.setdefault(peer_id, 1 + len(self._ports))
        self._nodes[peer_id] = MemoryTransport(self, peer_id, upload)
        return self._nodes[peer_id]

    def cut(self, one: str, other: str) -> None:
        """Break the link between two nodes, and every stream on it, until it heals."""
        link = frozenset((one, other))
        self._cuts.add(link)
        self._break(link)

    def partition(self, *groups: Iterable[str]) -> None:
        """Cut every link between nodes of different groups."""
        for group, another in combinations([list(group) for group in groups], 2):
            for one in group:
                for other in another:
                    self.cut(one, other)

    def heal(self) -> None:
        """Mend all links."""
        self._cuts.clear()

    def crash(self, peer_id: str) -> None:
        """End a node as `kill -9` does: its tasks stop where they are, its streams break at the other side.

        One that has left is not there to be ended.
        """
        node = self._nodes.pop(peer_id, None)
        if node is None:
            return
        for link in [link for link in self._pipes if peer_id in link]:
            self._break(link)
        node.stop()

    def leave(self, peer_id: str) -> None:
        self._nodes.pop(peer_id, None)

    def address(self, peer_id: str) -> str:
        return f"/ip4/127.0.0.1/tcp/{self._ports[peer_id]}/p2p/{peer_id}"

    def reach(self, one: str, other: str) -> MemoryTransport | None:
        """The node `other`, if it is up and its link to `one` is."""
        return None if frozenset((one, other)) in self._cuts else self._nodes.get(other)

    def pipe(self, one: MemoryTransport, other: MemoryTransport) -> tuple[FramedStream, FramedStream]:
        """Both ends of a new stream between two nodes."""
        near, far = _Pipe(self.latency), _Pipe(self.latency)
        near.other, far.other = far, near
        link = self._pipes[frozenset((one.peer_id, other.peer_id))]
        link |= {near, far}
        near.on_lost = far.on_lost = link.discard
        return near.stream(other.peer_id, one.forget), far.stream(one.peer_id, other.forget)

    def _break(self, link: frozenset[str]) -> None:
        for pipe in list(self._pipes.pop(link, ())):
            pipe.abort()

    def announce(self, key: str, peer_id: str, value: bytes, ttl: float) -> None:
        self._hints[key][peer_id] = value, self._clock() + ttl

    def find(self, key: str) -> dict[str, bytes]:
        now = self._clock()
        return {peer: value for peer, (value, expires) in self._hints.get(key, {}).items() if expires > now}


class MemoryTransport(ServingTransport):
    """A node of a `MemoryNetwork`. As over libp2p, two nodes can talk once either has connected to the other."""

    def __init__(self, network: MemoryNetwork, peer_id: str, upload: UploadCap | None = None) -> None:
        super().__init__(peer_id, upload)
        self.dialable = True
        """If False, as behind a NAT: only nodes that this one has dialled can reach it."""
        self._network = network
        self._known: set[str] = set()

    def addresses(self) -> list[str]:
        return [self._network.address(self.peer_id)]

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        peers = {address.rpartition("/p2p/")[2] for address in addresses}
        if len(peers) != 1:
            raise ConfigError(f"{len(peers)} nodes in one list of addresses.", "Give the addresses of one node.")
        peer_id = peers.pop()
        await asyncio.sleep(self._network.latency)
        node = self._network.reach(self.peer_id, peer_id)
        hidden = node is not None and not node.dialable and peer_id not in self._known
        if self.closed or node is None or node is self or hidden:
            raise UnreachableError(
                f"Nobody answers at {', '.join(addresses)}.", "Check that the node is in the network."
            )
        self._known.add(peer_id)
        node._known.add(self.peer_id)
        return peer_id

    async def probe(self, addresses: list[str], timeout: float = 3.0) -> bool:
        await asyncio.sleep(self._network.latency)
        nodes = (self._network.reach(self.peer_id, address.rpartition("/p2p/")[2]) for address in addresses)
        return any(node is not None and node.dialable for node in nodes)

    async def announce(self, key: str, value: bytes, ttl: float) -> None:
        if len(value) > MAX_HINT_BYTES:
            raise FrameError(f"a hint of {len(value)} bytes; at most {MAX_HINT_BYTES} may be left")
        self._network.announce(key, self.peer_id, value, ttl)

    async def find(self, key: str, timeout: float = 5.0) -> dict[str, bytes]:
        return self._network.find(key)

    async def close(self) -> None:
        if not self.closed:
            self._network.leave(self.peer_id)
        await super().close()

    async def _open(self, peer_id: str, name: str) -> FramedStream:
        await asyncio.sleep(self._network.latency)
        if peer_id not in self._known:
            raise RemoteError(f"not connected to {peer_id}: neither side has dialled the other")
        node = self._network.reach(self.peer_id, peer_id)
        if node is None:
            raise RemoteError(f"{peer_id} cannot be reached")
        if name not in node._stream_handlers:
            raise RemoteError(f"{peer_id} does not serve {name!r}")
        near, far = self._network.pipe(self, node)
        node._accept(far, name)
        return near

    async def _listen(self, name: str) -> None:
        """Served from now on: `_open` looks the handler up."""


class _Pipe(asyncio.Transport):
    """One end of a stream. What is written here waits in the other end's inbox until that end reads."""

    other: _Pipe
    on_lost: Callable[[_Pipe], None]

    def __init__(self, latency: float) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._latency = latency
        self._reader = asyncio.StreamReader(limit=STREAM_BUFFER)
        self._protocol = asyncio.StreamReaderProtocol(self._reader)
        self._protocol.connection_made(self)
        self._travelling: deque[bytes] = deque()
        self._inbox: deque[bytes] = deque()
        self._waiting = 0
        self._reading = True
        self._throttled = False
        self._closing = False
        self._lost = False

    def stream(self, remote: str, on_end: Callable[[FramedStream], None]) -> FramedStream:
        writer = asyncio.StreamWriter(self, self._protocol, self._reader, self._loop)
        return FramedStream(self._reader, writer, remote, on_end)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing and len(data):
            self._send(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._send(b"")

    def abort(self) -> None:
        self._lose()
        self.other._lose()

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        # Not at once: StreamReader resumes before it waits, and would wait for what it was just given.
        self._reading = True
        self._loop.call_soon(self._read)

    def _send(self, data: bytes) -> None:
        """Let bytes travel to the other end; none at all are the end of the stream."""
        self.other._travelling.append(data)
        self.other._waiting += len(data)
        if self._latency:
            self._loop.call_later(self._latency, self.other._arrive)
        else:
            self.other._arrive()
        if not self._throttled and self.other._waiting > STREAM_BUFFER:
            self._throttled = True
            self._protocol.pause_writing()

    def _arrive(self) -> None:
        if self._travelling:
            self._inbox.append(self._travelling.popleft())
            self._read()

    def _read(self) -> None:
        while self._reading and self._inbox:
            data = self._inbox.popleft()
            if not data:
                self._lose()
                self.other._lose()
                return
            self._waiting -= len(data)
            self._protocol.data_received(data)
        if self.other._throttled and self._waiting <= STREAM_BUFFER:
            self.other._throttled = False
            self.other._protocol.resume_writing()

    def _lose(self) -> None:
        if not self._lost:
            self._closing = self._lost = True
            self._travelling.clear()
            self._inbox.clear()
            self._protocol.connection_lost(None)
            self.on_lost(self)
