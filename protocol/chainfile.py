"""A chain on disk: the run manifest in one file, the entries appended to another.

Every home that follows a run has both, so inference and late joins read a coordinator's home and a peer's alike.
"""

import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import MAX_ENTRY_BYTES, Chain, Entry
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, ConfigError, FrameError
from hivegrpo.protocol.files import sync_folder, write_whole

RUN_FILE = "run.manifest"
SUCCESSIONS_FILE = "successions"
ENTRIES_FILE = "chain.bin"
MARK_FILE = "chain.verified"
MARK_EVERY = 256
"""Entries, which take a fraction of a second to verify."""


class ChainFile:
    """Keeps a `Chain` and its copy on disk in step. An entry is on disk (fsync) before `append` returns.

    A mark beside the file says which of its bytes the home's owner has verified, by their SHA-256: those it does not
    verify again at its next start. Whoever else reads the file looks at every signature.
    """

    def __init__(self, home: Path, chain: Chain) -> None:
        self.chain = chain
        self._path = home / ENTRIES_FILE
        self._mark = home / MARK_FILE
        self._whole = 0
        self._taken: list[bytes] = []
        self._digest = sha256(chain.manifest.digest)
        """Of the run's id and the first `_whole` bytes."""
        self._marked = -1
        """Height at which the mark was written."""

    @classmethod
    def create(
        cls, home: Path, run: pb.Signed, coordinator: str | None, successions: Sequence[pb.Signed] = ()
    ) -> "ChainFile":
        """Open the home's chain, or begin it with `run`; take the `successions` that it lacks.

        ChainError if the home follows another run, or if `coordinator` is not the current one then.
        """
        if (home / RUN_FILE).is_file():
            opened = cls(home, read_run(home))
            opened._load(trusting=True)
            opened._repair()
            if opened.chain.run.payload != run.payload:
                raise ChainError(
                    f"The home {home} belongs to run {opened.chain.run_id[:16]}, not to this one.",
                    "Use another --home for this run.",
                )
            opened.succeed(successions)
            if coordinator is not None:
                opened.chain.check_coordinator(coordinator)
            return opened
        created = cls(home, Chain(run, coordinator, successions))
        created._keep_successions()
        write_whole(home / RUN_FILE, run.SerializeToString())
        return created

    @classmethod
    def open(cls, home: Path, coordinator: str | None = None) -> "ChainFile":
        """Read and verify a home's chain, of which the owner may be writing the next entry just now.

        `coordinator`, where given, has to be the current one. ConfigError if there is no run in the home.
        """
        opened = cls(home, read_run(home, coordinator))
        opened._load(trusting=False)
        return opened

    def succeed(self, successions: Sequence[pb.Signed]) -> None:
        """Verify and keep those of `successions` that are not here yet. ChainError if one does not verify."""
        if self.chain.succeed(successions):
            self._keep_successions()

    def _keep_successions(self) -> None:
        if self.chain.successions:
            kept = pb.ChainHeader(successions=self.chain.successions)
            write_whole(self._path.parent / SUCCESSIONS_FILE, kept.SerializeToString())

    def append(self, message: pb.ChainEntry) -> Entry:
        """Verify the next entry, then write it."""
        entry = self.take(message)
        self.flush()
        return entry

    def take(self, message: pb.ChainEntry) -> Entry:
        """Verify the next entry, for `flush` to write: who takes many waits for the disk once."""
        entry = self.chain.append(message)
        data = entry.to_message().SerializeToString()  # not what came: of version 0, a plan would be nobody's
        self._taken.append(len(data).to_bytes(4, "big") + data)
        return entry

    def flush(self) -> None:
        """Have everything that was taken on disk (fsync)."""
        if not self._taken:
            return
        begins = not self._path.exists()
        data = b"".join(self._taken)
        with self._path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if begins:
            sync_folder(self._path.parent)
        self._taken = []
        self._digest.update(data)
        self._whole += len(data)
        self._mark_verified()

    def _mark_verified(self) -> None:
        """If that would spare the next start enough."""
        if self.chain.height >= self._marked + MARK_EVERY:
            write_whole(self._mark, self._whole.to_bytes(8, "big") + self._digest.digest())
            self._marked = self.chain.height

    def _verified(self, data: memoryview) -> int:
        """How many of the file's bytes were verified before; 0 if any of those has changed."""
        if not self._mark.is_file():
            return 0
        mark = self._mark.read_bytes()
        size = int.from_bytes(mark[:8], "big")
        digest = self._digest.copy()
        digest.update(data[:size])
        return size if digest.digest() == mark[8:] else 0

    def _load(self, *, trusting: bool) -> None:
        if not self._path.is_file():
            return
        data = memoryview(self._path.read_bytes())
        verified = self._verified(data) if trusting else 0
        position = 0
        while position + 4 <= len(data):
            size = int.from_bytes(data[position : position + 4], "big")
            if size > MAX_ENTRY_BYTES:
                raise ChainError(f"{self._path} is damaged at byte {position}.", DAMAGED_HINT)
            if position + 4 + size > len(data):
                break
            take = self.chain.restore if position < verified else self.chain.append
            try:
                take(parse(pb.ChainEntry, bytes(data[position + 4 : position + 4 + size])))
            except FrameError as error:
                raise ChainError(f"{self._path} is damaged at byte {position}: {error}.", DAMAGED_HINT) from error
            position += 4 + size
            if position == verified:
                self._marked = self.chain.height
        self._whole = position
        self._digest.update(data[:position])

    def _repair(self) -> None:
        """Remove an entry that a crash cut short, and mark what was verified. Only the home's owner may."""
        if self._path.is_file() and self._path.stat().st_size > self._whole:
            os.truncate(self._path, self._whole)
        self._mark_verified()


def read_run(home: Path, coordinator: str | None = None) -> Chain:
    """The chain of a home's run, without its entries; errors as those of `ChainFile.open`."""
    path = home / RUN_FILE
    if not path.is_file():
        raise ConfigError(f"There is no run in {home}.", "Name a run's folder or the home of a coordinator or peer.")
    return Chain(parse(pb.Signed, path.read_bytes()), coordinator, _read_successions(home))


def count_entries(home: Path) -> int:
    """How many whole entries a home's chain has, without a look at what is in them."""
    path, count = home / ENTRIES_FILE, 0
    if path.is_file():
        with path.open("rb") as file:
            while len(head := file.read(4)) == 4:
                if file.seek(int.from_bytes(head, "big"), os.SEEK_CUR) > path.stat().st_size:
                    break
                count += 1
    return count


def _read_successions(home: Path) -> Sequence[pb.Signed]:
    path = home / SUCCESSIONS_FILE
    return parse(pb.ChainHeader, path.read_bytes()).successions if path.is_file() else ()


DAMAGED_HINT = "Move the file away: a peer then fetches the chain anew, a coordinator writes it anew from its log."
