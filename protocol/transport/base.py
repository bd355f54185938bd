"""The contract of a transport: unary calls for small control messages, framed streams for the rest.

Every wait has a bound, every read a limit that is checked before a byte of the body is read. The remote peer
id that a handler sees is authenticated by the transport.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from hivegrpo.protocol.errors import RemoteError

MAX_CALL_BYTES = 1 << 20
"""Largest request or answer of a unary call, bytes."""

MAX_FRAME_BYTES = 2 << 20
"""Largest frame that any stream may carry, bytes; each `receive` states its own, smaller, limit."""

IDLE_SECONDS = 15.0
"""How long a stream that was given back is kept for its next use; who serves it waits twice that."""

LINGER_SECONDS = 10.0
"""How long `Stream.linger` waits for the other side."""


class Stream(ABC):
    """A bidirectional stream of length-prefixed frames (4-byte big-endian length, then the body)."""

    remote: str
    """The other side's peer id, base58."""

    bytes_sent: int
    """Frames and their prefixes written so far, bytes."""

    bytes_received: int

    @abstractmethod
    async def send(self, frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        """Write one frame; waits while the receiver is slow. RemoteError when the stream is gone or time is up.

        A timeout of None is for a caller that bounds many frames together: a clock costs as much as a small frame.
        """

    @abstractmethod
    async def receive(self, limit: int, timeout: float | None = 30.0) -> bytes:
        """Read one frame of at most `limit` bytes; the timeout as in `send`.

        FrameError if its prefix announces more (nothing of the body is read), RemoteError at the end of the stream,
        when it breaks, or when `timeout` seconds pass.
        """

    async def linger(self, timeout: float = LINGER_SECONDS) -> None:
        """Wait until the other side closes, for at most so long. FrameError if it sends something instead.

        For whoever sends last, before it closes. p2pd may reset a stream that this side closes first, and what the
        other side has not read by then is lost.
        """
        with suppress(RemoteError):
            await self.receive(0, timeout)

    @abstractmethod
    async def close(self) -> None:
        """Finish writing and release the stream; idempotent."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


CallHandler = Callable[[bytes, str], Awaitable[bytes]]
"""(request, remote peer id) -> answer. A WireError it raises is counted and reaches the caller as RemoteError."""

StreamHandler = Callable[[Stream], Awaitable[None]]
"""Serves one stream; the transport closes it afterwards. A WireError it raises is counted and shown."""


class Dials(Protocol):
    """What a reader needs of a transport: the light client has no more than this, and no event loop of asyncio."""

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        """See `Transport.connect`."""

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> Stream:
        """See `Transport.open_stream`."""


class Transport(ABC):
    """One node's place in the network."""

    peer_id: str
    """This node's libp2p peer id, base58, with its Ed25519 public key inlined."""

    rejected: dict[str, int]
    """Bad input dropped so far, by name of the error's class; shown by the daemons."""

    @abstractmethod
    def addresses(self) -> list[str]:
        """Multiaddrs that others can dial, each ending in /p2p/<peer id>."""

    @abstractmethod
    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        """Dial the node that `addresses` (all of one peer id) name; its peer id. UnreachableError if none answers."""

    @abstractmethod
    async def probe(self, addresses: list[str], timeout: float = 3.0) -> bool:
        """Whether a node answers at one of these addresses (all of one peer id) to somebody without a connection to it.

        No credentials: it says that a node is there, not which.
        """

    @abstractmethod
    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        """Unary call to a connected or dialled peer. RemoteError when it fails or does not answer in time."""

    @abstractmethod
    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
        """Open a stream to the handler `name`, or take one that was given back. RemoteError when it fails.

        In more than one of `lanes` (see `striped`), the handler must take it so.
        """

    async def give_back(self, stream: Stream, name: str) -> None:
        """Have no more use for a stream to the handler `name`, whose other side waits for another first frame.

        It may serve the next `open_stream`, so that nobody has to open one. Its counts of bytes go on.
        """
        await stream.close()

    @abstractmethod
    async def serve_call(self, name: str, handler: CallHandler) -> None:
        """Answer unary calls to `name`."""

    @abstractmethod
    async def serve_stream(self, name: str, handler: StreamHandler, max_per_peer: int = 8, lanes: bool = False) -> None:
        """Serve streams to `name`, also in lanes if so; a peer's streams above `max_per_peer` at once are refused."""

    @abstractmethod
    async def announce(self, key: str, value: bytes, ttl: float) -> None:
        """Best effort: leave a hint (at most 8 KiB, under this peer's id) in the DHT for `ttl` seconds."""

    @abstractmethod
    async def find(self, key: str, timeout: float = 5.0) -> dict[str, bytes]:
        """Hints under `key`, by the peer id that claims to have left them; unverified; empty when there is no DHT."""

    @abstractmethod
    async def close(self) -> None:
        """End every stream and background task; idempotent; leaves nothing behind."""
