"""The sessions of peers that follow: a bounded queue of frames each, and when each was last heard of."""

import asyncio
from collections.abc import Callable, Sequence

from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.base import Stream

QUEUE_FRAMES = 256
SEND_SECONDS = 30.0
FAREWELL_SECONDS = 2.0
SESSION_SECONDS = 366 * 86_400.0
"""A follower says nothing after its join, so reading only waits for its end; silence is noticed by heartbeats."""


class Session:
    """One follow stream: frames out, and nothing in."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_FRAMES)
        self._ended = asyncio.Event()

    def push(self, frame: bytes | None) -> None:
        """Queue a frame, or the end after what is queued. A follower that does not drain is dropped."""
        try:
            self._frames.put_nowait(frame)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """Drop the session now."""
        self._ended.set()

    def replace(self, farewell: bytes) -> None:
        """Drop the session once it was told why, or after a moment."""
        self.push(farewell)
        self.push(None)
        asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self.end)

    async def run(self) -> None:
        """Until either side ends it, as a session usually does; FrameError if the follower talks."""
        tasks = [asyncio.create_task(work) for work in (self._write(), self._read(), self._wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, (asyncio.CancelledError, RemoteError)):
                raise result

    async def _write(self) -> None:
        while (frame := await self._frames.get()) is not None:
            await self._stream.send(frame, SEND_SECONDS)

    async def _read(self) -> None:
        await self._stream.receive(0, SESSION_SECONDS)
        raise FrameError("a follower sends nothing after its join")

    async def _wait(self) -> None:
        await self._ended.wait()


class Followers:
    """Sessions by peer, one each: a newer one of the same peer takes the place of the older."""

    def __init__(self, patience: float, on_change: Callable[[], None]) -> None:
        """`patience`: seconds without a sign of life after which a peer is dropped; `on_change`: a session ended."""
        self._patience = patience
        self._on_change = on_change
        self._sessions: dict[str, Session] = {}
        self._heard: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, peer: str, stream: Stream, now: float, farewell: bytes) -> Session:
        """Register a session; frames pushed from now on go to it. An older one of the peer gets `farewell` at last."""
        older = self._sessions.get(peer)
        if older is not None:
            older.replace(farewell)
        session = self._sessions[peer] = Session(stream)
        self.hear(peer, now)
        return session

    def forget(self, peer: str, session: Session) -> bool:
        """A session has ended. True if it was still the peer's current one: the peer is gone."""
        if self._sessions.get(peer) is not session:
            return False
        del self._sessions[peer]
        self._heard.pop(peer, None)
        self._on_change()
        return True

    def push(self, peers: Sequence[str] | None, frame: bytes) -> None:
        """Queue a frame for those of `peers` (None: all) that follow."""
        for peer in list(self._sessions) if peers is None else peers:
            session = self._sessions.get(peer)
            if session is not None:
                session.push(frame)

    def hear(self, peer: str, now: float) -> None:
        """Note a sign of life of a peer that follows."""
        if peer in self._sessions:
            self._heard.pop(peer, None)
            self._heard[peer] = now

    def end(self, peer: str) -> None:
        """Drop a peer's session."""
        if peer in self._sessions:
            self._sessions[peer].end()

    def drop_silent(self, now: float) -> float | None:
        """Drop the sessions of peers that were silent for too long; when to look again."""
        while self._heard:
            peer, heard = next(iter(self._heard.items()))
            if now < heard + self._patience:
                return heard + self._patience
            self.end(peer)
            del self._heard[peer]
        return None

    async def close(self, timeout: float) -> None:
        """Send what is queued, then end all sessions, the slow ones after `timeout` seconds."""
        ended = asyncio.Event()
        self._on_change = lambda: None if self._sessions else ended.set()
        for session in self._sessions.values():
            session.push(None)
        if self._sessions:
            try:
                async with asyncio.timeout(timeout):
                    await ended.wait()
            except TimeoutError:
                for session in self._sessions.values():
                    session.end()
