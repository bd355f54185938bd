"""The chain of policy versions: every manifest names its parent's digest, the coordinator signs each.

Verification needs nothing but the coordinator's peer id, which is part of the run's address. A run may have a key that
is kept offline, and that alone can name another coordinator (succession.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_manifest, check_plan, check_seal
from hivegrpo.protocol.envelope import Opened, digest_of, open_run, open_signed, parse, run_id_of
from hivegrpo.protocol.errors import (
    ChainError,
    ForgedError,
    ForkError,
    GapError,
    ReplayError,
    SignatureError,
    WireError,
)
from hivegrpo.protocol.succession import SUCCESSION_HINT, Line

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

    def __init__(self, run: pb.Signed, coordinator: str | None = None, successions: Sequence[pb.Signed] = ()) -> None:
        """ChainError unless `run` and its `successions` verify, and make `coordinator` the current one.

        Without `coordinator`, whoever they name: for a caller that knows the run id.
        """
        try:
            self.manifest: Opened[pb.RunManifest] = open_run(run, parse(pb.RunManifest, run.payload).coordinator)
        except WireError as error:
            raise _refusal("The run manifest", error) from error
        self.run_id = run_id_of(run.payload)
        self.entries: list[Entry] = []
        self._line = Line(self.run_id, self.manifest.message)
        self.succeed(successions)
        if coordinator is not None:
            self.check_coordinator(coordinator)

    @property
    def coordinator(self) -> str:
        """The peer that signs what is to come."""
        return self._line.current

    @property
    def successions(self) -> list[pb.Signed]:
        """What the run key signed, in order."""
        return [succession.signed for succession in self._line.successions]

    def succeed(self, successions: Sequence[pb.Signed]) -> int:
        """Verify those of `successions` that are not known yet, and take all of them; how many.

        ChainError, and none is taken, if one does not verify or contradicts the versions here.
        """
        known = self._line.successions
        before = len(known)
        try:
            for signed in successions:
                succession = self._line.open(signed)
                if succession is not None:
                    known.append(succession)
            for succession in known[before:]:
                if self._line.naming(succession.message.first) is succession:
                    self._check_place(succession.message)
        except ChainError:
            del known[before:]
            raise
        return len(known) - before

    def check_coordinator(self, peer: str) -> None:
        """ReplayError if `peer` is the coordinator no more, ForgedError if it never was."""
        if peer == self.coordinator:
            return
        if self._line.coordinated(peer):
            raise ReplayError(
                f"{peer} coordinates this run no more: the run key named {self.coordinator} in its place.",
                "Ask whoever launched the run for its new address.",
            )
        raise ForgedError(
            f"The run manifest does not verify: it is signed by {self.manifest.signer!r}, not by {peer}.",
            WRONG_CHAIN_HINT,
        )

    def open_version(self, signed: pb.Signed) -> Opened[pb.VersionManifest]:
        """Verify a version by itself; WireError unless whoever may sign a version of its number did."""
        signer = signed.signer if self._line.coordinated(signed.signer) else self.coordinator
        opened = open_signed(signed, self.run_id, pb.VersionManifest, signer=signer)
        expected = self._line.signer_of(opened.message.version)
        if signer != expected:
            raise SignatureError(f"version {opened.message.version} is signed by {signer}, not by {expected}")
        return opened

    def signer_of(self, version: int) -> str:
        """The peer that signs a version, its plan and its seal."""
        return self._line.signer_of(version)

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
            manifest = self.open_version(message.manifest)
        except WireError as error:
            raise _refusal(f"Version {self.height}", error) from error
        if manifest.message.version != self.height:
            raise GapError(f"Expected version {self.height}, got {manifest.message.version}.", WRONG_CHAIN_HINT)
        if manifest.digest != self.head.manifest.digest:
            raise ForkError(
                f"There is a second version {self.height} under the coordinator's signature: the chain is forked.",
                WRONG_CHAIN_HINT,
            )

    def restore(self, message: pb.ChainEntry) -> Entry:
        """Take an entry that was taken by `append` once, and of which no byte has changed since."""
        plan = _known(message.plan, pb.RoundPlan) if message.HasField("plan") else None
        seal = _known(message.seal, pb.Seal) if message.HasField("seal") else None
        self.entries.append(Entry(_known(message.manifest, pb.VersionManifest), plan, seal))
        return self.entries[-1]

    def _open(self, message: pb.ChainEntry) -> Entry:
        manifest = self.open_version(message.manifest)
        check_manifest(manifest.message)
        version = self.height + 1
        if manifest.message.version != version:
            raise self._misplaced(manifest)
        parent = self._digest_before(version)
        if manifest.message.parent != parent:
            raise ForkError(f"Version {version} does not continue the chain: its parent differs.", WRONG_CHAIN_HINT)
        named = self._line.naming(version)
        if named is not None and named.message.first == version and named.message.parent != parent:
            raise ForkError(f"The run key lets version {version} continue another history.", SUCCESSION_HINT)
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
        return open_signed(envelope, self.run_id, kind, signer=self._line.signer_of(self.height + 1))

    def _digest_before(self, version: int) -> bytes:
        """What a version up to the next one has for a parent."""
        return self.entries[version - 1].manifest.digest if version else self.manifest.digest

    def _check_place(self, succession: pb.Succession) -> None:
        """ForkError if the versions here go on otherwise than the run key says."""
        first = succession.first
        if first <= self.height:
            raise ForkError(
                f"The run key names another coordinator from version {first} on, and version {self.height} is here "
                "under the signature of the one before.",
                "Move this home's chain.bin away, so that the chain is fetched anew.",
            )
        if first == self.height + 1 and succession.parent != self._digest_before(first):
            raise ForkError(f"The run key lets version {first} continue another history than here.", SUCCESSION_HINT)


def _refusal(what: str, error: WireError) -> ChainError:
    kind = ForgedError if isinstance(error, SignatureError) else ChainError
    return kind(f"{what} does not verify: {error}.", WRONG_CHAIN_HINT)


def _known(envelope: pb.Signed, kind: type[M]) -> Opened[M]:
    return Opened(parse(kind, envelope.payload), envelope.signer, digest_of(envelope.payload), envelope)


WRONG_CHAIN_HINT = (
    "Check the address with whoever launched the run; if it is right, the coordinator or its disk is damaged "
    "or hostile: do not contribute, and report this message."
)
