"""What both transports share: unary calls over streams, caps, handlers as tasks, and counting what was refused.

A unary call is one frame each way on a stream "call", which its caller keeps for the next call to the same peer:

    request    1 byte n | name, n bytes | body
    answer     1 byte, 0 done or 1 refused | body or reason

hivemind's own unary calls are not used. Kept streams answer four times as many calls a second; one refused stream
bounds what a peer may have in flight; and a hivemind call that times out while its answer arrives crashes p2pd.
"""

import asyncio
from abc import abstractmethod
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import structlog

from hivegrpo.protocol.errors import FrameError, RemoteError, WireError
from hivegrpo.protocol.text import MAX_REASON_CHARS, printable
from hivegrpo.protocol.transport.base import IDLE_SECONDS, MAX_CALL_BYTES, CallHandler, Stream, StreamHandler, Transport
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.rate import UploadCap
from hivegrpo.protocol.transport.striped import LANE, MAX_LANES, LaneServer, StripedStream, hellos

PROTOCOL = "hivegrpo/1/"
"""Prefix of every stream's libp2p protocol name."""

CALL = "call"
LAST = frozenset({"blob"})
"""Streams that yield to all others."""

MAX_HINT_BYTES = 8 << 10
MAX_NOISY = 1024
"""Peers times kinds of trouble that are counted apart."""
CALLS_AT_ONCE = 8
"""Calls in flight to one peer; the next ones wait."""

_DONE, _REFUSED = b"\x00", b"\x01"

log = structlog.get_logger(__name__)


