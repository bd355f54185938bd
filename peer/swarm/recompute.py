"""What `protocol.invariants.check` asks of those who can compute: spans from their chunks, and proofs of fault."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import ContributionStore
from hivegrpo.peer.swarm.faults import judge
from hivegrpo.peer.swarm.reducer import SpanLayout, reduce_span
from hivegrpo.protocol.blobs import BlobRef, blob_root
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.history import Record


def span_auditor(chain: Chain, contributions: Sequence[Path]) -> Callable[[Record, Record, int], bytes | None]:
    """What `protocol.invariants.check` asks for: the root that a span must have, or None if a chunk is gone.

    `contributions` are peers' folders of contributions, as far as they are on this machine.
    """
    entries = {entry.plan.digest.hex(): entry for entry in chain.entries if entry.plan is not None}

    def recompute(plan_record: Record, seal_record: Record, span: int) -> bytes | None:
        entry = entries.get(plan_record["digest"])
        if (
            entry is None
            or entry.plan is None
            or entry.seal is None
            or entry.seal.digest.hex() != seal_record["digest"]
        ):
            return None
        plan, seal = entry.plan.message, entry.seal.message
        run = SpanLayout.of(plan, span).chunks
        chunks: dict[str, Sequence[bytes]] = {}
        sealed = {contributor.peer for contributor in seal.contributors}
        for contributor in plan.contributors:
            if contributor.peer in sealed:
                for folder in contributions:
                    store = ContributionStore(folder, get_codec(plan.codec), plan.values, keep=0)
                    if (encoded := store.find(contributor.root)) is not None:
                        chunks[contributor.peer] = encoded.chunks[run.start : run.stop]
                        break
                else:
                    return None
        return blob_root(reduce_span(plan, span, seal, chunks))

    return recompute


def guilty_by(blobs: Path, run_id: str) -> Callable[[bytes, int], Collection[str]]:
    """Who is guilty by a blob in that folder, as a proof of that run; nobody if it is gone, or shows nothing."""

    def guilty(root: bytes, size: int) -> Collection[str]:
        try:
            return [peer for peer, _ in judge(BlobStore(blobs).read(BlobRef(root, size)), run_id)]
        except (FileNotFoundError, WireError):
            return []

    return guilty
