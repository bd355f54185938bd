from hashlib import sha256

import pytest

from hivegrpo.protocol.errors import CommitmentError
from hivegrpo.protocol.merkle import check_range, leaf_hash, merkle_root, narrow_proof, range_proof

# Certificate Transparency's published vectors: pieces, and the root over the first n of them.
PIECES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZES = range(1, 41)


def leaves_of(size: int) -> list[bytes]:
    return [leaf_hash(bytes([index])) for index in range(size)]


def ranges_of(size: int) -> list[range]:
    return [range(start, stop) for start in range(size) for stop in range(start + 1, size + 1)]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_rfc_6962(size: int) -> None:
    leaves = [leaf_hash(bytes.fromhex(piece)) for piece in PIECES[:size]]
    assert merkle_root(leaves).hex() == ROOTS[size - 1]


def test_the_root_of_nothing_is_the_hash_of_nothing() -> None:
    assert merkle_root([]) == sha256(b"").digest()


def test_a_leaf_cannot_pass_for_a_node() -> None:
    left, right = leaves_of(2)
    assert leaf_hash(left + right) != merkle_root([left, right])


@pytest.mark.parametrize("size", SIZES)
def test_every_range_is_proven_by_few_hashes(size: int) -> None:
    leaves = leaves_of(size)
    root = merkle_root(leaves)
    for run in ranges_of(size):
        proof = range_proof(leaves, run)
        check_range(root, size, run, leaves[run.start : run.stop], proof)
        assert len(proof) <= 2 * (size - 1).bit_length()


@pytest.mark.parametrize("size", range(2, 18))
def test_another_place_leaf_or_proof_is_refused(size: int) -> None:
    leaves = leaves_of(size)
    root = merkle_root(leaves)
    other = leaf_hash(b"other")
    for run in ranges_of(size):
        proof, part = range_proof(leaves, run), leaves[run.start : run.stop]
        forgeries = [([other, *part[1:]], proof), ([*part[:-1], other], proof), (part, [*proof, other])]
        if proof:
            forgeries += [(part, proof[:-1]), (part, [other, *proof[1:]]), (part, [*proof[:-1], other])]
        if len(part) > 1:
            forgeries += [(part[::-1], proof), (part[:-1], proof)]
        for forged_leaves, forged_proof in forgeries:
            with pytest.raises(CommitmentError):
                check_range(root, size, run, forged_leaves, forged_proof)
        if run.stop < size:
            with pytest.raises(CommitmentError):
                check_range(root, size, range(run.start + 1, run.stop + 1), part, proof)


def test_a_proof_narrowed_to_a_part_is_the_parts_own() -> None:
    for size in range(1, 12):
        leaves = [leaf_hash(bytes([place])) for place in range(size)]
        runs = [range(low, high) for low in range(size) for high in range(low + 1, size + 1)]
        for run in runs:
            proof = range_proof(leaves, run)
            for part in (part for part in runs if run.start <= part.start and part.stop <= run.stop):
                narrow = narrow_proof(size, run, leaves[run.start : run.stop], proof, part)
                assert narrow == range_proof(leaves, part)
