"""Blobs on disk and on the wire: from several holders at once, through holders that fail, lie or stall."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from hivegrpo.protocol import blobfetch
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobfetch import BlobFetch, fetch_blob
from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef, blob_leaves, blob_ref
from hivegrpo.protocol.blobstore import PART, BlobStore, PartialBlob
from hivegrpo.protocol.blobstream import BLOB, BLOCK_BYTES, MAX_BLOB_BYTES, BlobServer, serve_blobs
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import CommitmentError, FrameError, RemoteError
from hivegrpo.protocol.files import TEMPORARY, remove_temporaries
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

DATA = bytes(range(251)) * (2 * PIECE_BYTES // 251 + 100)
"""Three pieces, the last one short, no two alike."""
REF = blob_ref(DATA)
PIECES = [DATA[start : start + PIECE_BYTES] for start in range(0, len(DATA), PIECE_BYTES)]
LEAVES = blob_leaves(DATA)
LONG = random.Random(5).randbytes(12 * PIECE_BYTES)
PATIENCE = 20.0

Serve = Callable[[Transport], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fetch waits for by the clock comes soon."""
    monkeypatch.setattr(blobfetch, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(blobfetch, "MAP_SECONDS", 0.05)


@pytest.fixture
def theirs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "theirs")


@pytest.fixture
def ours(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "ours")


def with_holders(holders: dict[str, Serve], scenario: Callable[[Transport], Awaitable[None]]) -> None:
    """Run `scenario` at a node that is connected to these."""

    async def run() -> None:
        network = MemoryNetwork()
        reader = network.join("reader")
        nodes = [reader]
        for name, serve in holders.items():
            holder = network.join(name)
            nodes.append(holder)
            await serve(holder)
            await reader.connect(holder.addresses())
        async with asyncio.timeout(PATIENCE):
            await scenario(reader)
        for node in nodes:
            await node.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


class Scripted:
    """A holder that says what it is told to, and notes what it is asked for."""

    def __init__(
        self,
        pieces: Sequence[bytes | None] = PIECES,
        *,
        leaves: Sequence[bytes] = LEAVES,
        map_: bytes = b"\x07",
        most: int = 1000,
        before: Callable[[int], Awaitable[None]] | None = None,
        pause: float = 0.0,
    ) -> None:
        """`pieces`: None is not there; it ends the stream after `most` pieces, awaits `before` each, and pauses for so
        many seconds before each block."""
        self.asked: list[int] = []
        self.streams = 0
        self._pieces, self._leaves, self._map, self._most, self._before = pieces, leaves, map_, most, before
        self._pause = pause

    async def __call__(self, transport: Transport) -> None:
        await transport.serve_stream(BLOB, self._serve)

    async def _serve(self, stream: Stream) -> None:
        self.streams += 1
        parse(pb.BlobRequest, await stream.receive(10_000))
        await stream.send(b"".join(self._leaves))
        await stream.send(pb.PieceMap(have=self._map).SerializeToString())
        for _ in range(self._most):
            try:
                request = parse(pb.PieceRequest, await stream.receive(64))
            except RemoteError:
                return
            if request.map:
                await stream.send(pb.PieceMap(have=self._map).SerializeToString())
                continue
            self.asked.append(request.piece)
            if self._before is not None:
                await self._before(request.piece)
            piece = self._pieces[request.piece]
            for start in range(0, len(piece or b"1"), BLOCK_BYTES):
                await asyncio.sleep(self._pause)
                await stream.send(b"" if piece is None else piece[start : start + BLOCK_BYTES])


def honest(store: BlobStore) -> Serve:
    async def serve(transport: Transport) -> None:
        await serve_blobs(transport, store)

    return serve


def fetch(
    reader: Transport, ref: BlobRef, store: BlobStore, holders: Sequence[str], seed: str | None = None, **times: float
) -> BlobFetch:
    return BlobFetch(ref, store, lambda: holders, lambda peer: reader.open_stream(peer, BLOB), seed=seed, **times)


