"""Blobs on disk: a folder of files, each named by the root of its content, and of those that are still on their way."""

import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef, blob_ref, blob_root
from hivegrpo.protocol.errors import CommitmentError
from hivegrpo.protocol.files import TEMPORARY, sync_folder, write_whole
from hivegrpo.protocol.merkle import HASH_BYTES, leaf_hash, merkle_root

PART = ".part-"
"""Begins the name of a file whose pieces come in any order; the root follows."""

log = structlog.get_logger(__name__)


class BlobStore:
    """A folder of blobs. What is read is checked against its name. Leaf hashes of what is served stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._leaves: dict[bytes, list[bytes]] = {}
        self._parts: dict[bytes, PartialBlob] = {}

    def path(self, ref: BlobRef) -> Path | None:
        """The blob's file, if it is here whole."""
        path = self.folder / ref.root.hex()
        with suppress(FileNotFoundError):  # removed meanwhile
            if path.is_file() and path.stat().st_size == ref.size:
                return path
        return None

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here whole."""
        return self.path(ref) is not None

    def roots(self) -> set[bytes]:
        """Names of all blobs that are here, whole by their own account."""
        return {root for path in self.folder.iterdir() if (root := _root_of(path.name)) is not None}

    def read(self, ref: BlobRef) -> bytes:
        """The whole content. FileNotFoundError if it is not here, CommitmentError if it is damaged."""
        path = self.path(ref)
        if path is None:
            raise FileNotFoundError(f"no blob {ref.root.hex()} in {self.folder}")
        data = path.read_bytes()
        if blob_root(data) != ref.root:
            raise _damaged(path)
        return data

    def remove_damaged(self, ref: BlobRef) -> bool:
        """Remove a blob whose content is not what its name says; whether it was so. Reads it piece by piece."""
        path = self.path(ref)
        if path is None or merkle_root(leaves_of(path)) == ref.root:
            return False
        log.error("a damaged blob is removed", path=str(path))
        self.remove(ref.root)
        return True

    def add_bytes(self, data: bytes | memoryview) -> BlobRef:
        """Keep `data`, written whole."""
        ref = blob_ref(data)
        if not self.has(ref):
            write_whole(self.folder / ref.root.hex(), data)
        return ref

    def add_file(self, source: Path) -> BlobRef:
        """Keep a copy of a file's content, read and hashed piece by piece."""
        partial = self.folder / f"{TEMPORARY}{os.getpid()}-{source.name}"
        leaves = []
        size = 0
        with source.open("rb") as reader, partial.open("wb") as writer:
            while piece := reader.read(PIECE_BYTES):
                leaves.append(leaf_hash(piece))
                size += len(piece)
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())
        ref = BlobRef(merkle_root(leaves), size)
        partial.rename(self.folder / ref.root.hex())
        sync_folder(self.folder)
        return ref

    def remove(self, root: bytes) -> None:
        """Forget a blob, if it is here."""
        self._leaves.pop(root, None)
        (self.folder / root.hex()).unlink(missing_ok=True)

    def touch(self, ref: BlobRef) -> None:
        """Note that a blob was used now; `sweep` spares it for a while."""
        path = self.path(ref)
        if path is not None:
            os.utime(path)

    def sweep(self, keep: Collection[bytes], spare_seconds: float = 0.0) -> None:
        """Remove all that is not named in `keep`: blobs not used for `spare_seconds`, and parts that nobody fetches.

        Only for the owner of the folder: another process may be reading, but none may be writing to it.
        """
        before = time.time() - spare_seconds
        for root in self.roots() - set(keep):
            path = self.folder / root.hex()
            if path.stat().st_mtime <= before:
                self.remove(root)
        self.sweep_parts(keep)

    def sweep_parts(self, keep: Collection[bytes] = ()) -> None:
        """Remove what was fetched of blobs that are neither in `keep` nor being fetched."""
        wanted = {root.hex() for root in (*keep, *self._parts)}
        for path in self.folder.glob(f"{PART}*"):
            if path.name.removeprefix(PART) not in wanted:
                path.unlink(missing_ok=True)

    def begin(self, part: "PartialBlob") -> None:
        """Serve a blob's pieces as they come."""
        assert part.ref.root not in self._parts, "a blob is fetched once at a time"
        self._parts[part.ref.root] = part

    def end(self, part: "PartialBlob") -> None:
        """No more pieces come: the blob is whole by now, or what is here of it waits for another attempt."""
        if part.whole:
            self._leaves[part.ref.root] = list(part.leaves)
        self._parts.pop(part.ref.root, None)

    def leaves(self, ref: BlobRef) -> list[bytes] | None:
        """Leaf hashes of a blob, checked against its root; None if nothing of it is here."""
        part = self._parts.get(ref.root)
        if part is not None and part.ref == ref:
            return list(part.leaves)
        path = self.path(ref)
        if path is None:
            return None
        leaves = self._leaves.get(ref.root)
        if leaves is None:
            try:
                leaves = leaves_of(path)
            except FileNotFoundError:
                return None  # removed meanwhile
            if merkle_root(leaves) != ref.root:
                log.error("a damaged blob is removed", path=str(path))
                self.remove(ref.root)
                return None
            self._leaves[ref.root] = leaves
        return leaves

    def map(self, ref: BlobRef) -> bytes:
        """Which pieces are here: a bit each, lowest bit first."""
        part = self._parts.get(ref.root)
        if part is not None:
            return _bits(part.have, ref.pieces)
        everything = (1 << ref.pieces) - 1
        return (everything if self.has(ref) else 0).to_bytes(-(-ref.pieces // 8), "little")

    def read_piece(self, ref: BlobRef, index: int) -> bytes | None:
        """One piece, checked; None if it is not here. A blob that turns out to be damaged is removed."""
        leaves = self.leaves(ref)
        if leaves is None or not index < ref.pieces:
            return None
        part = self._parts.get(ref.root)
        path = self.folder / ref.root.hex()
        try:
            if part is not None and not path.exists():
                return part.read(index)
            with path.open("rb") as file:
                file.seek(index * PIECE_BYTES)
                piece = file.read(ref.piece_size(index))
        except FileNotFoundError:
            return None  # it has just become whole, or was removed: ask again
        if leaf_hash(piece) != leaves[index]:
            log.error("a damaged blob is removed", path=str(path))
            self.remove(ref.root)
            return None
        return piece


class PartialBlob:
    """A blob on its way: pieces in any order, each checked, in a file that a later process can go on with."""

    def __init__(self, folder: Path, ref: BlobRef, leaves: Sequence[bytes]) -> None:
        """`leaves` are its leaf hashes, checked against its root. `resume` it before anything else."""
        self.ref = ref
        self.leaves = leaves
        self.have: set[int] = set()
        """Pieces that are here."""
        self._folder = folder
        self._path = folder / f"{PART}{ref.root.hex()}"

    @property
    def whole(self) -> bool:
        return len(self.have) == self.ref.pieces

    def resume(self) -> None:
        """Find the pieces that an earlier attempt left: those that have the right hashes, whoever wrote them."""
        fresh = not self._path.exists()
        self._path.touch()
        with self._path.open("r+b") as file:
            file.truncate(self.ref.size)
            if fresh:
                return
            for index, leaf in enumerate(self.leaves):
                if leaf_hash(file.read(self.ref.piece_size(index))) == leaf:
                    self.have.add(index)

    def add(self, index: int, piece: bytes) -> None:
        """Write a piece, which `note` then counts; CommitmentError if it is another one than the root says."""
        if len(piece) != self.ref.piece_size(index) or leaf_hash(piece) != self.leaves[index]:
            raise CommitmentError(f"piece {index} of blob {self.ref.root.hex()[:16]} is not what its root says")
        with self._path.open("r+b") as file:
            file.seek(index * PIECE_BYTES)
            file.write(piece)

    def note(self, index: int) -> None:
        """A piece is written. On the event loop, where maps are made; `add` is for a thread."""
        self.have.add(index)

    def read(self, index: int) -> bytes | None:
        """A piece that is here; None if it is not."""
        if index not in self.have:
            return None
        with self._path.open("rb") as file:
            file.seek(index * PIECE_BYTES)
            return file.read(self.ref.piece_size(index))

    def finish(self) -> None:
        """Give the file its name, once it is on disk whole."""
        assert self.whole
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())
        self._path.rename(self._folder / self.ref.root.hex())
        sync_folder(self._folder)


def split_leaves(data: bytes, ref: BlobRef) -> list[bytes]:
    """Leaf hashes as they come in a frame; CommitmentError if they are not those of the blob."""
    leaves = [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]
    if len(data) != HASH_BYTES * ref.pieces or merkle_root(leaves) != ref.root:
        raise CommitmentError(f"the leaf hashes are not those of blob {ref.root.hex()[:16]}")
    return leaves


def leaves_of(path: Path) -> list[bytes]:
    """Leaf hashes of a file's pieces, read one by one: a blob may be larger than memory."""
    with path.open("rb") as file:
        return [leaf_hash(piece) for piece in iter(lambda: file.read(PIECE_BYTES), b"")]


def _bits(have: Collection[int], pieces: int) -> bytes:
    """A bit for each of `pieces`, lowest bit first, set for those in `have`."""
    bits = bytearray(-(-pieces // 8))
    for index in have:
        bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits)


def _root_of(name: str) -> bytes | None:
    """The root that a file is named by, if it is a blob's."""
    if len(name) != 2 * HASH_BYTES:
        return None
    try:
        return bytes.fromhex(name)
    except ValueError:
        return None


def _damaged(path: Path) -> CommitmentError:
    return CommitmentError(f"{path} is damaged: its content is not what its name says")
