"""One engine at work: a release, the process that holds it, and whose turn it is."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, Self

from hivegrpo.peer.serving.backend import Backend, Piece
from hivegrpo.peer.serving.dialects import Dialect, engine_environment
from hivegrpo.peer.serving.process import Process
from hivegrpo.peer.serving.prompts import Encoded, PromptReader
from hivegrpo.peer.serving.refusals import unavailable
from hivegrpo.peer.serving.releases import Release, held
from hivegrpo.peer.serving.sampling import Defaults, Sampling
from hivegrpo.protocol.errors import HiveError, RemoteError

START_SECONDS = 1800.0
"""How long an engine may take to load a model."""
POLL_SECONDS = 0.1
BROKEN = (OSError, ValueError, TypeError, AttributeError, RecursionError)
"""What a machine without room for another process raises, and a folder that is not what it seems."""
MAX_PORTS = 3
"""Tried for one start: another program of this machine may take a port before the engine has it."""
TURN_SECONDS = 600.0
"""How long a request may wait for its turn."""


class Child(Protocol):
    """The process that an engine's backend speaks to."""

    @property
    def running(self) -> bool:
        """Whether it has not ended."""

    def listens(self, port: int) -> bool:
        """Whether the one who listens at a TCP port is it, or one that it has started."""

    async def ended(self) -> int:
        """Its exit code, once it has ended."""

    async def stop(self) -> None:
        """End it."""

    def said(self) -> str:
        """What it wrote last."""


class PortTakenError(HiveError):
    """Somebody else listens where an engine was to."""


class Engine:
    """Answers for one release, until it is closed or its process is lost."""

    def __init__(
        self,
        release: Release,
        child: Child,
        backend: Backend,
        reader: PromptReader,
        dialect: Dialect,
        keep: ExitStack | None = None,
    ) -> None:
        """keep: what is closed last."""
        self.release = release
        self.child = child
        self.reader = reader
        self.defaults = Defaults.read(release.folder)
        self.lost = False
        """Set when its process has ended by itself."""
        self._backend = backend
        self._dialect = dialect
        self._keep = keep or ExitStack()
        self._turns = asyncio.Semaphore(dialect.slots)
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[Self]:
        """A request that this engine answers: while there is one, it is not idle."""
        self._requests += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._idle.set()

    async def idle(self, seconds: float) -> bool:
        """Whether its requests are done, after at most that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    async def generate(self, prompt: Encoded, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer, when it is its turn. Leaving early stops the work on it. Refusal if it fails."""
        payload = self._dialect.payload(prompt, sampling, self.defaults)
        async with self._turn():
            try:
                async with aclosing(self._backend.generate(payload)) as pieces:
                    async for piece in pieces:
                        yield piece
            except RemoteError as error:
                raise unavailable(f"This answer was lost: {error.message}.") from None

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turns.acquire()
        except TimeoutError:
            raise unavailable(f"The request waited {TURN_SECONDS:.0f} seconds for its turn.") from None
        try:
            if self.lost:
                raise unavailable("The engine was lost while the request waited for its turn.")
            yield
        finally:
            self._turns.release()

    async def become_ready(self, port: int) -> None:
        """Wait until it has loaded its model and given an answer; HiveError if it ends, fails or takes too long.

        PortTakenError if somebody else answers at its port, who gets no prompt then.
        """
        try:
            async with asyncio.timeout(START_SECONDS):
                prompt = await self.reader.warm_up()
                # It can only be asked.
                while self.child.running and not await self._backend.healthy():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
                theirs = not await asyncio.to_thread(self.child.listens, port)
                if theirs and self.child.running:
                    raise PortTakenError(f"Another program took the engine's port {port} while the engine started.")
                if theirs:
                    raise HiveError(f"The engine ended while it started. {self.child.said()}")
                payload = self._dialect.payload(prompt, Sampling(1, 0.0, 1.0, 0), self.defaults)
                async with aclosing(self._backend.generate(payload)) as pieces:
                    async for _ in pieces:
                        pass
        except TimeoutError:
            raise HiveError(
                f"The engine was not ready after {START_SECONDS:.0f} seconds. {self.child.said()}"
            ) from None
        except RemoteError as error:
            raise HiveError(f"The engine does not answer: {error.message}. {self.child.said()}") from None
        if not self.child.running:
            raise HiveError(f"The engine ended while it started. {self.child.said()}")

    async def close(self) -> None:
        """End its process; answers that it still works on are lost."""
        await self.child.stop()
        await self._backend.close()
        self.reader.close()
        self._keep.close()


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts engines of one kind as processes of their own."""

    dialect: Dialect

    async def __call__(self, release: Release) -> Engine:
        """An engine that is ready; HiveError if it does not get there, and nothing is left of it then."""
        try:
            for _ in range(MAX_PORTS - 1):
                with suppress(PortTakenError):
                    return await self._start(release, _free_port())
            return await self._start(release, _free_port())
        except BROKEN as error:
            raise HiveError(f"The engine cannot be started: {type(error).__name__}: {error}.") from error

    async def _start(self, release: Release, port: int) -> Engine:
        kept = ExitStack()
        with ExitStack() as keep:
            keep.enter_context(held(release.folder))
            reader = await asyncio.to_thread(PromptReader.open, release.folder)
            command = self.dialect.command(port)
            child = await Process.start(command, folder=release.folder, environment=engine_environment())
            try:
                backend = Backend(f"http://127.0.0.1:{port}")
                engine = Engine(release, child, backend, reader, self.dialect, kept)
            except BaseException:
                await child.stop()
                raise
            kept.push(keep.pop_all())
        try:
            await engine.become_ready(port)
        except BaseException:
            await engine.close()
            raise
        return engine


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