async def noted(patch: pytest.MonkeyPatch, folder: Path, pieces: int) -> None:
    """Wait until a blob on its way into a folder has so many pieces."""
    here, note = asyncio.Event(), PartialBlob.note

    def watched(self: PartialBlob, index: int) -> None:
        note(self, index)
        if self._path.parent == folder and len(self.have) >= pieces:
            here.set()

    patch.setattr(PartialBlob, "note", watched)
    await here.wait()


def tampered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, len(DATA)])
def test_a_blob_makes_the_round_trip(theirs: BlobStore, ours: BlobStore, size: int) -> None:
    data = DATA[:size]
    ref = theirs.add_bytes(data)

    async def scenario(reader: Transport) -> None:
        path = await fetch_blob(reader, ref, ["holder"], ours)
        assert path.read_bytes() == data
        assert ours.read(ref) == data
        assert [path.name for path in ours.folder.iterdir()] == [ref.root.hex()]

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


@pytest.mark.parametrize(
    "lies",
    [
        Scripted([PIECES[0], tampered(PIECES[1]), PIECES[2]]),
        Scripted([PIECES[0], PIECES[2], PIECES[1]]),
        Scripted([PIECES[0], PIECES[1], PIECES[2] + b"more"]),
        Scripted([PIECES[0], PIECES[1][:-1], PIECES[2]]),
        Scripted([PIECES[0], PIECES[1][:BLOCK_BYTES], PIECES[2]]),
        Scripted(leaves=[*LEAVES[:-1], tampered(LEAVES[-1])]),
        Scripted(leaves=LEAVES[:-1]),
        Scripted(map_=b""),
        Scripted(map_=b"\x07\x00"),
        Scripted(most=0),
        Scripted([PIECES[0], None, PIECES[2]]),
        Scripted(map_=b"\x05"),
    ],
    ids=[
        "tampered", "swapped", "longer", "shorter", "cut", "leaves", "fewer leaves", "no map", "long map", "ends early",
        "not there after all", "not there",
    ],
)  # fmt: skip
def test_a_holder_that_lies_or_lacks_something_is_passed_over(
    theirs: BlobStore, ours: BlobStore, lies: Scripted
) -> None:
    theirs.add_bytes(DATA)

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="no holder served blob"):
            await fetch_blob(reader, REF, ["liar"], ours, stall=0.4)
        assert not ours.has(REF)
        assert (await fetch_blob(reader, REF, ["liar", "holder"], ours)).read_bytes() == DATA

    with_holders({"liar": lies, "holder": honest(theirs)}, scenario)


@pytest.mark.parametrize(
    "pieces", [[tampered(piece) for piece in PIECES], [piece[:5] for piece in PIECES]], ids=["wrong", "cut"]
)
def test_who_serves_a_wrong_piece_is_asked_no_more(ours: BlobStore, pieces: list[bytes]) -> None:
    """Not even when nobody else is left to ask."""
    liar = Scripted(pieces)

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="nobody else"):
            await fetch(reader, REF, ours, ["liar"]).run()

    with_holders({"liar": liar}, scenario)
    assert liar.streams == 1


def test_several_holders_give_at_once(ours: BlobStore) -> None:
    """None of them answers before each has been asked: one after the other, this would never end."""
    waiting: set[str] = set()
    all_asked = asyncio.Event()

    def meet(name: str) -> Scripted:
        async def before(_: int) -> None:
            waiting.add(name)
            if len(waiting) == 3:
                all_asked.set()
            await all_asked.wait()

        return Scripted(before=before)

    holders = {name: meet(name) for name in ("a", "b", "c")}

    async def scenario(reader: Transport) -> None:
        assert (await fetch(reader, REF, ours, list(holders)).run()).read_bytes() == DATA

    with_holders(dict(holders), scenario)
    assert sorted(index for holder in holders.values() for index in holder.asked) == [0, 1, 2]


