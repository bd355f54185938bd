"""Getting one blob from several holders at once.

Each holder that is asked has a task of its own, which chooses the pieces that fewest others offer, two ahead. A holder
with nothing left to give takes over what slow ones were asked for. Who serves a wrong piece is asked for nothing of
this blob again; who fails is tried again a few times. The seed, usually the coordinator, is asked only for what nobody
else gives. What bounds a fetch is progress, not time: it ends when nothing has come from anybody for a while,
or nobody is left to ask.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore, PartialBlob
from hivegrpo.protocol.blobstream import BLOB, MAX_BLOB_BYTES, BlobReader
from hivegrpo.protocol.errors import CommitmentError, FrameError, RemoteError, StaleError, WireError
from hivegrpo.protocol.holders import HolderBook
from hivegrpo.protocol.transport.base import Stream, Transport

STALL_SECONDS = 60.0
"""A fetch ends after so long without 128 KiB from anybody: slower links than 17 kbit/s are not waited for."""

SEED_PATIENCE = 5.0
"""Seconds without anything from other holders, after which the seed is asked. At once, if nobody else can be."""

ORPHAN_PATIENCE = 0.2
"""Share of that patience after which the seed is asked for a piece that nobody else offers, if all have said what they
have."""

MAX_SOURCES = 8
"""Holders that are asked at once."""

AHEAD = 2
"""Pieces that one holder is asked for at once, so that the line does not fall silent between two."""

SLOW_SECONDS = 2.0
"""A piece that has been asked for so long ago may be asked of somebody else, too, once nothing else is left to ask."""

TICK_SECONDS = 0.5
MAP_SECONDS = 1.0
"""How often a holder that has nothing to give is asked whether it has more by now."""

ROTATE_SECONDS = 5.0
"""After so long without a piece to give, a holder makes room for another."""

BEGIN_SECONDS = 15.0
MAX_FAILURES = 4
"""Failures in a row of one holder, after which it is left alone."""

SEED_REFUSALS = 2
SAMPLE = 32
"""Pieces that are compared by how many offer them."""

log = structlog.get_logger(__name__)

OpenStream = Callable[[str], Awaitable[Stream]]


class _Source:
    """A holder that is being asked."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.reader: BlobReader | None = None
        self.asked: deque[int] = deque()
        """Pieces on their way, in order."""
        self.idle_since: float | None = None
        self.mapped_at = asyncio.get_running_loop().time()


