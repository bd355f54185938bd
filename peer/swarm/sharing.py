"""A peer's part in distributing a run's blobs: it serves what it has, finds who has what it lacks, and fetches that."""

import asyncio
import random
from collections.abc import Iterable, Sequence

import structlog

from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.protocol.blobfetch import BlobFetch
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import BLOB, BlobServer
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.holders import LIFE_SECONDS, HolderBook, holders_key
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport

MAX_ASKED = 128
"""Holders that are tried for one blob: anybody can announce addresses where nobody answers."""

DIAL_SECONDS = 5.0
FIND_SECONDS = 10.0
AT_ONCE = 4
"""Blobs that are fetched side by side."""

log = structlog.get_logger(__name__)


class Sharing:
    """Serving, finding and fetching, for one run. The coordinator is the seed: it is asked last."""

    def __init__(
        self, transport: Transport, identity: Identity, run_id: str, coordinator: str, store: BlobStore
    ) -> None:
        self.store = store
        self.directory = Directory(transport)
        self.book = HolderBook(run_id, identity, transport.addresses, lambda endpoint: self.directory.learn([endpoint]))
        self.server = BlobServer(store, self.book)
        self._transport = transport
        self._coordinator = coordinator
        self._key = holders_key(run_id)

    async def start(self) -> None:
        """Serve what is here, and what comes, from now on."""
        await self.server.start(self._transport)

    async def announce(self) -> None:
        """Say in the DHT that versions, or parts of one, can be had here; until cancelled."""
        while True:
            await self._transport.announce(self._key, self.book.own().SerializeToString(), LIFE_SECONDS)
            await asyncio.sleep(LIFE_SECONDS / 3)

    async def find(self) -> None:
        """Learn from the DHT, now and then, who else has something of the run; until cancelled."""
        while True:
            await asyncio.sleep(FIND_SECONDS)
            await self.find_once()

    async def find_once(self) -> None:
        """Look into the DHT once, for at most some seconds."""
        try:
            self.book.take_hints(await self._transport.find(self._key))
        except WireError as error:
            log.debug("no hints from the DHT", reason=str(error))

    async def fetch(self, ref: BlobRef, likely: Sequence[str] = (), *, seeded: bool = True) -> None:
        """Get one blob, unless it is here; `seeded` says whether the coordinator may have it.

        RemoteError when nobody gives what is missing, or nothing comes any more. There is no other bound on its time.
        """
        order: list[str] = []

        def holders() -> list[str]:
            """Those who are likely to have it first, otherwise in any order: not all joiners begin at the same one."""
            for group in (likely, self.directory.known()):
                new = [peer for peer in dict.fromkeys(group) if peer not in order and not self._is_special(peer)]
                random.shuffle(new)
                order.extend(new[: MAX_ASKED - len(order)])
            return order

        async def open_stream(peer: str) -> Stream:
            if peer in likely or peer == self._coordinator:
                await self.directory.reach(peer, DIAL_SECONDS)
                return await self._transport.open_stream(peer, BLOB, DIAL_SECONDS)
            return await self.directory.open_stream(peer, BLOB, DIAL_SECONDS)  # another joiner may dial this one, too

        seed = self._coordinator if seeded else None
        await BlobFetch(ref, self.store, holders, open_stream, seed=seed, book=self.book).run()

    async def fetch_all(self, refs: Iterable[BlobRef], likely: Sequence[str] = (), *, seeded: bool = True) -> None:
        """Get several blobs, a few at a time; RemoteError as soon as one cannot be had."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def get(ref: BlobRef) -> None:
            async with gate:
                await self.fetch(ref, likely, seeded=seeded)

        tasks = [asyncio.create_task(get(ref)) for ref in dict.fromkeys(refs)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_special(self, peer: str) -> bool:
        return peer in (self._coordinator, self._transport.peer_id)