def test_what_a_slow_holder_was_asked_for_is_had_elsewhere(
    theirs: BlobStore, ours: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobfetch, "SLOW_SECONDS", 0.1)
    theirs.add_bytes(DATA)

    async def never(_: int) -> None:
        await asyncio.Event().wait()

    slow = Scripted(before=never)

    async def scenario(reader: Transport) -> None:
        assert (await fetch(reader, REF, ours, ["slow", "holder"]).run()).read_bytes() == DATA

    with_holders({"slow": slow, "holder": honest(theirs)}, scenario)
    assert len(slow.asked) == 1


def test_the_seed_is_asked_for_what_nobody_else_gives(ours: BlobStore) -> None:
    lacks = Scripted([PIECES[0], None, PIECES[2]], map_=b"\x05")
    seed = Scripted()

    async def scenario(reader: Transport) -> None:
        path = await fetch(reader, REF, ours, ["lacks"], seed="seed", patience=0.3).run()
        assert path.read_bytes() == DATA

    with_holders({"lacks": lacks, "seed": seed}, scenario)
    assert (sorted(lacks.asked), seed.asked) == ([0, 2], [1])


def test_what_nobody_has_is_waited_for_until_the_seed_has_refused_twice(theirs: BlobStore, ours: BlobStore) -> None:
    streams: list[str] = []

    async def scenario(reader: Transport) -> None:
        async def opening(peer: str) -> Stream:
            streams.append(peer)
            return await reader.open_stream(peer, BLOB)

        with pytest.raises(RemoteError, match="0 of its 3 pieces"):
            await BlobFetch(REF, ours, lambda: ["holder"], opening, seed="seed", patience=0.05).run()

    with_holders({"holder": honest(theirs), "seed": honest(theirs)}, scenario)
    assert streams.count("seed") == 2


def test_the_seed_is_not_asked_while_others_give(theirs: BlobStore, ours: BlobStore) -> None:
    theirs.add_bytes(DATA)
    seed = Scripted()

    async def scenario(reader: Transport) -> None:
        await fetch(reader, REF, ours, ["holder"], seed="seed", patience=PATIENCE).run()

    with_holders({"holder": honest(theirs), "seed": seed}, scenario)
    assert seed.streams == 0


def test_who_is_slow_to_say_what_it_has_may_have_it(theirs: BlobStore, ours: BlobStore) -> None:
    theirs.add_bytes(DATA)
    seed = Scripted()

    async def scenario(reader: Transport) -> None:
        async def opening(peer: str) -> Stream:
            if peer == "holder":
                await asyncio.sleep(0.8)
            return await reader.open_stream(peer, BLOB)

        await BlobFetch(REF, ours, lambda: ["holder"], opening, seed="seed", patience=1.5).run()

    with_holders({"holder": honest(theirs), "seed": seed}, scenario)
    assert seed.streams == 0


@pytest.mark.parametrize("pause", [0.0, 0.25], ids=["fast", "trickling"])
def test_who_never_says_what_it_has_is_not_waited_for(ours: BlobStore, pause: float) -> None:
    times: list[float] = []

    async def note(_: int) -> None:
        times.append(time.monotonic())

    lacks = Scripted([PIECES[0], None, PIECES[2]], map_=b"\x05", pause=pause)
    seed = Scripted(before=note)

    async def scenario(reader: Transport) -> None:
        async def opening(peer: str) -> Stream:
            if peer == "hangs":
                await asyncio.sleep(PATIENCE)
            return await reader.open_stream(peer, BLOB)

        times.append(time.monotonic())
        await BlobFetch(REF, ours, lambda: ["lacks", "hangs"], opening, seed="seed", patience=0.5).run()

    with_holders({"lacks": lacks, "seed": seed}, scenario)
    assert 1 in seed.asked
    assert times[1] - times[0] < 1.5


