"""Content-addressed blobs: files, policy states and spans are named by the Merkle root over their pieces."""

from collections.abc import Iterator
from dataclasses import dataclass

from hivegrpo.protocol.merkle import leaf_hash, merkle_root

PIECE_BYTES = 1 << 20
"""Bytes in a piece; the last piece of a blob may be shorter."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """What has to be known before the first byte of a blob is accepted."""

    root: bytes
    """Merkle root over the leaf hashes of its pieces, 32 bytes."""
    size: int
    """Bytes."""

    @property
    def pieces(self) -> int:
        return -(-self.size // PIECE_BYTES)

    def piece_size(self, index: int) -> int:
        return min(PIECE_BYTES, self.size - index * PIECE_BYTES)


def split_pieces(data: bytes | memoryview) -> Iterator[memoryview]:
    """The pieces of a byte buffer, without copying."""
    view = memoryview(data).cast("B")
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def blob_leaves(data: bytes | memoryview) -> list[bytes]:
    """Leaf hashes of the pieces."""
    return [leaf_hash(piece) for piece in split_pieces(data)]


def blob_root(data: bytes | memoryview) -> bytes:
    """Merkle root over the pieces, 32 bytes."""
    return merkle_root(blob_leaves(data))


def blob_ref(data: bytes | memoryview) -> BlobRef:
    """The reference by which others can ask for `data`."""
    return BlobRef(blob_root(data), memoryview(data).nbytes)
