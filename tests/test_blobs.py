import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef, blob_leaves, blob_ref
from hivegrpo.protocol.blobstream import BLOB, MAX_BLOB_BYTES, BlobStore, fetch_blob, serve_blobs
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import FrameError, RemoteError
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

DATA = bytes(range(251)) * (2 * PIECE_BYTES // 251 + 100)
"""Three pieces, the last one short, no two alike."""
REF = blob_ref(DATA)
PIECES = [DATA[start : start + PIECE_BYTES] for start in range(0, len(DATA), PIECE_BYTES)]


@pytest.fixture
def theirs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "theirs")


@pytest.fixture
def ours(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "ours")


def with_holders(
    holders: dict[str, Callable[[Transport], Awaitable[None]]], scenario: Callable[[Transport], Awaitable[None]]
) -> None:
    """Run `scenario` at a node that is connected to these."""

    async def run() -> None:
        network = MemoryNetwork()
        reader = network.join("reader")
        for name, serve in holders.items():
            holder = network.join(name)
            await serve(holder)
            await reader.connect(holder.addresses())
        await scenario(reader)

    asyncio.run(run())


def serving(*frames: bytes, asked: list[pb.BlobRequest] | None = None) -> Callable[[Transport], Awaitable[None]]:
    """A holder that answers every request with these frames."""

    async def handle(stream: Stream) -> None:
        request = parse(pb.BlobRequest, await stream.receive(256))
        if asked is not None:
            asked.append(request)
        for frame in frames:
            await stream.send(frame)

    async def serve(transport: Transport) -> None:
        await transport.serve_stream(BLOB, handle)

    return serve


def honest(store: BlobStore) -> Callable[[Transport], Awaitable[None]]:
    return lambda transport: serve_blobs(transport, store)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, len(DATA)])
def test_a_blob_makes_the_round_trip(theirs: BlobStore, ours: BlobStore, size: int) -> None:
    data = DATA[:size]
    ref = theirs.add_bytes(data)

    async def scenario(reader: Transport) -> None:
        path = await fetch_blob(reader, ref, ["holder"], ours)
        assert path.read_bytes() == data
        assert ours.read(ref) == data

    with_holders({"holder": honest(theirs)}, scenario)


def test_a_file_and_its_bytes_have_one_name(theirs: BlobStore, ours: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    assert theirs.add_file(tmp_path / "file") == ours.add_bytes(DATA) == REF
    assert [path.name for path in theirs.folder.iterdir()] == [REF.root.hex()]


def test_what_is_removed_is_gone(ours: BlobStore) -> None:
    ref = ours.add_bytes(DATA)
    ours.remove(ref.root)
    assert not ours.has(ref)
    with pytest.raises(FileNotFoundError):
        ours.read(ref)


def tampered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


LEAVES = blob_leaves(DATA)


@pytest.mark.parametrize(
    "frames",
    [
        (b"".join(LEAVES), PIECES[0], tampered(PIECES[1]), PIECES[2]),
        (b"".join(LEAVES), PIECES[0], PIECES[2], PIECES[1]),
        (b"".join(LEAVES), PIECES[0], PIECES[1], PIECES[2] + b"more"),
        (b"".join(LEAVES), PIECES[0], PIECES[1][:-1], PIECES[2]),
        (tampered(b"".join(LEAVES)), *PIECES),
        (b"".join(LEAVES[:-1]), *PIECES),
        (b"".join(LEAVES), *PIECES[:2]),
        (),
    ],
    ids=["tampered", "swapped", "longer", "shorter", "leaves", "fewer leaves", "ends early", "refuses"],
)
def test_a_lying_holder_is_passed_over(theirs: BlobStore, ours: BlobStore, frames: tuple[bytes, ...]) -> None:
    theirs.add_bytes(DATA)

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="no holder served blob"):
            await fetch_blob(reader, REF, ["liar"], ours)
        assert not ours.has(REF)
        path = await fetch_blob(reader, REF, ["liar", "holder"], ours)
        assert path.read_bytes() == DATA

    with_holders({"liar": serving(*frames), "holder": honest(theirs)}, scenario)


def test_a_partial_download_goes_on_where_it_stopped(ours: BlobStore) -> None:
    first: list[pb.BlobRequest] = []
    second: list[pb.BlobRequest] = []
    stops = serving(b"".join(LEAVES), *PIECES[:2], asked=first)
    goes_on = serving(b"".join(LEAVES), PIECES[2], asked=second)

    async def scenario(reader: Transport) -> None:
        path = await fetch_blob(reader, REF, ["stops", "goes on"], ours)
        assert path.read_bytes() == DATA

    with_holders({"stops": stops, "goes on": goes_on}, scenario)
    assert [(request.first, request.count) for request in first + second] == [(0, 3), (2, 1)]


def test_pieces_before_a_tampered_one_are_kept(ours: BlobStore) -> None:
    asked: list[pb.BlobRequest] = []
    lies = serving(b"".join(LEAVES), PIECES[0], tampered(PIECES[1]), PIECES[2])
    goes_on = serving(b"".join(LEAVES), *PIECES[1:], asked=asked)

    async def scenario(reader: Transport) -> None:
        path = await fetch_blob(reader, REF, ["lies", "goes on"], ours)
        assert path.read_bytes() == DATA

    with_holders({"lies": lies, "goes on": goes_on}, scenario)
    assert [(request.first, request.count) for request in asked] == [(1, 2)]


def test_a_damaged_partial_starts_over(theirs: BlobStore, ours: BlobStore) -> None:
    theirs.add_bytes(DATA)
    (ours.folder / f".part-{REF.root.hex()}").write_bytes(tampered(PIECES[0]))

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="starts over"):
            await fetch_blob(reader, REF, ["holder"], ours)
        assert (await fetch_blob(reader, REF, ["holder"], ours)).read_bytes() == DATA

    with_holders({"holder": honest(theirs)}, scenario)


def test_a_blob_above_the_bound_is_not_asked_for(ours: BlobStore) -> None:
    asked: list[pb.BlobRequest] = []

    async def scenario(reader: Transport) -> None:
        with pytest.raises(FrameError, match="above the bound"):
            await fetch_blob(reader, BlobRef(bytes(32), MAX_BLOB_BYTES + 1), ["holder"], ours)

    with_holders({"holder": serving(asked=asked)}, scenario)
    assert asked == []


def test_a_blob_that_is_here_is_not_asked_for(ours: BlobStore) -> None:
    ours.add_bytes(DATA)

    async def scenario(reader: Transport) -> None:
        assert (await fetch_blob(reader, REF, [], ours)).read_bytes() == DATA

    with_holders({}, scenario)


@pytest.mark.parametrize(
    "blob", [pb.Blob(root=bytes(32), size=5), pb.Blob(root=b"../../etc/passwd", size=5), pb.Blob(root=REF.root, size=5)]
)
def test_only_what_is_held_is_served(theirs: BlobStore, blob: pb.Blob) -> None:
    theirs.add_bytes(DATA)

    async def scenario(reader: Transport) -> None:
        async with await reader.open_stream("holder", BLOB) as stream:
            await stream.send(pb.BlobRequest(blob=blob, count=1).SerializeToString())
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(1 << 10)

    with_holders({"holder": honest(theirs)}, scenario)