def test_what_is_here_already_is_no_progress(ours: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobfetch, "SLOW_SECONDS", 0.1)
    trickling = Scripted([PIECES[0], None, None], map_=b"\x01", pause=0.4)
    lacks = Scripted([PIECES[0], None, PIECES[2]], map_=b"\x05", pause=0.02)

    async def scenario(reader: Transport) -> None:
        began = time.monotonic()
        with pytest.raises(RemoteError, match=r"nothing came within 1 s.*2 of its 3 pieces"):
            await fetch(reader, REF, ours, ["trickling", "lacks"], stall=1.0).run()
        assert time.monotonic() - began < 2.5

    with_holders({"trickling": trickling, "lacks": lacks}, scenario)


def test_alone_the_seed_gives_all_at_once(ours: BlobStore) -> None:
    seed = Scripted()

    async def scenario(reader: Transport) -> None:
        await fetch(reader, REF, ours, ["nobody"], seed="seed", patience=PATIENCE).run()

    with_holders({"seed": seed}, scenario)
    assert sorted(seed.asked) == [0, 1, 2]


def test_who_is_still_fetching_serves_what_it_has(
    ours: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first gets two pieces and no more; the second gets these from the first, and all from nobody else."""
    held = asyncio.Event()

    async def before(_: int) -> None:
        if len(holder.asked) == 3:
            await held.wait()

    holder = Scripted(before=before)

    async def run() -> None:
        network = MemoryNetwork()
        first, second, source = (network.join(name) for name in ("first", "second", "source"))
        await holder(source)
        await serve_blobs(first, ours)
        await first.connect(source.addresses())
        await second.connect(first.addresses())
        fetching = asyncio.create_task(fetch(first, REF, ours, ["source"]).run())
        other = BlobStore(tmp_path / "other")
        await noted(monkeypatch, ours.folder, 1)
        following = asyncio.create_task(fetch(second, REF, other, ["first"]).run())
        await noted(monkeypatch, other.folder, 2)
        assert not ours.has(REF)
        held.set()
        assert (await fetching).read_bytes() == (await following).read_bytes() == DATA
        for node in (first, second, source):
            await node.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_download_that_was_cut_goes_on_where_it_stopped(theirs: BlobStore, ours: BlobStore) -> None:
    """Pieces that are on disk are not asked for again; one that is damaged there is."""
    part = PartialBlob(ours.folder, REF, LEAVES)
    part.resume()
    part.add(0, PIECES[0])
    part.add(2, PIECES[2])
    path = ours.folder / f"{PART}{REF.root.hex()}"
    path.write_bytes(tampered(path.read_bytes()))
    holder = Scripted()

    async def scenario(reader: Transport) -> None:
        assert (await fetch_blob(reader, REF, ["holder"], ours)).read_bytes() == DATA

    with_holders({"holder": holder}, scenario)
    assert sorted(holder.asked) == [1, 2]


def test_what_was_fetched_outlives_a_fetch_that_fails(ours: BlobStore) -> None:
    first, second = Scripted([PIECES[0], None, PIECES[2]], map_=b"\x05"), Scripted()

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="2 of its 3 pieces are here"):
            await fetch_blob(reader, REF, ["first"], ours, stall=0.5)
        assert (await fetch_blob(reader, REF, ["second"], ours)).read_bytes() == DATA

    with_holders({"first": first, "second": second}, scenario)
    assert second.asked == [1]


def test_a_slow_line_is_waited_for_and_a_dead_one_is_not(ours: BlobStore) -> None:
    """Both take three times as long as a fetch waits for the next sign of life; only one gives any."""

    async def trickle(stream: Stream) -> None:
        await stream.receive(10_000)
        await stream.send(LEAVES[0])
        await stream.send(pb.PieceMap(have=b"\x01").SerializeToString())
        await stream.receive(64)
        for start in range(0, PIECE_BYTES, BLOCK_BYTES):
            await asyncio.sleep(0.15)
            await stream.send(PIECES[0][start : start + BLOCK_BYTES])

    async def dead(_: int) -> None:
        await asyncio.Event().wait()

    ref = blob_ref(PIECES[0])

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="nothing"):
            await fetch_blob(reader, ref, ["dead"], ours, stall=0.5)
        await fetch_blob(reader, ref, ["slow"], ours, stall=0.5)

    with_holders(
        {
            "slow": lambda transport: transport.serve_stream(BLOB, trickle),
            "dead": Scripted(leaves=LEAVES[:1], map_=b"\x01", before=dead),
        },
        scenario,
    )


def test_a_fetch_that_is_cancelled_leaves_nothing_running(
    theirs: BlobStore, ours: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.add_bytes(LONG)
    ref = blob_ref(LONG)

    async def scenario(reader: Transport) -> None:
        fetching = asyncio.create_task(fetch_blob(reader, ref, ["holder"], ours))
        await noted(monkeypatch, ours.folder, 1)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        assert (await fetch_blob(reader, ref, ["holder"], ours)).read_bytes() == LONG

    with_holders({"holder": honest(theirs)}, scenario)


def test_a_full_disk_is_told_as_such(ours: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PartialBlob, index: int, piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartialBlob, "add", full)

    async def scenario(reader: Transport) -> None:
        with pytest.raises(OSError, match="No space left"):
            await fetch_blob(reader, REF, ["holder"], ours)

    with_holders({"holder": Scripted()}, scenario)


def test_a_blob_above_the_bound_is_not_asked_for(ours: BlobStore) -> None:
    holder = Scripted()

    async def scenario(reader: Transport) -> None:
        with pytest.raises(FrameError, match="above the bound"):
            await fetch_blob(reader, BlobRef(bytes(32), MAX_BLOB_BYTES + 1), ["holder"], ours)

    with_holders({"holder": holder}, scenario)
    assert holder.streams == 0


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
            await stream.send(pb.BlobRequest(blob=blob).SerializeToString())
            with pytest.raises(RemoteError, match="ended the stream"):
                await stream.receive(1 << 10)

    with_holders({"holder": honest(theirs)}, scenario)


def test_a_reader_that_hangs_up_has_done_nothing_wrong(theirs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks several takes what the first one gives."""
    theirs.add_bytes(DATA)
    asked, gone = threading.Event(), threading.Event()
    leaves, serve, nodes, served = BlobStore.leaves, BlobServer._serve, [], asyncio.Event()

    def slow(store: BlobStore, ref: BlobRef) -> list[bytes] | None:
        asked.set()
        gone.wait(PATIENCE)
        return leaves(store, ref)

    async def noted(server: BlobServer, stream: Stream) -> None:
        try:
            await serve(server, stream)
        finally:
            served.set()

    async def hold(holder: Transport) -> None:
        nodes.append(holder)
        await serve_blobs(holder, theirs)

    async def scenario(reader: Transport) -> None:
        async with await reader.open_stream("holder", BLOB) as stream:
            await stream.send(pb.BlobRequest(blob=pb.Blob(root=REF.root, size=REF.size)).SerializeToString())
            assert await asyncio.to_thread(asked.wait, PATIENCE)
        gone.set()
        await served.wait()
        assert [node.rejected for node in nodes] == [{}]

    monkeypatch.setattr(BlobStore, "leaves", slow)
    monkeypatch.setattr(BlobServer, "_serve", noted)
    with_holders({"holder": hold}, scenario)


def test_a_piece_beyond_the_end_is_not_there(theirs: BlobStore) -> None:
    theirs.add_bytes(DATA)

    async def scenario(reader: Transport) -> None:
        async with await reader.open_stream("holder", BLOB) as stream:
            blob = pb.Blob(root=REF.root, size=REF.size)
            await stream.send(pb.BlobRequest(blob=blob).SerializeToString())
            assert await stream.receive(1 << 10) == b"".join(LEAVES)
            assert parse(pb.PieceMap, await stream.receive(1 << 10)).have == b"\x07"
            for beyond in (3, 1 << 62):
                await stream.send(pb.PieceRequest(piece=beyond).SerializeToString())
                assert await stream.receive(1 << 10) == b""

    with_holders({"holder": honest(theirs)}, scenario)


def test_what_is_removed_while_it_is_fetched_is_not_waited_for(
    ours: BlobStore, theirs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.add_bytes(LONG)
    ref = blob_ref(LONG)
    monkeypatch.setattr("hivegrpo.protocol.blobstream.MAX_IDLE_MAPS", 1_000_000)

    async def scenario(reader: Transport) -> None:
        fetching = asyncio.create_task(fetch_blob(reader, ref, ["holder"], ours))
        await noted(monkeypatch, ours.folder, 1)
        theirs.remove(ref.root)
        with pytest.raises(RemoteError, match="nobody else"):
            await fetching

    with_holders({"holder": honest(theirs)}, scenario)


def test_streams_above_the_bound_are_refused(
    theirs: BlobStore, ours: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs.add_bytes(DATA)
    monkeypatch.setattr("hivegrpo.protocol.blobstream.MAX_SERVED", 0)

    async def scenario(reader: Transport) -> None:
        with pytest.raises(RemoteError, match="does not serve"):
            await fetch_blob(reader, REF, ["holder"], ours)

    with_holders({"holder": honest(theirs)}, scenario)


def test_what_is_damaged_on_disk_is_neither_read_nor_served_and_is_fetched_again(
    theirs: BlobStore, ours: BlobStore
) -> None:
    theirs.add_bytes(DATA)
    path = ours.folder / REF.root.hex()
    path.write_bytes(tampered(DATA))
    with pytest.raises(CommitmentError, match="damaged"):
        ours.read(REF)
    assert ours.has(REF)
    assert ours.leaves(REF) is None
    assert not path.exists()
    ours.add_bytes(DATA)
    assert ours.leaves(REF) == LEAVES
    path.write_bytes(tampered(DATA))
    assert ours.read_piece(REF, 0) == PIECES[0]
    assert ours.read_piece(REF, 2) is None
    assert not path.exists()
    path.write_bytes(tampered(DATA))
    assert ours.remove_damaged(REF)
    assert not ours.remove_damaged(REF)

    async def scenario(reader: Transport) -> None:
        assert (await fetch_blob(reader, REF, ["holder"], ours)).read_bytes() == DATA

    with_holders({"holder": honest(theirs)}, scenario)


def test_a_sweep_leaves_what_is_kept(ours: BlobStore) -> None:
    kept, old, fresh = ours.add_bytes(b"kept"), ours.add_bytes(b"old"), ours.add_bytes(b"fresh")
    ours.touch(fresh)
    for ref in (kept, old):
        os.utime(ours.folder / ref.root.hex(), (0, 0))
    for name in (f"{PART}{kept.root.hex()}", f"{PART}{old.root.hex()}"):
        (ours.folder / name).write_bytes(b"half")
    ours.sweep([kept.root], spare_seconds=3600.0)
    assert sorted(path.name for path in ours.folder.iterdir()) == sorted(
        [kept.root.hex(), fresh.root.hex(), f"{PART}{kept.root.hex()}"]
    )
    ours.sweep([kept.root])
    assert not ours.has(fresh)


def test_half_written_files_of_dead_processes_go(ours: BlobStore, tmp_path: Path) -> None:
    ref = ours.add_bytes(b"whole")
    (ours.folder / f"{TEMPORARY}x").write_bytes(b"ha")
    (tmp_path / f"{TEMPORARY}y").write_bytes(b"lf")
    remove_temporaries(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [ours.folder / ref.root.hex()]
