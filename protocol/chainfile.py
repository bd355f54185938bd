"""A chain on disk: the run manifest in one file, the entries appended to another.

Every home that follows a run has both, so inference and late joins read a coordinator's home and a peer's alike.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import MAX_ENTRY_BYTES, Chain, Entry
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, ConfigError, FrameError
from hivegrpo.protocol.files import sync_folder, write_whole

RUN_FILE = "run.manifest"
SUCCESSIONS_FILE = "successions"
ENTRIES_FILE = "chain.bin"


class ChainFile:
    """Keeps a `Chain` and its copy on disk in step. An entry is on disk (fsync) before `append` returns."""

    def __init__(self, home: Path, chain: Chain) -> None:
        self.chain = chain
        self._path = home / ENTRIES_FILE
        self._whole = 0
        self._taken: list[bytes] = []

    @classmethod
    def create(
        cls, home: Path, run: pb.Signed, coordinator: str | None, successions: Sequence[pb.Signed] = ()
    ) -> "ChainFile":
        """Open the home's chain, or begin it with `run`; take the `successions` that it lacks.

        ChainError if the home follows another run, or if `coordinator` is not the current one then.
        """
        if (home / RUN_FILE).is_file():
            opened = cls.open(home)
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
        path = home / RUN_FILE
        if not path.is_file():
            raise ConfigError(
                f"There is no run in {home}.", "Name a run's folder or the home of a coordinator or peer."
            )
        opened = cls(home, Chain(parse(pb.Signed, path.read_bytes()), coordinator, _read_successions(home)))
        opened._load()
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
        data = message.SerializeToString()
        self._taken.append(len(data).to_bytes(4, "big") + data)
        return entry

    def flush(self) -> None:
        """Have everything that was taken on disk (fsync)."""
        if not self._taken:
            return
        begins = not self._path.exists()
        with self._path.open("ab") as file:
            file.write(b"".join(self._taken))
            file.flush()
            os.fsync(file.fileno())
        if begins:
            sync_folder(self._path.parent)
        self._taken = []

    def _load(self) -> None:
        if not self._path.is_file():
            return
        data = self._path.read_bytes()
        position = 0
        while position + 4 <= len(data):
            size = int.from_bytes(data[position : position + 4], "big")
            if size > MAX_ENTRY_BYTES:
                raise ChainError(f"{self._path} is damaged at byte {position}.", DAMAGED_HINT)
            if position + 4 + size > len(data):
                break
            try:
                self.chain.append(parse(pb.ChainEntry, data[position + 4 : position + 4 + size]))
            except FrameError as error:
                raise ChainError(f"{self._path} is damaged at byte {position}: {error}.", DAMAGED_HINT) from error
            position += 4 + size
        self._whole = position

    def _repair(self) -> None:
        """Remove an entry that a crash cut short. Only the home's owner may."""
        if self._path.is_file() and self._path.stat().st_size > self._whole:
            os.truncate(self._path, self._whole)


def _read_successions(home: Path) -> Sequence[pb.Signed]:
    path = home / SUCCESSIONS_FILE
    return parse(pb.ChainHeader, path.read_bytes()).successions if path.is_file() else ()


DAMAGED_HINT = "Move the file away: a peer then fetches the chain anew, a coordinator writes it anew from its log."