class BlobFetch:
    """One blob on its way into a store. `run` it once."""

    def __init__(
        self,
        ref: BlobRef,
        store: BlobStore,
        holders: Callable[[], Sequence[str]],
        open_stream: OpenStream,
        *,
        seed: str | None = None,
        book: HolderBook | None = None,
        stall: float = STALL_SECONDS,
        patience: float = SEED_PATIENCE,
    ) -> None:
        """`holders` gives those that may have it, the likeliest first, and is asked again and again: more may turn up.

        `book` says who this node is, to those that are asked, and takes what they tell of others. Times in seconds.
        """
        self._ref = ref
        self._store = store
        self._holders = holders
        self._open_stream = open_stream
        self._seed = seed
        self._book = book
        self._stall = stall
        self._patience = patience
        self._clock = asyncio.get_running_loop().time
        self._part: PartialBlob | None = None
        self._beginning = asyncio.Lock()
        self._order: list[int] = []
        """Missing pieces in a random order of this fetch's own, and some that are here by now."""
        self._flying: dict[int, dict[str, float]] = {}
        """Of each piece that is on its way, since when from whom."""
        self._sources: dict[str, tuple[_Source, asyncio.Task[None]]] = {}
        self._lied: set[str] = set()
        self._served: set[str] = set()
        """Who has shown that it has something: it is tried again if it fails."""
        self._refused: set[str] = set()
        """Who answered, but had nothing, or no time: it may later."""
        self._turns: Counter[str] = Counter()
        """How often each was asked: those that were asked least go first."""
        self._failures: Counter[str] = Counter()
        self._rests: dict[str, float] = {}
        """When a holder that has failed may be tried again."""
        self._reasons: dict[str, str] = {}
        self._heard = self._given = self._offered = self._clock()
        """When something came from anybody; from others than the seed; when others offered all that is missing."""
        self._news = asyncio.Event()

    async def run(self) -> Path:
        """The blob's file. RemoteError when nobody gives what is missing; what came is kept for another attempt."""
        here = self._store.path(self._ref)
        if here is not None:
            return here
        if self._ref.size > MAX_BLOB_BYTES:
            raise FrameError(f"a blob of {self._ref.size} bytes is above the bound of {MAX_BLOB_BYTES}")
        try:
            while self._part is None or not self._part.whole:
                self._look_around()
                news = self._news
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK_SECONDS):
                        await news.wait()
            await self._end_all()
            await asyncio.to_thread(self._part.finish)
        finally:
            if self._part is not None:
                self._store.end(self._part)
            await self._end_all()
        return self._store.folder / self._ref.root.hex()

    def _look_around(self) -> None:
        """Begin to ask whoever is worth it. RemoteError if nobody is, or nothing comes any more."""
        now = self._clock()
        for source, task in list(self._sources.values()):
            if task.done():
                del self._sources[source.peer]
                task.result()  # what is nobody's fault but ours: a full disk
        others = [peer for peer in self._sources if peer != self._seed]
        usable = [peer for peer in dict.fromkeys(self._holders()) if peer != self._seed and self._is_usable(peer)]
        idle = [peer for peer in usable if peer not in self._sources]
        ready = [peer for peer in idle if self._rests.get(peer, now) <= now]
        ready.sort(key=lambda peer: self._turns[peer])
        for peer in ready[: max(0, self._worthwhile(now) - len(others))]:
            self._start(peer)
        later = any(peer in self._refused for peer in idle)
        others_may = bool(others or ready or any(peer in self._served for peer in idle))
        if self._seed is not None and self._is_usable(self._seed) and self._seed not in self._sources:
            rested = self._rests.get(self._seed, now) <= now
            if rested and (not (others_may or later) or self._is_seed_due(now)):
                self._start(self._seed)
        if not self._sources and not others_may and not self._may_seed_help(later):
            raise self._failure("nobody else is known")
        if now - self._heard > self._stall:
            raise self._failure(f"nothing came within {self._stall:g} s")

    def _may_seed_help(self, later: bool) -> bool:
        """Whether the seed has not refused, or may yet be asked again, `later`, when others have been waited for.

        What neither it nor anybody else has, though it was asked twice, is not waited for: versions go on meanwhile.
        """
        if self._seed is None or not self._is_usable(self._seed):
            return False
        if self._seed in self._refused and self._failures[self._seed] >= SEED_REFUSALS and not self._served:
            return False
        return later or self._seed in self._served or not self._failures[self._seed]

    def _is_usable(self, peer: str) -> bool:
        return peer not in self._lied and self._failures[peer] < MAX_FAILURES

    def _worthwhile(self, now: float) -> int:
        """How many holders to ask: no more than there are pieces, and one more for each moment of silence."""
        left = self._ref.pieces - (0 if self._part is None else len(self._part.have))
        silence = int((now - self._heard) / SLOW_SECONDS)
        return min(MAX_SOURCES, max(1, left) + silence + len(self._tardy(now)))

    def _tardy(self, now: float) -> list[int]:
        """Pieces that have been on their way for long, from one holder only; the longest first."""
        since = {index: min(times.values()) for index, times in self._flying.items() if len(times) == 1}
        return sorted((index for index in since if now - since[index] > SLOW_SECONDS), key=since.__getitem__)

    def _is_seed_due(self, now: float) -> bool:
        """Whether others have given nothing for too long, or something that is missing is offered by none of them.

        Somebody who was asked, and has not said yet what it has, may offer it: that is waited for, but no longer than
        for anything to come.
        """
        others = [source.reader for source, _ in self._sources.values() if source.peer != self._seed]
        if self._part is not None:
            offered = int.from_bytes(self._store.map(self._ref), "little")
            for reader in others:
                offered |= 0 if reader is None else int.from_bytes(reader.have, "little")
            if offered == (1 << self._ref.pieces) - 1:
                self._offered = now
        orphan_patience = self._patience if None in others else ORPHAN_PATIENCE * self._patience
        return now - self._given > self._patience or now - self._offered > orphan_patience

    def _start(self, peer: str) -> None:
        source = _Source(peer)
        self._turns[peer] += 1
        self._sources[peer] = source, asyncio.create_task(self._ask(source))

    async def _ask(self, source: _Source) -> None:
        """Take what one holder gives, for as long as it is useful."""
        try:
            async with await self._open_stream(source.peer) as stream:
                reader = BlobReader(stream, self._ref)
                leaves, told = await reader.begin(None if self._book is None else self._book.own(), BEGIN_SECONDS)
                self._served.add(source.peer)
                self._learn(told)
                part = await self._begin(leaves)
                source.reader = reader
                self._notify()
                await self._take(source, reader, part)
        except (CommitmentError, FrameError) as error:
            self._lied.add(source.peer)
            self._reasons[source.peer] = error.message
            log.warning("a holder serves what is not the blob", peer=source.peer, reason=error.message)
        except WireError as error:
            self._reasons[source.peer] = error.message
            log.debug("a holder failed", peer=source.peer, reason=error.message)
            self._rests[source.peer] = self._clock() + TICK_SECONDS * 2 ** self._failures[source.peer]
            self._failures[source.peer] += 1
            if isinstance(error, StaleError):
                self._refused.add(source.peer)
        finally:
            for index in source.asked:
                self._land(index, source.peer)
            self._notify()

    async def _begin(self, leaves: Sequence[bytes]) -> PartialBlob:
        """Know the leaf hashes, and what is here already."""
        async with self._beginning:
            if self._part is None:
                part = PartialBlob(self._store.folder, self._ref, leaves)
                await asyncio.to_thread(part.resume)
                self._store.begin(part)
                self._order = [index for index in range(self._ref.pieces) if index not in part.have]
                random.shuffle(self._order)
                self._part = part
            return self._part

    async def _take(self, source: _Source, reader: BlobReader, part: PartialBlob) -> None:
        while not part.whole:
            while len(source.asked) < self._ahead(part) and (index := self._choose(source, reader, part)) is not None:
                self._flying.setdefault(index, {})[source.peer] = self._clock()
                source.asked.append(index)
                await reader.ask(index)
            if source.asked:
                source.idle_since = None
                await self._take_piece(source, reader, part)
            elif not await self._wait(source, reader):
                return

    def _ahead(self, part: PartialBlob) -> int:
        """How many pieces to ask of one holder at once: few are left for all."""
        unasked = self._ref.pieces - len(part.have) - len(self._flying)
        return AHEAD if unasked > len(self._sources) else 1

    async def _take_piece(self, source: _Source, reader: BlobReader, part: PartialBlob) -> None:
        """The piece that was asked for first."""
        index = source.asked[0]
        left = self._ref.piece_size(index)
        blocks: list[bytes] = []
        while left:
            block = await reader.read_block(left, self._stall)
            if not block and not blocks:
                reader.withdraw(index)
                break
            if not block:
                raise FrameError("a piece that ends in the middle")
            blocks.append(block)
            left -= len(block)
            if index not in part.have:
                self._hear(source)
        if not left and index not in part.have:
            await asyncio.to_thread(part.add, index, b"".join(blocks))
            part.note(index)
            self._failures[source.peer] = 0
        source.asked.popleft()
        self._land(index, source.peer)
        self._notify()

    async def _wait(self, source: _Source, reader: BlobReader) -> bool:
        """Until there may be something to ask of this holder; False if somebody else should be asked in its place."""
        now = self._clock()
        source.idle_since = now if source.idle_since is None else source.idle_since
        if source.peer == self._seed:
            return False
        if now - source.idle_since > ROTATE_SECONDS and self._is_crowded(now):
            self._rests[source.peer] = now + ROTATE_SECONDS
            return False
        news = self._news
        with suppress(TimeoutError):
            async with asyncio.timeout(MAP_SECONDS):
                await news.wait()
        if self._clock() - source.mapped_at >= MAP_SECONDS:
            await reader.ask_map()
            self._learn(await reader.read_map(BEGIN_SECONDS))
            source.mapped_at = self._clock()
        return True

    def _is_crowded(self, now: float) -> bool:
        """Whether somebody waits to be asked, and no more can be."""
        if len(self._sources) < MAX_SOURCES:
            return False
        waiting = [peer for peer in self._holders() if peer not in self._sources and peer != self._seed]
        return any(self._is_usable(peer) and self._rests.get(peer, now) <= now for peer in waiting)

    def _choose(self, source: _Source, reader: BlobReader, part: PartialBlob) -> int | None:
        """The piece to ask of this holder: of those that nobody was asked for, one that few offer; else a tardy one."""
        if source.peer == self._seed and not self._may_ask_seed(source):
            return None
        if len(self._order) > 2 * (self._ref.pieces - len(part.have)):
            self._order = [index for index in self._order if index not in part.have]
        sample: list[int] = []
        for index in self._order:
            if index not in part.have and index not in self._flying and reader.offers(index):
                sample.append(index)
                if len(sample) == SAMPLE:
                    break
        if sample:
            readers = [other.reader for other, _ in self._sources.values() if other.reader is not None]
            return min(sample, key=lambda index: sum(other.offers(index) for other in readers))
        for index in self._tardy(self._clock()):
            if source.peer not in self._flying[index] and reader.offers(index):
                return index
        return None

    def _may_ask_seed(self, source: _Source) -> bool:
        """One piece at a time, for as long as it is due, or nobody else is being asked."""
        others = any(other.reader is not None for other, _ in self._sources.values() if other is not source)
        return not others or (not source.asked and self._is_seed_due(self._clock()))

    def _land(self, index: int, peer: str) -> None:
        """A piece is no longer on its way from somebody."""
        since = self._flying.get(index, {})
        since.pop(peer, None)
        if not since:
            self._flying.pop(index, None)

    def _hear(self, source: _Source) -> None:
        self._heard = self._clock()
        if source.peer != self._seed:
            self._given = self._heard

    def _learn(self, told: Sequence[pb.Signed]) -> None:
        if self._book is not None:
            self._book.take_told(told)

    def _notify(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _end_all(self) -> None:
        tasks = [task for _, task in self._sources.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _failure(self, why: str) -> RemoteError:
        reasons = "; ".join(f"{peer}: {reason}" for peer, reason in list(self._reasons.items())[:8])
        here = 0 if self._part is None else len(self._part.have)
        return RemoteError(
            f"no holder served blob {self._ref.root.hex()[:16]}: {why}, "
            f"and {here} of its {self._ref.pieces} pieces are here ({reasons or 'none known'})"
        )


async def fetch_blob(
    transport: Transport,
    ref: BlobRef,
    holders: Sequence[str],
    store: BlobStore,
    *,
    seed: str | None = None,
    stall: float = STALL_SECONDS,
    within: float | None = None,
) -> Path:
    """Get a blob from peers to which there is a connection, and keep it in `store`.

    RemoteError when none of them gives what is missing, when nothing comes for `stall` seconds, or, if bounded,
    when it is not whole `within` so many seconds.
    """
    fetch = BlobFetch(
        ref, store, lambda: holders, lambda peer: transport.open_stream(peer, BLOB), seed=seed, stall=stall
    )
    try:
        async with asyncio.timeout(within):
            return await fetch.run()
    except TimeoutError:
        raise RemoteError(f"blob {ref.root.hex()[:16]} was not here within {within:g} s") from None
