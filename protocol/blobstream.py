"""Content-addressed blobs on the wire: both sides of a stream "blob", on which pieces of one blob are asked for.

The reader knows root and size beforehand, from something signed: so every frame's size is known before it is read, the
leaf hashes are checked against the root, and every piece against its leaf hash. Who is still fetching a blob serves
the pieces that it has.
"""

import asyncio
from contextlib import suppress

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import PIECE_BYTES, BlobRef
from hivegrpo.protocol.blobstore import BlobStore, split_leaves
from hivegrpo.protocol.envelope import DIGEST_BYTES, parse
from hivegrpo.protocol.errors import FrameError, RemoteError, StaleError, WireError
from hivegrpo.protocol.holders import MAX_RECORD_BYTES, MAX_TOLD, HolderBook
from hivegrpo.protocol.merkle import HASH_BYTES
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream, Transport

BLOB = "blob"
MAX_BLOB_BYTES = (MAX_FRAME_BYTES // HASH_BYTES) * PIECE_BYTES
"""Largest blob: its leaf hashes fit in one frame (64 GiB)."""

BLOCK_BYTES = 128 << 10
"""A piece travels in frames of so much: what arrives shows before a whole piece is there."""

MAX_SERVED = 128
"""Streams that are served at once. Who is refused finds others, of whom there are ever more."""

MAX_SERVED_TO_ONE = 16
MAX_IDLE_MAPS = 120
"""Maps in a row, without a piece, after which a stream is ended: it takes somebody else's place."""

IDLE_SECONDS = 30.0
MAX_REQUEST_BYTES = 256 + MAX_RECORD_BYTES
MAX_MAP_BYTES = 64 + MAX_BLOB_BYTES // PIECE_BYTES // 8 + MAX_TOLD * (16 + MAX_RECORD_BYTES)


class BlobServer:
    """Answers requests for what `store` holds, whole or in part; anything else is refused by ending the stream."""

    def __init__(self, store: BlobStore, book: HolderBook | None = None) -> None:
        """`book` is where those who ask are told of each other; without one they are not."""
        self.sent = 0
        """Bytes of pieces so far."""
        self._store = store
        self._book = book
        self._served = 0

    async def start(self, transport: Transport) -> None:
        """Serve from now on."""
        await transport.serve_stream(BLOB, self._serve, max_per_peer=MAX_SERVED_TO_ONE)

    async def _serve(self, stream: Stream) -> None:
        """One reader's stream, until it has had enough. WireError for a request that makes no sense."""
        request = parse(pb.BlobRequest, await stream.receive(MAX_REQUEST_BYTES))
        ref = BlobRef(request.blob.root, request.blob.size)
        if len(ref.root) != DIGEST_BYTES or self._served >= MAX_SERVED:
            return
        self._served += 1
        try:
            leaves = await asyncio.to_thread(self._store.leaves, ref)
            if leaves is None:
                return
            if self._book is not None and request.HasField("holder"):
                with suppress(WireError):  # a hint; a clock that is wrong keeps nobody from being served
                    self._book.take(request.holder, signer=stream.remote)
            with suppress(RemoteError):  # it went away: others gave it what it wanted
                await stream.send(b"".join(leaves))
                await self._send_map(stream, ref)
                await self._answer(stream, ref)
        finally:
            self._served -= 1

    async def _answer(self, stream: Stream, ref: BlobRef) -> None:
        idle = 0
        while idle < MAX_IDLE_MAPS:
            request = parse(pb.PieceRequest, await stream.receive(64, IDLE_SECONDS))
            if await asyncio.to_thread(self._store.leaves, ref) is None:
                return  # removed meanwhile
            if request.map:
                idle += 1
                await self._send_map(stream, ref)
                continue
            piece = await asyncio.to_thread(self._store.read_piece, ref, request.piece)
            if piece is None:
                await stream.send(b"")
                continue
            idle = 0
            for start in range(0, len(piece), BLOCK_BYTES):
                block = piece[start : start + BLOCK_BYTES]
                await stream.send(block)
                self.sent += len(block)

    async def _send_map(self, stream: Stream, ref: BlobRef) -> None:
        others = [] if self._book is None else self._book.others(stream.remote)
        await stream.send(pb.PieceMap(have=self._store.map(ref), others=others).SerializeToString())


async def serve_blobs(transport: Transport, store: BlobStore, book: HolderBook | None = None) -> BlobServer:
    """Serve what `store` holds from now on."""
    server = BlobServer(store, book)
    await server.start(transport)
    return server


class BlobReader:
    """The asking side of one stream. Answers come in the order of the requests."""

    def __init__(self, stream: Stream, ref: BlobRef) -> None:
        self.ref = ref
        self.peer = stream.remote
        self.have = b""
        """The other side's map."""
        self._stream = stream

    async def begin(self, own: pb.Signed | None, timeout: float) -> tuple[list[bytes], list[pb.Signed]]:
        """Name the blob; its leaf hashes, checked, and what the other side tells of others.

        StaleError if the other side has nothing of it, or no time.
        """
        ref = self.ref
        request = pb.BlobRequest(blob=pb.Blob(root=ref.root, size=ref.size), holder=own)
        try:
            await self._stream.send(request.SerializeToString())
            frame = await self._stream.receive(HASH_BYTES * ref.pieces, timeout)
        except RemoteError as error:
            raise StaleError(f"it does not serve blob {ref.root.hex()[:16]}: {error.message}") from None
        leaves = await asyncio.to_thread(split_leaves, frame, ref)
        return leaves, await self.read_map(timeout)

    async def ask(self, index: int) -> None:
        """Ask for a piece."""
        await self._stream.send(pb.PieceRequest(piece=index).SerializeToString())

    async def ask_map(self) -> None:
        """Ask what the other side has by now."""
        await self._stream.send(pb.PieceRequest(map=True).SerializeToString())

    async def read_map(self, timeout: float) -> list[pb.Signed]:
        """Take a map that was asked for; what the other side tells of others, as yet unverified."""
        answer = parse(pb.PieceMap, await self._stream.receive(MAX_MAP_BYTES, timeout))
        if len(answer.have) != -(-self.ref.pieces // 8):
            raise FrameError(f"a map of {len(answer.have)} bytes for {self.ref.pieces} pieces")
        self.have = answer.have
        return list(answer.others)[:MAX_TOLD]

    async def read_block(self, left: int, timeout: float) -> bytes:
        """The next frame of a piece of which `left` bytes are to come; empty if the piece is not there.

        FrameError for a frame of another size: a piece in very many of them would be work for nothing.
        """
        size = min(BLOCK_BYTES, left)
        block = await self._stream.receive(size, timeout)
        if block and len(block) != size:
            raise FrameError(f"a block of {len(block)} bytes where {size} were due")
        return block

    def offers(self, index: int) -> bool:
        """Whether the other side has a piece, by its map."""
        return bool(self.have[index >> 3] >> (index & 7) & 1)

    def withdraw(self, index: int) -> None:
        """The other side has a piece no longer."""
        have = bytearray(self.have)
        have[index >> 3] &= ~(1 << (index & 7)) & 0xFF
        self.have = bytes(have)

    async def close(self) -> None:
        """End the stream."""
        await self._stream.close()
