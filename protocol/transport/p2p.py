"""The real network: libp2p streams through p2pd, and hints in hivemind's DHT.

The only module of this package that imports hivemind, which imports torch: two seconds.
"""

import asyncio
import logging
import math
import os
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Self

import structlog
from hivemind.dht.node import DHTNode
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import get_dht_time

from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.errors import ConfigError, FrameError, RemoteError, SignatureError, UnreachableError
from hivegrpo.protocol.identity import PEER_ID_CHARS, Identity, public_key_of
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.daemon import Daemon
from hivegrpo.protocol.transport.dialling import greets
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.rate import UploadCap
from hivegrpo.protocol.transport.serving import MAX_HINT_BYTES, PROTOCOL, ServingTransport

DHT_SECONDS = 5.0
"""How long a node waits for the DHT when it joins or leaves a hint; everything works without."""

MAX_HINT_SECONDS = 86_400.0
MAX_KEYS = 1024
MAX_HINTS = 64
"""DHT keys that a node stores for others, and hints under each of them."""

log = structlog.get_logger(__name__)

if "HIVEMIND_LOGLEVEL" not in os.environ:
    # hivemind shows every unreachable peer on the terminal; its own logger, nobody else's.
    logging.getLogger("hivemind").setLevel(logging.ERROR)


