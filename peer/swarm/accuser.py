"""Reports faults: keeps each proof on disk, serves it, and asks the coordinator until it has judged it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from hivegrpo.peer.swarm.faults import judge
from hivegrpo.peer.swarm.session import Session
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.history import History

log = structlog.get_logger(__name__)

MAX_WAITING = 8
"""Faults that wait to be proved; more are dropped, since each keeps a span's chunks in memory."""

ASK_SECONDS = 1.0
GIVE_UP_SECONDS = 600.0
BUSY = "busy"
"""First word of the coordinator's answer while it has not judged a proof yet."""

Build = Callable[[], pb.FaultProof | None]


class Accuser:
    """Outlives the attempts that its proofs are of."""

    def __init__(self, folder: Path, store: BlobStore, session: Session, history: History, chain: Chain) -> None:
        """`folder` is where proofs are kept for people; `store` is what others are served from."""
        self._folder = folder
        self._store = store
        self._session = session
        self._history = history
        self._chain = chain
        self._queue: asyncio.Queue[tuple[bytes, str, Build]] = asyncio.Queue(MAX_WAITING)
        self._proved: set[str] = set()

    def accuse(self, plan: bytes, peer: str, build: Build) -> None:
        """Have a proof against a peer, about a plan, built, and reported if it holds: one a peer is enough."""
        try:
            self._queue.put_nowait((plan, peer, build))
        except asyncio.QueueFull:
            log.warning("a fault is not reported: too many wait", peer=peer)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            plan, peer, build = await self._queue.get()
            proof = None if peer in self._proved else await asyncio.to_thread(self._prove, build)
            if proof is not None and await self._report(plan, proof):
                self._proved.add(peer)

    def _prove(self, build: Build) -> bytes | None:
        """The proof's bytes, if it is one: an accusation that others would not believe is not made."""
        message = build()
        if message is None:
            return None
        message.successions.extend(self._chain.successions)
        proof = message.SerializeToString(deterministic=True)
        if len(proof) > MAX_PROOF_BYTES:
            log.warning("a fault cannot be proved: too many contributors", bytes=len(proof), limit=MAX_PROOF_BYTES)
            return None
        try:
            guilty = judge(proof, self._chain.run_id)
        except WireError as error:
            log.warning("a fault cannot be proved", reason=str(error))
            return None
        for peer, reason in guilty:
            log.error("a peer is at fault", peer=peer, reason=reason)
        return proof

    async def _report(self, plan: bytes, proof: bytes) -> bool:
        """Whether the coordinator found that it holds."""
        ref = self._store.add_bytes(proof)
        write_whole(self._folder / f"{ref.root.hex()}.proof", proof)
        self._history.record("fault", plan=plan, proof=ref.root)
        report = pb.FaultReport(plan=plan, proof=pb.Blob(root=ref.root, size=ref.size))
        deadline = asyncio.get_running_loop().time() + GIVE_UP_SECONDS

        def matters() -> bool:
            return asyncio.get_running_loop().time() < deadline

        while (ack := await self._session.report(report, matters)) is not None:
            if ack.accepted or not ack.reason.startswith(BUSY):
                log.info("a fault was judged", accepted=ack.accepted, reason=ack.reason)
                return bool(ack.accepted)
            await asyncio.sleep(ASK_SECONDS)
        return False
