"""What the coordinator keeps of old states while it fetches newer ones."""

import asyncio
from pathlib import Path

import pytest

from hivegrpo.coordinator.archive import Archive
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.memory import MemoryNetwork


def state(version: int) -> bytes:
    return bytes([version]) * 100


def manifest(version: int, reference: int = 0, restores: int | None = None) -> pb.VersionManifest:
    ref = blob_ref(state(version if restores is None else restores))
    content = pb.Blob(root=ref.root, size=ref.size)
    return pb.VersionManifest(version=version, state=content, reference_version=reference, restores=restores)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """Has the states of versions 10 and 20."""
    kept = BlobStore(tmp_path)
    for version in (10, 20):
        kept.add_bytes(state(version))
    return kept


def archive(store: BlobStore, promised: int | None = None) -> Archive:
    transport = MemoryNetwork().join(Identity.generate())
    return Archive(transport, store, lambda _: [], every=10, final=99, on_idle=lambda: None, promised=lambda: promised)


def fetch(keeping: Archive, store: BlobStore, version: int) -> None:
    """The state of a version comes, and what is not needed any more goes."""
    store.add_bytes(state(version))
    asyncio.run(keeping._fetch(manifest(version)))


def has(store: BlobStore, version: int) -> bool:
    return store.has(blob_ref(state(version)))


def test_older_anchors_make_room(store: BlobStore) -> None:
    keeping = archive(store)
    keeping.restore([manifest(10), manifest(20)])
    fetch(keeping, store, 30)
    assert (keeping.versions, has(store, 10), has(store, 20)) == ([20, 30], False, True)


def test_a_restart_in_the_middle_of_a_fetch_keeps_the_reference(store: BlobStore) -> None:
    keeping = archive(store)
    keeping.restore([manifest(10), manifest(20), manifest(30), manifest(35, reference=10)])
    fetch(keeping, store, 30)
    assert has(store, 10)


def test_a_reference_that_was_ordered_is_kept_until_its_version_is_made(store: BlobStore) -> None:
    keeping = archive(store, promised=10)
    keeping.restore([manifest(10), manifest(20)])
    fetch(keeping, store, 30)
    assert has(store, 10)


def test_what_a_rollback_goes_back_to_outlives_the_fetch_of_another_anchor(store: BlobStore) -> None:
    keeping = archive(store)
    keeping.restore([manifest(10), manifest(20)])
    keeping.want(manifest(30))
    keeping.want(manifest(31, restores=10))
    fetch(keeping, store, 30)
    assert has(store, 10)