class P2PTransport(ServingTransport):
    """A node of the libp2p network; it lives in the event loop that made it."""

    lost: asyncio.Event
    """Set when p2pd ended by itself: every operation fails from then on."""

    def __init__(self, daemon: Daemon, p2p: "_P2P", addresses: list[str], upload: UploadCap | None = None) -> None:
        """Use `create`."""
        super().__init__(p2p.peer_id.to_base58(), upload)
        self.lost = asyncio.Event()
        self._daemon = daemon
        self._p2p = p2p
        self._dht: DHTNode | None = None
        self._dht_work: set[asyncio.Task[Any]] = set()
        self._addresses = addresses
        self._spawn(self._watch())

    @classmethod
    async def create(
        cls,
        identity: Identity,
        host: str = "127.0.0.1",
        port: int = 0,
        initial_peers: Sequence[str] = (),
        dht: bool = True,
        upload: UploadCap | None = None,
    ) -> Self:
        """Listen on host:port (0: a free one); with `dht`, join the DHT through `initial_peers` if any of them answers.

        BusyError if the port is in use, ConfigError if an address is wrong.
        """
        peers = {parse_address(address)[0]: address for address in initial_peers}
        daemon = await Daemon.start(identity, host, port, routing=dht)
        try:
            p2p = await _P2P.replicate(Multiaddr(f"/unix{daemon.control}"))
            self = cls(daemon, p2p, [str(address) for address in await p2p.get_visible_maddrs()], upload)
        except BaseException:
            await daemon.stop()
            raise
        assert self.peer_id == identity.peer_id, "p2pd took another key"
        try:
            if dht:
                self._dht = await _start_dht(p2p)
                if peers and not await self._in_dht(self._join_dht(peers), DHT_SECONDS):
                    log.warning("no DHT: no initial peer answered; going on without", peers=list(peers.values()))
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def p2pd_pid(self) -> int:
        """The child process."""
        return self._daemon.pid

    def addresses(self) -> list[str]:
        return list(self._addresses)

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        parsed = [parse_address(address) for address in addresses]
        peers = {peer_id for peer_id, _ in parsed}
        if len(peers) != 1:
            raise ConfigError(f"{len(peers)} nodes in one list of addresses.", "Give the addresses of one node.")
        (peer_id,) = peers
        request = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            addrs=[Multiaddr(address).to_bytes() for _, address in parsed],
            timeout=math.ceil(timeout),
        )
        where = ", ".join(addresses)
        try:
            async with asyncio.timeout(timeout):
                _, writer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=request))
            writer.close()
        except TimeoutError:
            raise _unreachable(where, f"no answer within {timeout:g} s") from None
        except RemoteError as error:
            raise _unreachable(where, error.message) from None
        return peer_id

    async def probe(self, addresses: list[str], timeout: float = 3.0) -> bool:
        return any(await asyncio.gather(*(greets(address, timeout) for address in addresses)))

    async def announce(self, key: str, value: bytes, ttl: float) -> None:
        if len(value) > MAX_HINT_BYTES:
            raise FrameError(f"a hint of {len(value)} bytes; at most {MAX_HINT_BYTES} may be left")
        if self._dht is not None and not self.closed:
            expires = get_dht_time() + min(ttl, MAX_HINT_SECONDS)
            await self._in_dht(self._dht.store(PROTOCOL + key, value, expires, subkey=self.peer_id), DHT_SECONDS)

    async def find(self, key: str, timeout: float = 5.0) -> dict[str, bytes]:
        if self._dht is None or self.closed:
            return {}
        found = await self._in_dht(self._dht.get(PROTOCOL + key, latest=True), timeout)
        return {peer: hint.value for peer, hint in found.value.items()} if found else {}

    async def close(self) -> None:
        try:
            await super().close()
            self._p2p.fail_calls()
            if self._dht_work:
                await asyncio.wait(self._dht_work, timeout=DHT_SECONDS)
            await self._p2p.shutdown()
        finally:
            await self._daemon.stop()

    async def _open(self, peer_id: str, name: str) -> FramedStream:
        try:
            public_key_of(peer_id)
        except SignatureError as error:
            raise RemoteError(f"nobody can be {peer_id!r}: {error.message}") from None
        request = p2pd_pb2.StreamOpenRequest(peer=PeerID.from_base58(peer_id).to_bytes(), proto=[PROTOCOL + name])
        reader, writer = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=request))
        return FramedStream(reader, writer, peer_id, self.forget)

    async def _listen(self, name: str) -> None:
        async def on_stream(info: StreamInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = FramedStream(reader, writer, info.peer_id.to_base58(), self.forget)
            try:
                public_key_of(stream.remote)
            except SignatureError as error:
                stream.abort()
                self._reject(error, stream.remote)
            else:
                self._accept(stream, name)

        await self._p2p.add_binary_stream_handler(PROTOCOL + name, on_stream)

    async def _ask(self, request: p2pd_pb2.Request) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One request to p2pd; the connection that it was made on, which a STREAM_OPEN turns into the stream.

        RemoteError with p2pd's reason if it fails. (hivemind's own requests leave the socket open when they fail.)
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self._daemon.control)
            try:
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
                raise_if_failed(response)
            except BaseException:
                writer.transport.abort()
                raise
        except P2PDaemonError as error:
            raise RemoteError(_reason(str(error))) from None
        except (OSError, EOFError):
            raise RemoteError("this node's p2pd has ended") from None
        return reader, writer

    async def _in_dht(self, work: Coroutine[Any, Any, Any], timeout: float) -> Any:
        """What `work` of the DHT node returns; None if that fails or takes longer.

        It is never cancelled, only waited for no more: a cancelled search leaves tasks behind that wait forever. Each
        of its own calls ends within three seconds.
        """
        task = asyncio.create_task(work)
        self._dht_work.add(task)
        task.add_done_callback(self._dht_work.discard)
        task.add_done_callback(_note)
        await asyncio.wait({task}, timeout=timeout)
        return task.result() if task.done() and not task.exception() else None

    async def _join_dht(self, peers: dict[str, str]) -> bool:
        """Meet the DHT nodes of those peers that answer; whether any did."""
        assert self._dht is not None
        joined = False
        for peer_id, address in peers.items():
            with suppress(UnreachableError):
                await self.connect([address], DHT_SECONDS)
                joined |= await self._dht.protocol.call_ping(PeerID.from_base58(peer_id)) is not None
        if joined:
            await self._dht.find_nearest_nodes([self._dht.node_id])
        return joined

    async def _watch(self) -> None:
        await self._daemon.ended.wait()
        self._p2p.fail_calls()
        self.stop()
        self.lost.set()


