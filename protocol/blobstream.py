"""Content-addressed blobs on disk and on the wire (stream "blob").

The reader knows root and size beforehand, from something signed: so every frame's size is known before it is
read, the leaf hashes are checked against the root, and every piece against its leaf hash, before it is kept.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef, blob_ref
from hivegrpo.protocol.envelope import DIGEST_BYTES, parse
from hivegrpo.protocol.errors import CommitmentError, FrameError, RemoteError, WireError
from hivegrpo.protocol.files import sync_folder, write_whole
from hivegrpo.protocol.merkle import HASH_BYTES, leaf_hash, merkle_root
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream, Transport

BLOB = "blob"
MAX_BLOB_BYTES = (MAX_FRAME_BYTES // HASH_BYTES) * PIECE_BYTES
"""Largest blob: its leaf hashes fit in one frame (64 GiB)."""

FAIR_SECONDS = 15.0
"""What one of many holders may take at least, seconds."""


class BlobStore:
    """A folder of blobs, each a file named by its root. Leaf hashes of what is served are kept in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._leaves: dict[bytes, list[bytes]] = {}

    def path(self, ref: BlobRef) -> Path | None:
        """The blob's file, if it is here whole."""
        path = self.folder / ref.root.hex()
        return path if path.is_file() and path.stat().st_size == ref.size else None

    def has(self, ref: BlobRef) -> bool:
        """Whether the blob is here whole."""
        return self.path(ref) is not None

    def read(self, ref: BlobRef) -> bytes:
        """The whole content; FileNotFoundError if it is not here."""
        path = self.path(ref)
        if path is None:
            raise FileNotFoundError(f"no blob {ref.root.hex()} in {self.folder}")
        return path.read_bytes()

    def add_bytes(self, data: bytes | memoryview) -> BlobRef:
        """Keep `data`, written whole."""
        ref = blob_ref(data)
        if not self.has(ref):
            write_whole(self.folder / ref.root.hex(), data)
        return ref

    def add_file(self, source: Path) -> BlobRef:
        """Keep a copy of a file's content, read and hashed piece by piece."""
        partial = self.folder / f".adding-{os.getpid()}-{source.name}"
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

    def leaves(self, ref: BlobRef) -> list[bytes]:
        """Leaf hashes of a blob that is here."""
        if ref.root not in self._leaves:
            self._leaves[ref.root] = _leaves_of(self.folder / ref.root.hex())
        return self._leaves[ref.root]

    def read_piece(self, ref: BlobRef, index: int) -> bytes:
        """One piece of a blob that is here."""
        with (self.folder / ref.root.hex()).open("rb") as file:
            file.seek(index * PIECE_BYTES)
            return file.read(ref.piece_size(index))


async def serve_blobs(transport: Transport, store: BlobStore) -> None:
    """Answer requests for what `store` holds; anything else is refused by closing the stream."""

    async def handle(stream: Stream) -> None:
        request = parse(pb.BlobRequest, await stream.receive(256))
        ref = BlobRef(request.blob.root, request.blob.size)
        if len(ref.root) != DIGEST_BYTES or not store.has(ref):
            return
        last = min(request.first + request.count, ref.pieces)
        await stream.send(b"".join(await asyncio.to_thread(store.leaves, ref)))
        for index in range(request.first, last):
            await stream.send(await asyncio.to_thread(store.read_piece, ref, index))

    await transport.serve_stream(BLOB, handle)


async def fetch_blob(
    transport: Transport, ref: BlobRef, holders: Sequence[str], store: BlobStore, timeout: float = 300.0
) -> Path:
    """Get a blob from the first holders that can serve it, and keep it in `store`.

    Pieces are checked one by one as they arrive and survive a failing holder or a restart. None of several holders
    gets all the time, so that a slow one does not keep the others from being asked. RemoteError when no holder could
    serve it whole within `timeout` seconds.
    """
    if ref.size > MAX_BLOB_BYTES:
        raise FrameError(f"a blob of {ref.size} bytes is above the bound of {MAX_BLOB_BYTES}")
    here = store.path(ref)
    if here is not None:
        return here
    failures = []
    share = timeout if len(holders) < 2 else max(timeout / len(holders), min(timeout / 2, FAIR_SECONDS))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            for holder in holders:
                try:
                    async with asyncio.timeout(share):
                        return await _fetch_from(transport, ref, holder, store)
                except WireError as error:
                    failures.append(f"{holder}: {error}")
                except TimeoutError:
                    failures.append(f"{holder}: not whole within {share:.0f} s")
    raise RemoteError(f"no holder served blob {ref.root.hex()[:16]} ({'; '.join(failures) or 'none known'})")


async def _fetch_from(transport: Transport, ref: BlobRef, holder: str, store: BlobStore) -> Path:
    partial = store.folder / f".part-{ref.root.hex()}"
    done = partial.stat().st_size // PIECE_BYTES if partial.is_file() else 0
    done = min(done, max(ref.pieces - 1, 0))
    async with await transport.open_stream(holder, BLOB) as stream:
        request = pb.BlobRequest(blob=pb.Blob(root=ref.root, size=ref.size), first=done, count=ref.pieces - done)
        await stream.send(request.SerializeToString())
        leaves = _split_leaves(await stream.receive(HASH_BYTES * ref.pieces), ref)
        with partial.open("ab") as file:
            file.truncate(done * PIECE_BYTES)
            for index in range(done, ref.pieces):
                piece = await stream.receive(ref.piece_size(index))
                if len(piece) != ref.piece_size(index) or leaf_hash(piece) != leaves[index]:
                    raise CommitmentError(f"piece {index} of blob {ref.root.hex()[:16]} is not what its root says")
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    whole = await asyncio.to_thread(_matches, partial, leaves)
    if not whole:
        partial.unlink()
        raise CommitmentError(f"a resumed part of blob {ref.root.hex()[:16]} was damaged; it starts over")
    path = store.folder / ref.root.hex()
    partial.rename(path)
    sync_folder(store.folder)
    return path


def _split_leaves(data: bytes, ref: BlobRef) -> list[bytes]:
    leaves = [data[start : start + HASH_BYTES] for start in range(0, len(data), HASH_BYTES)]
    if len(data) != HASH_BYTES * ref.pieces or merkle_root(leaves) != ref.root:
        raise CommitmentError(f"the leaf hashes are not those of blob {ref.root.hex()[:16]}")
    return leaves


def _matches(path: Path, leaves: Sequence[bytes]) -> bool:
    """Whether a file's pieces have these hashes: parts that an earlier process left are not trusted."""
    return _leaves_of(path) == list(leaves)


def _leaves_of(path: Path) -> list[bytes]:
    """Leaf hashes of a file's pieces, read one by one: a blob may be larger than memory."""
    with path.open("rb") as file:
        return [leaf_hash(piece) for piece in iter(lambda: file.read(PIECE_BYTES), b"")]
