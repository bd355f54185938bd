"""What an address offers: its verified chain, and the blobs of one policy version, kept in the run's cache.

The cache is a home like a coordinator's or a peer's, so what was fetched is read like theirs, also without a network.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from hivegrpo.peer.inference.locate import BLOBS, CACHE, LocalRun, open_run
from hivegrpo.peer.inference.states import Revision
from hivegrpo.peer.materials import file_refs
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import extend_chain, find_chain
from hivegrpo.protocol.errors import HiveError, UnreachableError, WireError
from hivegrpo.protocol.files import remove_temporaries
from hivegrpo.protocol.homes import locked_home, run_folder
from hivegrpo.protocol.transport.base import Transport

DIAL_SECONDS = 3.0
KEPT_SECONDS = 3600.0
"""How long the cache keeps what the last command did not need: another one may be reading it."""


async def mirror_run(
    address: str, revision: Revision | None, connect: Callable[[], Awaitable[Transport]], *, rows: bool = False
) -> Path:
    """Fetch what `revision` needs from the run at `address`, as far as it is to be had; the run's folder here.

    None needs nothing but the chain. rows: whether to fetch the rows that travel with the run, too: those it trains on,
    and is measured on.
    UnreachableError if nobody answers or the answer breaks off, ChainError if what comes does not verify, BusyError if
    another process fetches this run.
    """
    parse_address(address)
    transport = await connect()
    try:
        coordinator = await transport.connect([address])
        found = await find_chain(transport, coordinator)
        folder = run_folder(found.run_id)
        with locked_home(folder / CACHE) as cache:
            chainfile = ChainFile.create(cache, found.run, coordinator, found.successions)
            await extend_chain(transport, coordinator, chainfile.chain, chainfile.append)
            remove_temporaries(cache)
            if revision is not None:
                store = BlobStore(cache / BLOBS)
                fetcher = _Fetcher(transport, open_run(folder), store)
                await fetcher.fetch(revision)
                if rows:
                    await fetcher.fetch_rows()
                store.sweep(fetcher.used, KEPT_SECONDS)
    except WireError as error:
        raise UnreachableError(
            f"The run at {address} could not be read: {error}.",
            "Check that its coordinator runs and try again; what was fetched so far is kept.",
        ) from error
    finally:
        await transport.close()
    return folder


class _Fetcher:
    """Gets blobs that no home here has, from the newest version's reducers and the coordinator."""

    def __init__(self, transport: Transport, run: LocalRun, store: BlobStore) -> None:
        self._transport = transport
        self._run = run
        self._store = store
        self.used: set[bytes] = set()
        """Roots of the blobs that were asked for, whoever has them."""
        self._holders: list[str] = []

    async def fetch(self, revision: Revision) -> None:
        """The base model's files, which have to come, then the newest state at or before `revision` and its updates."""
        await self._find_holders()
        manifest = self._run.chain.manifest.message
        file_refs(manifest)
        for file in manifest.model:
            await self._get(ref_of(file.blob))
        if revision != "base":
            await self._fetch_state(self._run.chain.height if revision == "latest" else revision)

    async def fetch_rows(self) -> None:
        """The rows that travel with the run, as far as they are to be had; after `fetch`."""
        manifest = self._run.chain.manifest.message
        for file in (manifest.dataset, manifest.evaluation):
            if file.name:
                await self._try([file.blob])

    async def _fetch_state(self, version: int) -> None:
        """Walk back from a version to one whose state is to be had.

        An anchor archived by the coordinator is at most two distances back; further down nothing is kept for sure.
        """
        config = self._run.config
        every = config.distribution.anchor_every
        number = min(version, self._run.chain.height)
        for _ in range(2 * every):
            if number <= 0:
                return
            manifest = self._run.chain.entries[number].manifest.message
            restores = manifest.HasField("restores")
            is_anchor = number % every == 0 or number == config.run.versions or restores
            if is_anchor and await self._try([manifest.state]):
                return
            await self._try(manifest.spans)
            number = manifest.restores if restores else number - 1

    async def _try(self, blobs: Sequence[pb.Blob]) -> bool:
        try:
            for blob in blobs:
                await self._get(ref_of(blob))
        except WireError:
            return False
        return True

    async def _get(self, ref: BlobRef) -> None:
        self.used.add(ref.root)
        if self._run.has(ref):
            self._store.touch(ref)
        else:
            coordinator = self._run.chain.coordinator
            await fetch_blob(self._transport, ref, self._holders, self._store, seed=coordinator)

    async def _find_holders(self) -> None:
        head = self._run.chain.head
        reducers = head.plan.message.reducers if head is not None and head.plan is not None else []
        found = await asyncio.gather(*(self._dial(reducer) for reducer in reducers))
        self._holders = list(filter(None, found))

    async def _dial(self, reducer: pb.Reducer) -> str | None:
        """The reducer's peer id if it answers; it may be gone, or behind a NAT."""
        try:
            return await self._transport.connect(list(reducer.addresses), DIAL_SECONDS)
        except HiveError:
            return None
