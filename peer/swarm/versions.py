"""The versions this peer holds: its verified chain, its policy state, and what it keeps on disk to serve others.

Everything kept is content-addressed: anchors by their state root, spans by theirs, both named in the manifests.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.step import PolicyState, state_bytes, state_from_bytes
from hivegrpo.peer.swarm.replay import AveragedGradient, replay
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef, blob_root
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Entry
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.coefficients import planned_rule
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, CommitmentError, StaleError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.reference import reference_of

KEPT_ANCHORS = 2
"""Newest anchors kept on disk, beside the KL reference; version 0 is made from the seed."""

SPARED_SECONDS = 3600.0
"""How long a blob that no version needs stays in a home: an attempt in flight may yet be committed."""


def ref_of(blob: pb.Blob) -> BlobRef:
    """A blob as the store and the network name it."""
    return BlobRef(blob.root, blob.size)


class Versions:
    """Chain and state. `version` is the state's; it lags behind `chain.height` only while synchronising."""

    def __init__(
        self, home: Path, chainfile: ChainFile, store: BlobStore, config: RunConfig, base: Path | None = None
    ) -> None:
        """`base` is the folder of the base model, which only a run that trains every parameter needs for version 0."""
        self._base = base
        self.chain = chainfile.chain
        self.store = store
        self._home = home
        self._chainfile = chainfile
        self._config = config
        self._layout = [(tensor.name, tuple(tensor.shape)) for tensor in self.chain.manifest.message.layout]
        self.state: PolicyState = self._make_genesis()
        self.version = 0
        self.reference: Tensor | None = None
        """Parameters of the KL reference; None for version 0, which is the base, and if the run has no reference."""
        self.reference_version = 0
        self._kept: set[int] = set()
        """Versions whose whole state is in the store."""
        self._held: set[bytes] = set()
        """Blobs of versions that are in the store, as far as this object has seen them."""
        self._unclaimed: set[bytes] = set()
        """Blobs that were here at the start and that no version names, so far."""
        self._pending: list[BlobRef] = []
        self.state_root = self._genesis_root = blob_root(state_bytes(self.state))
        self._restore()

    @property
    def values(self) -> int:
        """Length of the vector of trainable parameters."""
        return int(self.state.parameters.numel())

    def check_plan(self, plan: pb.RoundPlan) -> None:
        """StaleError unless the plan continues this chain, with the run's own codec, rule and vector."""
        head, averaging = self.chain.head, self._config.averaging
        run = (averaging.codec, planned_rule(averaging.rule, len(plan.contributors)), self.values)
        if head is None or plan.parent != head.manifest.digest or (plan.codec, plan.rule, plan.values) != run:
            raise StaleError("a plan for another chain, or with other terms than the run's")

    def shadow(
        self, plan: pb.RoundPlan, spans: Sequence[bytes], gradient: AveragedGradient | None = None
    ) -> tuple[PolicyState, bytes]:
        """The state after the plan's step, beside the current one, and its root. Runs on the worker thread.

        The spans are in the store before this returns: once the version is committed, others ask for them at once.
        """
        self._forget_pending()
        shadow = replay(self.state, plan, spans, gradient)
        self._pending = [self.store.add_bytes(span) for span in spans]
        self._held |= {ref.root for ref in self._pending}
        return shadow, blob_root(state_bytes(shadow))

    def extend(self, message: pb.ChainEntry) -> Entry:
        """Verify the next entry of the chain and write it; the state follows by `adopt` or `load_anchor`.

        ChainError if it does not verify, or its KL reference is not the one that the run's settings give.
        """
        manifest = parse(pb.VersionManifest, message.manifest.payload)
        before = self.chain.head.manifest.message.reference_version if self.chain.head else 0
        ordered = manifest.promoted or manifest.HasField("restores")  # by the operator, within what the chain allows
        if not ordered and manifest.reference_version != reference_of(manifest.version, before, self._config.grpo):
            raise ChainError(
                f"Version {manifest.version} names version {manifest.reference_version} as its KL reference, "
                "which the run's settings do not give.",
                "Do not contribute, and report this message to whoever launched the run.",
            )
        if manifest.HasField("restores") and manifest.state.root == self._genesis_root:
            self.store.add_bytes(state_bytes(self._make_genesis()))  # nobody has it as a blob: it is made from the seed
        entry = self._chainfile.append(message)
        self._held |= self._unclaimed & self._roots_of(manifest)
        return entry

    def adopt(self, version: int, shadow: PolicyState, root: bytes) -> None:
        """Make `shadow` the current state, if the chain says that it is `version`; ChainError if its root differs.

        The state is on disk before this returns, if it is an anchor; if it is a KL reference, it is taken as one.
        """
        manifest = self.chain.entries[version].manifest.message
        if root != manifest.state.root:
            self._keep_evidence(version, root)
            raise ChainError(
                f"Version {version} was signed with state root {manifest.state.root.hex()[:16]}, but its sealed bytes "
                f"give {root.hex()[:16]} on this machine.",
                f"This peer refuses the version. The evidence is in {self._home / 'evidence'}; report it to the run.",
            )
        self._forget_pending()
        self.state, self.version, self.state_root = shadow, version, root
        if version > 0 and self.is_anchor(version):
            self._held.add(self.store.add_bytes(state_bytes(shadow)).root)
            self._kept.add(version)
        wanted = self._reference_at(version)
        if wanted == 0:
            self.reference, self.reference_version = None, 0
        elif wanted == version:
            self.reference, self.reference_version = shadow.parameters.clone(), version
        self._prune()

    def load_anchor(self, version: int) -> None:
        """Take the state from an anchor in the store; CommitmentError if that is damaged, and it is removed."""
        state = state_from_bytes(self._read(self.state_ref(version)), self.values)
        self.adopt(version, state, blob_root(state_bytes(state)))

    def missing_reference(self) -> int | None:
        """The version that is the KL reference at the state's version, if its parameters are not here yet."""
        wanted = self._reference_at(self.version)
        return wanted if wanted != self.reference_version else None

    def load_reference(self, version: int) -> None:
        """Take the KL reference from its state in the store; CommitmentError if that is damaged, and it is removed."""
        data = self._read(self.state_ref(version))
        self.reference, self.reference_version = state_from_bytes(data, self.values).parameters.clone(), version
        self._kept.add(version)
        self._prune()

    def is_anchor(self, version: int) -> bool:
        """Whether peers keep the whole state of that version: every so often, of the last, of KL references, and where
        the run went back to an older one.
        """
        regular = version % self._config.distribution.anchor_every == 0 or version == self._config.run.versions
        return regular or version == self._reference_at(version) or self.is_rollback(version)

    def newest_anchor(self) -> int:
        """The newest anchor in the chain; version 0 counts as one."""
        return next(version for version in range(max(self.chain.height, 0), -1, -1) if self.is_anchor(version))

    def span_refs(self, version: int) -> list[BlobRef]:
        """The spans that lead from the version before to this one."""
        return [ref_of(span) for span in self.chain.entries[version].manifest.message.spans]

    def state_ref(self, version: int) -> BlobRef:
        """The whole state of a version."""
        return ref_of(self.chain.entries[version].manifest.message.state)

    def is_rollback(self, version: int) -> bool:
        """Whether a version has the state of an older one."""
        return version < len(self.chain.entries) and self.chain.entries[version].manifest.message.HasField("restores")

    def update_refs(self, version: int) -> list[BlobRef]:
        """What leads from the version before to this one: its spans; or a whole state, where the run went back."""
        return [self.state_ref(version)] if self.is_rollback(version) else self.span_refs(version)

    def advance(self) -> None:
        """Go on by one version, from what `update_refs` names; CommitmentError if one is damaged, and it is removed."""
        version = self.version + 1
        if self.is_rollback(version):
            self.load_anchor(version)
            return
        entry = self.chain.entries[version]
        assert entry.plan is not None
        spans = [self._read(ref) for ref in self.span_refs(version)]
        shadow, root = self.shadow(entry.plan.message, spans)
        self.adopt(version, shadow, root)

    def sweep(self, also: Iterable[bytes] = ()) -> None:
        """Remove from the store what no version that is kept needs, nor `also`: what processes that died left there."""
        self.store.sweep({*self._live(), *also}, SPARED_SECONDS)

    def _make_genesis(self) -> PolicyState:
        """Version 0, from the run's seed."""
        return PolicyState.initial(version_zero(self._layout, self._config, self._base))

    def _restore(self) -> None:
        """The newest state that this home's own files give; what is damaged there is removed."""
        here = self.store.roots()
        states = [self.state_ref(version) for version in range(len(self.chain.entries))]
        self._kept = {version for version in range(1, len(states)) if states[version].root in here}
        for entry in self.chain.entries:
            self._held |= here & self._roots_of(entry.manifest.message)
        self._unclaimed = here - self._held
        with suppress(CommitmentError):
            while self._kept and self.version < max(self._kept):
                self._load_newest()
            while self.version < self.chain.height and all(map(self.store.has, self.update_refs(self.version + 1))):
                self.advance()

    def _load_newest(self) -> None:
        """Load the newest state that is here whole."""
        newest = max(self._kept)
        try:
            self.load_anchor(newest)
        except CommitmentError:
            self._kept.discard(newest)

    def _read(self, ref: BlobRef) -> bytes:
        """A blob of the store; CommitmentError if it is damaged, and removed, or was removed for that meanwhile."""
        self._held.add(ref.root)
        try:
            return self.store.read(ref)
        except CommitmentError:
            self.store.remove(ref.root)
            raise
        except FileNotFoundError as error:
            raise CommitmentError(str(error)) from None

    def _roots_of(self, manifest: pb.VersionManifest) -> set[bytes]:
        """Names of a version's blobs."""
        return {manifest.state.root, *(span.root for span in manifest.spans)}

    def _forget_pending(self) -> None:
        """Remove the spans of an attempt that came to nothing."""
        pending, self._pending = self._pending, []
        for root in {ref.root for ref in pending} - self._live():
            self.store.remove(root)

    def _prune(self) -> None:
        """Forget spans beyond `keep_versions`, and states beyond the newest few and the KL reference."""
        live = self._live()
        for root in self._held - live:
            self.store.remove(root)
        self._held &= live
        self._kept = {version for version in self._kept if self.state_ref(version).root in live}

    def _live(self) -> set[bytes]:
        """What is kept: spans of the last versions, newer ones that are waited for, the newest states, the reference.

        Equal content has one name: a span of one version may be that of another, too.
        """
        oldest = max(1, self.version - self._config.distribution.keep_versions + 1)
        spans = {ref.root for version in range(oldest, len(self.chain.entries)) for ref in self.span_refs(version)}
        spared = {self._reference_at(self.version), *sorted(self._kept)[-KEPT_ANCHORS:]}
        states = {self.state_ref(version).root for version in spared if 0 < version < len(self.chain.entries)}
        return spans | states | {ref.root for ref in self._pending}

    def _reference_at(self, version: int) -> int:
        """The KL reference of what is sampled under a version; 0 if the run has none."""
        if self._config.grpo.beta == 0.0 or version >= len(self.chain.entries):
            return 0
        return int(self.chain.entries[version].manifest.message.reference_version)

    def _keep_evidence(self, version: int, root: bytes) -> None:
        folder = self._home / "evidence"
        write_whole(folder / f"{version:08d}.entry", self.chain.entry(version).SerializeToString())
        write_whole(folder / f"{version:08d}.root", root.hex().encode())