class _P2P(P2P):  # type: ignore[misc]  # hivemind is not typed
    """hivemind's P2P, for its DHT, with calls that are never cancelled.

    p2pd writes a response that is nil, and crashes, if a cancel arrives together with the answer. DHTNode cancels what
    takes longer than three seconds; here the call goes on, and only the wait for it ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: set[asyncio.Future[Any]] = set()
        self._failed = asyncio.get_running_loop().create_future()

    async def call_protobuf_handler(self, *args: Any, **kwargs: Any) -> Any:
        if self._failed.done():
            raise P2PDaemonError("this node is closing")
        call = asyncio.ensure_future(super().call_protobuf_handler(*args, **kwargs))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        call.add_done_callback(_note)
        await asyncio.wait({call, self._failed}, return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            return call.result()
        raise P2PDaemonError("this node is closing")

    def fail_calls(self) -> None:
        """Fail the calls in flight, and those to come, so that the DHT's tasks end by themselves."""
        if not self._failed.done():
            self._failed.set_result(None)

    async def shutdown(self) -> None:
        self.fail_calls()
        await super().shutdown()
        for call in self._calls:
            call.cancel()


def _note(work: asyncio.Future[Any]) -> None:
    """Hints may fail; but an exception that nobody looks at is shown on the terminal."""
    if not work.cancelled() and (error := work.exception()):
        log.debug("in the DHT", error=repr(error))


async def _start_dht(p2p: _P2P) -> DHTNode:
    """A DHT node that stores no more for others than the quotas, and caches nothing: hints are short-lived."""
    node = await DHTNode.create(
        p2p=p2p,
        record_validator=_HintValidator(),
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    node.protocol.storage, node.protocol.cache = _HintStorage(MAX_KEYS), _HintStorage(MAX_KEYS)
    return node


class _HintValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is not typed
    """Accepts what `announce` makes: msgpack bytes of at most 8 KiB, under a peer id, for at most a day."""

    def validate(self, record: DHTRecord) -> bool:
        return (
            len(record.value) <= 3 + MAX_HINT_BYTES
            and _is_packed_bytes(record.value)
            and len(record.subkey) == 2 + PEER_ID_CHARS
            and record.subkey[:2] == bytes((0xD9, PEER_ID_CHARS))
            and record.expiration_time <= get_dht_time() + MAX_HINT_SECONDS
        )


def _is_packed_bytes(data: bytes) -> bool:
    """Whether `data` is one msgpack byte string (bin 8 or bin 16) and nothing else."""
    match data[:1]:
        case b"\xc4":
            return len(data) == 2 + int.from_bytes(data[1:2])
        case b"\xc5":
            return len(data) == 3 + int.from_bytes(data[1:3])
        case _:
            return False


class _HintStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind is not typed
    """What other nodes left here, at most MAX_HINTS under one key."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        held = self.get(key)
        hints = held.value if held is not None and isinstance(held.value, DictionaryDHTValue) else {}
        if len(hints) >= MAX_HINTS and subkey not in hints:
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


def _unreachable(where: str, reason: str) -> UnreachableError:
    return UnreachableError(
        f"Nobody answers at {where}: {reason}.",
        "Check that the node there is running, that the address is the one it printed, and that its port is open.",
    )


def _reason(text: str) -> str:
    """The last and most telling part of what p2pd says went wrong."""
    lines = text.removeprefix("Connect failed. msg=").splitlines() or ["p2pd gives no reason"]
    last = printable(lines[-1].rpartition("] ")[2])
    if "peer id mismatch" in last:
        return "another node answers there"
    return re.sub(r"^(failed to [^:]*: )*(dial \S+ \S+: (connect: )?)?", "", last)