class ServingTransport(Transport):
    """Everything but the medium: a subclass opens streams, announces protocols, and passes on what comes in."""

    def __init__(self, peer_id: str, upload: UploadCap | None = None) -> None:
        """`upload`: what all bytes of streams go through on their way out, calls first, blobs last; None is no cap."""
        self.peer_id = peer_id
        self.upload = upload or UploadCap()
        self.rejected = {}
        self.closed = False
        self._call_handlers: dict[str, CallHandler] = {}
        self._stream_handlers: dict[str, tuple[StreamHandler, int]] = {}
        self._served: Counter[tuple[str, str]] = Counter()
        self._noise = Noise()
        self._streams: set[FramedStream] = set()
        self._slots: dict[str, asyncio.Semaphore] = {}
        """Of calls to each peer."""
        self._idle: dict[tuple[str, str], list[tuple[FramedStream | StripedStream, asyncio.TimerHandle]]] = {}
        """Streams that were given back, by peer and name, with their ends."""
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def _open(self, peer_id: str, name: str) -> FramedStream:
        """Open a stream to the handler `name` of a peer; RemoteError if that fails. The caller bounds the wait."""

    @abstractmethod
    async def _listen(self, name: str) -> None:
        """From now on pass incoming streams for `name` to `_accept`."""

    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        if len(request) > MAX_CALL_BYTES:
            raise FrameError(f"a request of {len(request)} bytes to {name!r}; at most {MAX_CALL_BYTES} may be sent")
        slots = self._slots.setdefault(peer_id, asyncio.Semaphore(CALLS_AT_ONCE))
        head = len(name.encode()).to_bytes(1, "big") + name.encode()
        try:
            async with asyncio.timeout(timeout), slots:
                stream = self._take_idle(peer_id, CALL) or await self._dial(peer_id, CALL)
                try:
                    await stream.send(head + request, timeout)
                    answer = await stream.receive(1 + MAX_CALL_BYTES, timeout)
                except BaseException:
                    stream.abort()
                    raise
                self._keep_idle(stream, CALL)
        except TimeoutError:
            raise RemoteError(f"{peer_id} did not answer {name!r} within {timeout:g} s") from None
        except FrameError as error:
            raise RemoteError(error.message) from None
        if answer[:1] != _DONE:
            reason = printable(answer[1:].decode(errors="replace"))
            raise RemoteError(f"{peer_id} refused {name!r}: {reason}")
        return answer[1:]

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
        try:
            async with asyncio.timeout(timeout):
                kept = self._take_idle(peer_id, name, lanes)
                if kept is not None:
                    return kept
                return await (self._dial(peer_id, name) if lanes == 1 else self._dial_lanes(peer_id, name, lanes))
        except TimeoutError:
            raise RemoteError(f"{peer_id} did not open a stream {name!r} within {timeout:g} s") from None

    async def give_back(self, stream: Stream, name: str) -> None:
        if isinstance(stream, FramedStream | StripedStream) and stream.usable and not self.closed:
            self._keep_idle(stream, name)
        else:
            await stream.close()

    async def serve_call(self, name: str, handler: CallHandler) -> None:
        assert name not in self._call_handlers, f"call {name!r} is served already"
        self._call_handlers[name] = handler
        if CALL not in self._stream_handlers:
            # Twice the caller's own limit: a stream that it dropped may not have ended here yet.
            await self.serve_stream(CALL, self._answer_calls, max_per_peer=2 * CALLS_AT_ONCE)

    async def serve_stream(self, name: str, handler: StreamHandler, max_per_peer: int = 8, lanes: bool = False) -> None:
        assert name not in self._stream_handlers, f"stream {name!r} is served already"
        self._stream_handlers[name] = handler, max_per_peer
        await self._listen(name)
        if lanes:
            await self.serve_stream(name + LANE, LaneServer(handler, max_per_peer).serve, max_per_peer * MAX_LANES)

    async def close(self) -> None:
        self.stop()
        await asyncio.gather(*self._tasks - {asyncio.current_task()}, return_exceptions=True)

    def stop(self) -> None:
        """Drop every stream and cancel every handler, without waiting for them."""
        self.closed = True
        for stream in list(self._streams):
            stream.abort()
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def forget(self, stream: FramedStream) -> None:
        """A stream of this node has ended."""
        self._streams.discard(stream)

    async def _dial(self, peer_id: str, name: str) -> FramedStream:
        if self.closed:
            raise RemoteError("this node's transport is closed")
        if peer_id == self.peer_id:
            raise RemoteError("a node does not dial itself")
        stream = await self._open(peer_id, name)
        stream.pace(self.upload, urgent=name == CALL, last=name in LAST)
        self._streams.add(stream)
        if self.closed:
            stream.abort()
        return stream

    async def _dial_lanes(self, peer_id: str, name: str, count: int) -> StripedStream:
        """A new stream in lanes; RemoteError if one of them cannot be opened."""
        opened: list[FramedStream] = []

        async def dial(hello: bytes) -> FramedStream:
            lane = await self._dial(peer_id, name + LANE)
            opened.append(lane)
            await lane.send(hello)
            return lane

        dials = [asyncio.create_task(dial(hello)) for hello in hellos(count)]
        try:
            return StripedStream(await asyncio.gather(*dials))
        except BaseException:
            for task in dials:
                task.cancel()
            for lane in opened:
                lane.abort()
            raise

    def _take_idle(self, peer_id: str, name: str, lanes: int = 1) -> FramedStream | StripedStream | None:
        """The stream that was given back last, if it is still alive, and has as many lanes."""
        idle = self._idle.get((peer_id, name), [])
        while idle:
            stream, timer = idle.pop()
            timer.cancel()
            if stream.usable and stream.lanes == lanes:
                return stream
            stream.abort()
        return None

    def _keep_idle(self, stream: FramedStream | StripedStream, name: str) -> None:
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._drop_idle, stream, name)
        self._idle.setdefault((stream.remote, name), []).append((stream, timer))

    def _drop_idle(self, stream: FramedStream | StripedStream, name: str) -> None:
        key = stream.remote, name
        self._idle[key] = [(kept, timer) for kept, timer in self._idle[key] if kept is not stream]
        if not self._idle[key]:
            del self._idle[key]
        stream.abort()

    def _accept(self, stream: FramedStream, name: str) -> None:
        """Serve an incoming stream in a task of its own, or drop it."""
        key = name, stream.remote
        handler, most = self._stream_handlers[name]
        if self.closed or self._served[key] >= most:
            stream.abort()
            self._reject(RemoteError(f"has {most} streams {name!r} open already"), stream.remote)
            return
        self._served[key] += 1
        stream.pace(self.upload, urgent=name == CALL, last=name in LAST)
        self._streams.add(stream)
        self._spawn(self._serve(stream, handler, key))

    async def _serve(self, stream: FramedStream, handler: StreamHandler, key: tuple[str, str]) -> None:
        try:
            await handler(stream)
        except WireError as error:
            self._reject(error, stream.remote)
        except Exception:
            log.exception("stream handler failed", name=key[0], peer=stream.remote)
        finally:
            self._served[key] -= 1
            if not self._served[key]:
                del self._served[key]
            await stream.close()

    async def _answer_calls(self, stream: Stream) -> None:
        while True:
            try:
                request = await stream.receive(256 + MAX_CALL_BYTES, timeout=2 * IDLE_SECONDS)
            except RemoteError:
                return
            answer = await self._answer(request, stream.remote)
            try:
                await stream.send(answer)
            except RemoteError:
                return

    async def _answer(self, request: bytes, remote: str) -> bytes:
        size = 1 + request[0] if request else 0
        name, body = request[1:size].decode(errors="replace"), request[size:]
        try:
            handler = self._call_handlers.get(name)
            if handler is None:
                raise FrameError(f"no call {name!r} here")
            if len(body) > MAX_CALL_BYTES:
                raise FrameError(f"a request of {len(body)} bytes to {name!r}; at most {MAX_CALL_BYTES} are taken")
            answer = await handler(body, remote)
        except WireError as error:
            self._reject(error, remote)
            return _REFUSED + f"{type(error).__name__}: {error.message}"[:MAX_REASON_CHARS].encode()
        except Exception:
            log.exception("call handler failed", name=name, peer=remote)
            return _REFUSED + b"internal error"
        if len(answer) > MAX_CALL_BYTES:
            log.error("answer too large", name=name, peer=remote, bytes=len(answer), limit=MAX_CALL_BYTES)
            return _REFUSED + b"the answer is too large"
        return _DONE + answer

    def _reject(self, error: WireError, remote: str) -> None:
        """Count bad input; show the first ones, then ever fewer, so that a flood does not fill the disk."""
        kind = type(error).__name__
        self.rejected[kind] = self.rejected.get(kind, 0) + 1
        count = self._noise.count(kind, remote)
        if is_shown(count):
            log.warning("rejected", error=kind, reason=printable(error.message), peer=remote, count=count)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Noise:
    """How often each peer has caused what is shown: nobody's flood hides what another does."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, peer: str) -> int:
        """One more of a kind from a peer: how many by now. Beyond `MAX_NOISY`, strangers are counted together."""
        key = kind, peer
        if key not in self._counts and len(self._counts) >= MAX_NOISY:
            key = kind, ""
        self._counts[key] += 1
        return self._counts[key]


def is_shown(count: int) -> bool:
    """Whether the `count`-th event of a kind that strangers can cause is worth a line in the log."""
    return count <= 8 or count & (count - 1) == 0
