"""Catching up: the chain from the coordinator or any peer, the newest anchor, the updates since, and the reference."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import structlog

from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.versions import Versions, ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.chainstream import extend_chain
from hivegrpo.protocol.envelope import open_signed, parse
from hivegrpo.protocol.errors import ChainError, RemoteError, WireError
from hivegrpo.protocol.transport.base import Transport

log = structlog.get_logger(__name__)

HOLDERS_KEY = "holders"
MAX_ASKED = 128
"""Holders that are dialled for one blob, all at once: anybody can announce addresses where nobody answers."""

ATTEMPTS = 12
FIRST_PAUSE, LAST_PAUSE = 0.1, 2.0


class Synchroniser:
    """Brings `versions` to the head of the chain. The coordinator is asked last for bulk data."""

    def __init__(
        self, versions: Versions, transport: Transport, directory: Directory, coordinator: str, worker: Executor
    ) -> None:
        self._versions = versions
        self._transport = transport
        self._directory = directory
        self._coordinator = coordinator
        self._worker = worker

    async def run(self) -> None:
        """Verify the chain up to the newest version and get its state. RemoteError if nobody has what is missing."""
        await self._extend()
        reason: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                await self._advance()
                return
            except WireError as error:
                reason = error
                log.info("synchronising; not everything can be had yet", reason=str(error))
                await asyncio.sleep(min(FIRST_PAUSE * 2**attempt, LAST_PAUSE))
                await self._ask_directory()
                await self._extend()
        raise RemoteError(f"version {self._versions.chain.height} cannot be had from anyone now: {reason}")

    async def fetch(self, ref: BlobRef, also: Sequence[str] = ()) -> None:
        """Get one blob from the peers that may have it, the coordinator last, unless it is here."""
        if self._versions.store.has(ref):
            return
        holders = [*also, *self._directory.known()]
        holders = [peer for peer in dict.fromkeys(holders) if peer not in (self._coordinator, self._transport.peer_id)]
        found = await asyncio.gather(*map(self._is_reached, holders[:MAX_ASKED]))
        reached = [peer for peer, here in zip(holders, found, strict=False) if here]
        await fetch_blob(self._transport, ref, [*reached, self._coordinator], self._versions.store)

    async def _is_reached(self, peer: str) -> bool:
        try:
            await self._directory.reach(peer, timeout=3.0)
        except WireError as error:
            log.debug("a holder is out of reach", peer=peer, reason=str(error))
            return False
        return True

    async def _extend(self) -> None:
        """Chain entries; they come from the coordinator, or else from whoever has them."""
        chain = self._versions.chain
        for holder in [self._coordinator, *self._directory.known()]:
            try:
                before = chain.height
                await extend_chain(self._transport, holder, chain, self._versions.extend)
                log.debug("extended the chain", versions=chain.height - before)
                return
            except WireError as error:
                log.debug("no chain from this holder", holder=holder, reason=str(error))
            except ChainError as error:
                if holder == self._coordinator:
                    raise
                log.warning("a holder serves a chain that does not verify", holder=holder, reason=str(error))

    async def _advance(self) -> None:
        versions = self._versions
        anchor = versions.newest_anchor()
        if anchor > versions.version:
            entry = versions.chain.entries[anchor]
            try:
                await self.fetch(ref_of(entry.manifest.message.state), self._roster(anchor))
                await self._on_worker(versions.load_anchor, anchor)
            except RemoteError as error:
                log.info("the newest anchor is not to be had; replaying updates", anchor=anchor, reason=str(error))
        while versions.version < versions.chain.height:
            following = versions.version + 1
            for ref in versions.span_refs(following):
                await self.fetch(ref, self._roster(following))
            await self._on_worker(versions.replay_next)
        reference = versions.missing_reference()
        if reference is not None:
            await self.fetch(ref_of(versions.chain.entries[reference].manifest.message.state), self._roster(reference))
            await self._on_worker(versions.load_reference, reference)

    async def _on_worker(self, function: Callable[..., None], *args: int) -> None:
        """On the one thread that changes versions."""
        await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def _roster(self, version: int) -> list[str]:
        """Those who took part in making a version have its spans."""
        plan = self._versions.chain.entries[version].plan
        if plan is None:
            return []
        self._directory.learn(plan.message.reducers)
        return [reducer.peer for reducer in plan.message.reducers]

    async def _ask_directory(self) -> None:
        """Holders that announced themselves in the DHT; each record must be signed by the peer it speaks of."""
        run_id = self._versions.chain.run_id
        hints = await self._transport.find(f"{run_id[:16]}/{HOLDERS_KEY}")
        for peer, value in hints.items():
            try:
                endpoint = open_signed(parse(pb.Signed, value), run_id, pb.Endpoint, signer=peer).message
                if endpoint.peer == peer:
                    self._directory.learn([endpoint])
            except WireError as error:
                log.debug("a hint in the DHT does not verify", peer=peer, reason=str(error))
