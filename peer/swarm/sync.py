"""Catching up: the chain from the coordinator or any peer, the newest anchor, the updates since, and the reference."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

import structlog

from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol.chainstream import extend_chain
from hivegrpo.protocol.errors import ChainError, RemoteError, WireError
from hivegrpo.protocol.transport.base import Transport

log = structlog.get_logger(__name__)

ATTEMPTS = 12
FIRST_PAUSE, LAST_PAUSE = 0.1, 2.0

MAX_CHAIN_HOLDERS = 16
"""Peers that are asked for the chain when the coordinator is away, one after the other."""
FIRST_FIND_SECONDS = 2.0
"""How long the DHT is waited for before a whole state is fetched; it is asked again meanwhile."""


class Synchroniser:
    """Brings `versions` to the head of the chain. The coordinator is asked last for bulk data."""

    def __init__(self, versions: Versions, transport: Transport, sharing: Sharing, worker: Executor) -> None:
        """`worker` is the one thread that changes `versions`."""
        self._versions = versions
        self._transport = transport
        self._sharing = sharing
        self._coordinator = versions.chain.coordinator
        self._worker = worker

    async def run(self) -> None:
        """Verify the chain up to the newest version and get its state. RemoteError if nobody has what is missing.

        A blob that is damaged on this disk is removed, and fetched again.
        """
        await self._extend()
        if self._versions.newest_anchor() > self._versions.version:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_FIND_SECONDS):
                    await self._sharing.find_once()
        finding = asyncio.create_task(self._sharing.find())
        try:
            await self._try_again_and_again()
        finally:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)
        self._sharing.store.sweep_parts()

    async def _try_again_and_again(self) -> None:
        reason: Exception | None = None
        for attempt in range(ATTEMPTS):
            try:
                await self._advance()
                return
            except WireError as error:
                reason = error
                log.info("synchronising; not everything can be had yet", reason=str(error))
                await asyncio.sleep(min(FIRST_PAUSE * 2**attempt, LAST_PAUSE))
                await self._sharing.find_once()
                await self._extend()
        raise RemoteError(f"version {self._versions.chain.height} cannot be had from anyone now: {reason}")

    async def _extend(self) -> None:
        """Chain entries; they come from the coordinator, or else from whoever has them."""
        chain = self._versions.chain
        for holder in [self._coordinator, *self._sharing.directory.known()[:MAX_CHAIN_HOLDERS]]:
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
        versions, sharing = self._versions, self._sharing
        anchor = versions.newest_anchor()
        if anchor > versions.version:
            try:
                await sharing.fetch(versions.state_ref(anchor), self._roster(anchor))
                await self._on_worker(versions.load_anchor, anchor)
            except RemoteError as error:
                log.info("the newest anchor is not to be had; replaying updates", anchor=anchor, reason=str(error))
        while versions.version < versions.chain.height:
            following = versions.version + 1
            rollback = versions.is_rollback(following)
            await sharing.fetch_all(versions.update_refs(following), self._roster(following), seeded=rollback)
            await self._on_worker(versions.advance)
        reference = versions.missing_reference()
        if reference is not None:
            await sharing.fetch(versions.state_ref(reference), self._roster(reference))
            await self._on_worker(versions.load_reference, reference)

    async def _on_worker(self, function: Callable[..., None], *args: int) -> None:
        """On the one thread that changes versions."""
        await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def _roster(self, version: int) -> list[str]:
        """Those who took part in making a version have its spans."""
        plan = self._versions.chain.entries[version].plan
        if plan is None:
            return []
        self._sharing.directory.learn(plan.message.reducers)
        return [reducer.peer for reducer in plan.message.reducers]
