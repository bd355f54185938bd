"""The chain on the wire (stream "chain"): the run manifest, then entries from a version on.

Coordinator and peers serve it alike; the reader verifies every entry, so it does not matter who answers.
"""

from collections.abc import Callable
from typing import Protocol

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import MAX_ENTRY_BYTES, Chain, Entry
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, FrameError
from hivegrpo.protocol.transport.base import Stream, Transport

CHAIN = "chain"
MAX_ENTRIES = 256
"""Entries in one answer; a reader that wants more asks again."""


class ChainSource(Protocol):
    """What can serve a chain."""

    @property
    def run(self) -> pb.Signed:
        """The signed run manifest."""

    @property
    def height(self) -> int:
        """Version of the head; -1 before version 0."""

    def entry(self, version: int) -> pb.ChainEntry:
        """The entry of a version up to `height`."""


async def serve_chain(transport: Transport, source: ChainSource) -> None:
    """Answer requests with at most `MAX_ENTRIES` entries each."""

    async def handle(stream: Stream) -> None:
        request = parse(pb.ChainRequest, await stream.receive(64))
        versions = range(request.first, min(request.first + MAX_ENTRIES, source.height + 1))
        header = pb.ChainHeader(run=source.run, first=request.first, count=len(versions))
        await stream.send(header.SerializeToString())
        for version in versions:
            await stream.send(source.entry(version).SerializeToString())

    await transport.serve_stream(CHAIN, handle)


async def fetch_run(transport: Transport, holder: str) -> pb.Signed:
    """The signed run manifest that `holder` serves, unverified; give it to `Chain`."""
    async with await transport.open_stream(holder, CHAIN) as stream:
        header = await _ask(stream, first=0)
        return header.run


async def extend_chain(
    transport: Transport, holder: str, chain: Chain, append: Callable[[pb.ChainEntry], Entry] | None = None
) -> int:
    """Fetch and verify what `holder` has beyond `chain`'s head; how many versions were added.

    `append` adds an entry to `chain`, by default `chain.append`; a home gives the one that also writes it.

    ChainError for an entry that does not verify or for another run; WireError when the holder fails.
    """
    start = chain.height
    while True:
        async with await transport.open_stream(holder, CHAIN) as stream:
            header = await _ask(stream, first=chain.height + 1)
            if header.run.payload != chain.run.payload:
                raise ChainError(f"{holder} serves another run.", "Check the address with whoever launched the run.")
            for _ in range(header.count):
                (append or chain.append)(parse(pb.ChainEntry, await stream.receive(MAX_ENTRY_BYTES)))
        if header.count < MAX_ENTRIES:
            return chain.height - start


async def _ask(stream: Stream, first: int) -> pb.ChainHeader:
    await stream.send(pb.ChainRequest(first=first).SerializeToString())
    header = parse(pb.ChainHeader, await stream.receive(MAX_ENTRY_BYTES))
    if header.count > MAX_ENTRIES or header.first != first:
        raise FrameError(f"a chain header with {header.count} entries from {header.first}")
    return header
