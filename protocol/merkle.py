"""Merkle trees over byte strings, hashed as in RFC 6962 (section 2.1): leaves and nodes in separate domains.

A root commits to an ordered list of pieces. A contiguous run of pieces can be checked against the root with
the hashes of the subtrees to its left and right, in at most 2 log2(n) hashes.
"""

from collections.abc import Sequence
from hashlib import sha256

from hivegrpo.protocol.errors import CommitmentError

HASH_BYTES = 32


def leaf_hash(piece: bytes | memoryview) -> bytes:
    """SHA-256 of 0x00 and the piece."""
    digest = sha256(b"\x00")
    digest.update(piece)
    return digest.digest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes, in order; the hash of the empty string for none."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    middle = _split(len(leaves))
    return _node(merkle_root(leaves[:middle]), merkle_root(leaves[middle:]))


def range_proof(leaves: Sequence[bytes], run: range) -> list[bytes]:
    """Hashes of the subtrees outside `run`, left to right, that `check_range` needs."""
    if run.start >= run.stop or run.stop <= 0 or run.start >= len(leaves):
        return [merkle_root(leaves)]
    if run.start <= 0 and run.stop >= len(leaves):
        return []
    middle = _split(len(leaves))
    left = range_proof(leaves[:middle], range(run.start, min(run.stop, middle)))
    right = range_proof(leaves[middle:], range(max(run.start - middle, 0), run.stop - middle))
    return left + right


def check_range(root: bytes, size: int, run: range, leaves: Sequence[bytes], proof: Sequence[bytes]) -> None:
    """Raise CommitmentError unless `leaves` are the leaf hashes at `run` of the tree of `size` leaves with `root`."""
    rebuilt, _ = _rebuild(size, run, leaves, proof, run)
    if rebuilt != root:
        raise CommitmentError("the pieces do not belong to the committed root")


def narrow_proof(size: int, run: range, leaves: Sequence[bytes], proof: Sequence[bytes], part: range) -> list[bytes]:
    """The proof of `part`, which lies within `run`, from the leaf hashes and the proof of `run`."""
    assert run.start <= part.start < part.stop <= run.stop
    return _rebuild(size, run, leaves, proof, part)[1]


def _rebuild(
    size: int, run: range, leaves: Sequence[bytes], proof: Sequence[bytes], part: range
) -> tuple[bytes, list[bytes]]:
    """Root of the tree of `size` leaves that `proof` makes of those at `run`, and the proof of `part` under it."""
    assert 0 <= run.start < run.stop <= size
    if len(leaves) != len(run):
        raise CommitmentError(f"expected {len(run)} leaf hashes, got {len(leaves)}")
    if any(len(node) != HASH_BYTES for node in proof):
        raise CommitmentError("the Merkle proof holds something that is no hash")
    rest = iter(proof)

    def rebuild(low: int, high: int) -> tuple[bytes, list[bytes]]:
        if high <= run.start or low >= run.stop:
            node = next(rest)
            return node, [node]
        outside = high <= part.start or low >= part.stop
        if high - low == 1:
            node = leaves[low - run.start]
            return node, [node] if outside else []
        middle = low + _split(high - low)
        left, left_proof = rebuild(low, middle)
        right, right_proof = rebuild(middle, high)
        node = _node(left, right)
        return node, [node] if outside else [*left_proof, *right_proof]

    try:
        rebuilt = rebuild(0, size)
    except StopIteration:
        raise CommitmentError("the Merkle proof is too short") from None
    if next(rest, None) is not None:
        raise CommitmentError("the Merkle proof is too long")
    return rebuilt


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)
