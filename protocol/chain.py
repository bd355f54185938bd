"""The chain of policy versions: every manifest names its parent's digest, the coordinator signs each.

Verification needs nothing but the coordinator's peer id, which is part of the run's address.
"""

from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_manifest, check_plan, check_seal
from hivegrpo.protocol.envelope import Opened, open_run, open_signed, parse, run_id_of
from hivegrpo.protocol.errors import (
    ChainError,
    ForgedError,
    ForkError,
    GapError,
    ReplayError,
    SignatureError,
    WireError,
)

MAX_ENTRY_BYTES = 1 << 20

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed version with the plan and the seal it came from (None for version 0 and for rollbacks)."""

    manifest: Opened[pb.VersionManifest]
    plan: Opened[pb.RoundPlan] | None
    seal: Opened[pb.Seal] | None

    def to_message(self) -> pb.ChainEntry:
        """For the wire and the disk."""
        if self.plan is None or self.seal is None:
            return pb.ChainEntry(manifest=self.manifest.signed)
        return pb.ChainEntry(manifest=self.manifest.signed, plan=self.plan.signed, seal=self.seal.signed)


class Chain:
    """A verified prefix of a run's chain, growing at its head. It never changes what it holds."""

    def __init__(self, run: pb.Signed, coordinator: str | None = None) -> None:
        """ChainError unless `run` is a manifest that `coordinator` signed.

        Without `coordinator`, whoever the manifest names: for a caller that knows the run id.
        """
        try:
            coordinator = coordinator or parse(pb.RunManifest, run.payload).coordinator
            self.manifest: Opened[pb.RunManifest] = open_run(run, coordinator)
        except WireError as error:
            raise _refusal("The run manifest", error) from error
        self.run_id = run_id_of(run.payload)
        self.coordinator = coordinator
        self.entries: list[Entry] = []

    @property
    def run(self) -> pb.Signed:
        """The signed run manifest."""
        return self.manifest.signed

    def entry(self, version: int) -> pb.ChainEntry:
        """The entry of a version up to `height`, for the wire."""
        return self.entries[version].to_message()

    @property
    def head(self) -> Entry | None:
        """The newest entry, or None before version 0 is agreed."""
        return self.entries[-1] if self.entries else None

    @property
    def height(self) -> int:
        """Version of the head; -1 for an empty chain."""
        return len(self.entries) - 1

    def append(self, message: pb.ChainEntry) -> Entry:
        """Verify the entry after the head and take it; the kind of the ChainError says what is wrong with it."""
        try:
            entry = self._open(message)
        except WireError as error:
            raise _refusal(f"Version {self.height + 1}", error) from error
        self.entries.append(entry)
        return entry

    def check_head(self, message: pb.ChainEntry) -> None:
        """ForkError if `message` is another version than the head under the coordinator's signature, in its place.

        Another ChainError if it is no version that the coordinator signed, or not of the head's number.
        """
        assert self.head is not None
        try:
            manifest = self._signed(message.manifest, pb.VersionManifest)
        except WireError as error:
            raise _refusal(f"Version {self.height}", error) from error
        if manifest.message.version != self.height:
            raise GapError(f"Expected version {self.height}, got {manifest.message.version}.", WRONG_CHAIN_HINT)
        if manifest.digest != self.head.manifest.digest:
            raise ForkError(
                f"There is a second version {self.height} under the coordinator's signature: the chain is forked.",
                WRONG_CHAIN_HINT,
            )

    def _open(self, message: pb.ChainEntry) -> Entry:
        manifest = self._signed(message.manifest, pb.VersionManifest)
        check_manifest(manifest.message)
        version = self.height + 1
        if manifest.message.version != version:
            raise self._misplaced(manifest)
        parent = self.head.manifest.digest if self.head else self.manifest.digest
        if manifest.message.parent != parent:
            raise ForkError(f"Version {version} does not continue the chain: its parent differs.", WRONG_CHAIN_HINT)
        before = self.head.manifest.message.reference_version if self.head else 0
        if manifest.message.HasField("restores"):
            self._check_rollback(manifest.message)
            return Entry(manifest, None, None)
        if manifest.message.reference_version not in (before, version) and not manifest.message.promoted:
            raise ChainError(f"Version {version} goes back to an older reference version.", WRONG_CHAIN_HINT)
        if version == 0:
            return Entry(manifest, None, None)
        plan = self._signed(message.plan, pb.RoundPlan)
        seal = self._signed(message.seal, pb.Seal)
        check_plan(plan.message)
        check_seal(seal.message, plan.message)
        if (plan.digest, seal.digest) != (manifest.message.plan, manifest.message.seal):
            raise ChainError(f"Version {version} comes with another plan or seal than it names.", WRONG_CHAIN_HINT)
        if seal.message.plan != plan.digest or plan.message.version != version or plan.message.parent != parent:
            raise ChainError(f"Plan and seal of version {version} do not belong together.", WRONG_CHAIN_HINT)
        if len(manifest.message.spans) != len(plan.message.reducers):
            raise ChainError(f"Version {version} does not have one span for each reducer.", WRONG_CHAIN_HINT)
        return Entry(manifest, plan, seal)

    def _misplaced(self, manifest: Opened[pb.VersionManifest]) -> ChainError:
        """What a version in another one's place is."""
        version, expected = manifest.message.version, self.height + 1
        text = f"Expected version {expected}, got {version}"
        if version > expected:
            return GapError(f"{text}.", WRONG_CHAIN_HINT)
        if self.entries[version].manifest.digest == manifest.digest:
            return ReplayError(f"{text} again.", WRONG_CHAIN_HINT)
        return ForkError(f"{text}, another one than was verified before.", WRONG_CHAIN_HINT)

    def _check_rollback(self, manifest: pb.VersionManifest) -> None:
        older = self.entries[manifest.restores].manifest.message
        if (manifest.state, manifest.reference_version) != (older.state, older.reference_version):
            raise ChainError(
                f"Version {manifest.version} goes back to version {older.version}, but not to its state and reference.",
                WRONG_CHAIN_HINT,
            )

    def _signed(self, envelope: pb.Signed, kind: type[M]) -> Opened[M]:
        return open_signed(envelope, self.run_id, kind, signer=self.coordinator)


def _refusal(what: str, error: WireError) -> ChainError:
    kind = ForgedError if isinstance(error, SignatureError) else ChainError
    return kind(f"{what} does not verify: {error}.", WRONG_CHAIN_HINT)


WRONG_CHAIN_HINT = (
    "Check the address with whoever launched the run; if it is right, the coordinator or its disk is damaged "
    "or hostile: do not contribute, and report this message."
)
