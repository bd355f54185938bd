"""Keeping anchors: the whole state of some versions, fetched from peers and checked by hash, never computed on."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.transport.base import Transport

KEPT_ANCHORS = 2
"""Newest anchors that are kept, beside the final version and the reference. Version 0 is made from the seed."""

TRIES = 5
FIRST_PAUSE = 0.5
"""Seconds before the second try; each pause is twice the one before."""

log = structlog.get_logger(__name__)


class Archive:
    """Fetches anchors one after the other, in a task of its own. A version that is a KL reference is one, too."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        holders: Callable[[int], Sequence[str]],
        *,
        every: int,
        final: int,
        on_idle: Callable[[], None],
        promised: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`holders(version)` are peers that may serve that version's state; `on_idle` is called when all is settled.

        `promised()` is the version that is to be the reference from the next one on, if that was ordered.
        """
        self.failed: dict[int, str] = {}
        """Versions that could not be archived, with the reason."""
        self._transport = transport
        self._store = store
        self._holders = holders
        self._every = every
        self._final = final
        self._on_idle = on_idle
        self._promised = promised
        self._wanted: asyncio.Queue[pb.VersionManifest] = asyncio.Queue()
        self._open = 0
        self._kept: dict[int, BlobRef] = {}
        self._reference = 0

    @property
    def idle(self) -> bool:
        """Whether everything wanted so far is archived, or given up."""
        return self._open == 0

    @property
    def versions(self) -> list[int]:
        """Versions whose state is here."""
        return sorted(self._kept)

    def restore(self, manifests: Sequence[pb.VersionManifest]) -> None:
        """After a start: note the anchors that are here, and want those that should be."""
        wanted: set[bytes] = set()
        anchors = [manifest for manifest in manifests if self._is_anchor(manifest)]
        self._reference = manifests[-1].reference_version if manifests else 0
        for manifest in anchors:
            ref = BlobRef(manifest.state.root, manifest.state.size)
            if self._store.has(ref):
                self._kept[manifest.version] = ref
            elif manifest in anchors[-KEPT_ANCHORS:] or manifest.version == self._reference:
                self._add(manifest)
                wanted.add(ref.root)
        self._store.sweep_parts(wanted)
        self._prune()

    def want(self, manifest: pb.VersionManifest) -> None:
        """Archive a version's state, if it is an anchor."""
        self._reference = manifest.reference_version
        if self._is_anchor(manifest):
            self._add(manifest)

    def _add(self, manifest: pb.VersionManifest) -> None:
        ref = BlobRef(manifest.state.root, manifest.state.size)
        if self._store.has(ref):  # a rollback's: it is not to be pruned before its turn comes
            self._kept[manifest.version] = ref
        self._open += 1
        self._wanted.put_nowait(manifest)

    async def run(self) -> None:
        """Fetch what is wanted, until cancelled."""
        while True:
            manifest = await self._wanted.get()
            await self._fetch(manifest)
            self._store.sweep_parts()
            self._open -= 1
            if self.idle:
                self._on_idle()

    async def _fetch(self, manifest: pb.VersionManifest) -> None:
        ref = BlobRef(manifest.state.root, manifest.state.size)
        version, pause = manifest.version, FIRST_PAUSE
        for left in reversed(range(TRIES)):
            try:
                await fetch_blob(self._transport, ref, self._holders(version), self._store)
            except (WireError, OSError) as error:
                self.failed[version] = str(error)
                tell = log.debug if left else log.warning  # peers may still be writing a state that was just committed
                tell("archiving failed", version=version, reason=str(error), tries_left=left)
            else:
                self.failed.pop(version, None)
                self._kept[version] = ref
                self._prune()
                return
            if not left or (version != self._reference and not self._wanted.empty()):
                return  # a newer anchor is wanted: it serves as well, and peers no longer keep this one
            await asyncio.sleep(pause)
            pause *= 2

    def _is_anchor(self, manifest: pb.VersionManifest) -> bool:
        version = manifest.version
        regular = version % self._every == 0 or version in (self._final, manifest.reference_version)
        return version > 0 and (regular or manifest.HasField("restores"))

    def _prune(self) -> None:
        spared = {self._final, self._reference, self._promised(), *sorted(self._kept)[-KEPT_ANCHORS:]}
        roots = {self._kept[version].root for version in spared if version in self._kept}
        for version in [version for version in self._kept if version not in spared]:
            root = self._kept.pop(version).root
            if root not in roots:  # a rollback has the state of an older version
                self._store.remove(root)
