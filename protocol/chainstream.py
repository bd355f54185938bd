"""The chain on the wire (stream "chain"): the run manifest, then entries from a version on.

Coordinator and peers serve it alike; the reader verifies every entry, so it does not matter who answers.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import MAX_ENTRY_BYTES, Chain, Entry
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.errors import ChainError, FrameError, RemoteError, ReplayError
from hivegrpo.protocol.succession import check_count
from hivegrpo.protocol.transport.base import Dials, Stream, Transport

CHAIN = "chain"
MAX_ENTRIES = 256
"""Entries in one answer; a reader that wants more asks again."""
BEYOND = 1 << 62
"""No chain has this version: who asks for it gets the run manifest, and no entry."""


class ChainSource(Protocol):
    """What can serve a chain."""

    @property
    def run(self) -> pb.Signed:
        """The signed run manifest."""

    @property
    def successions(self) -> Sequence[pb.Signed]:
        """Who coordinates the run in the place of whom the manifest names, if the run key said so."""

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
        header = pb.ChainHeader(
            run=source.run, first=request.first, count=len(versions), successions=source.successions
        )
        await stream.send(header.SerializeToString())
        for version in versions:
            await stream.send(source.entry(version).SerializeToString())
        await stream.linger()

    await transport.serve_stream(CHAIN, handle)


async def fetch_run(transport: Dials, holder: str) -> pb.Signed:
    """The signed run manifest that `holder` serves, unverified; give it to `Chain`."""
    return (await _fetch_header(transport, holder)).run


async def find_chain(transport: Dials, holder: str, run_id: str | None = None) -> Chain:
    """The run that `holder` serves, with no version yet.

    ChainError unless `holder` coordinates it or, where a run id is given, it is that run: then anybody may serve it.
    """
    header = await _fetch_header(transport, holder)
    chain = Chain(header.run, holder if run_id is None else None, header.successions)
    if run_id is not None and chain.run_id != run_id:
        raise _another_run(holder)
    return chain


async def extend_chain(
    transport: Dials, holder: str, chain: Chain, append: Callable[[pb.ChainEntry], Entry] | None = None
) -> int:
    """Fetch and verify what `holder` has beyond `chain`'s head; how many versions were added.

    `append` adds an entry to `chain`, by default `chain.append`; a home gives the one that also writes it. Successions
    that `chain` does not know are not taken: who works in a run does so under one coordinator.

    ChainError for an entry that does not verify or for another run; WireError when the holder fails.
    """
    start = chain.height
    while await _fetch(transport, holder, chain, append or chain.append, chain.height + 1) == MAX_ENTRIES:
        pass
    return chain.height - start


async def follow_chain(transport: Dials, holder: str, file: ChainFile) -> int:
    """Like `extend_chain`, from a holder that has to have the chain's head: it is asked for it, and compared.

    Successions are taken, too. The caller flushes `file`.

    ForkError if it has another version in the head's place. If its chain ends before: ReplayError if it is the
    coordinator, whose chain only grows, RemoteError if it is somebody who may have yet to hear of the newest version.
    """
    chain = file.chain
    start = chain.height
    compared = False

    def take(message: pb.ChainEntry) -> None:
        nonlocal compared
        if compared:
            file.take(message)
        else:
            chain.check_head(message)
            compared = True

    while True:
        compared = chain.height < 0
        count = await _fetch(transport, holder, chain, take, max(chain.height, 0), file.succeed)
        if not compared:
            text = f"The chain of {holder} ends before version {chain.height}, which was verified earlier"
            if holder == chain.coordinator:
                raise ReplayError(f"{text}.", OLDER_HINT)
            raise RemoteError(text)
        if count < MAX_ENTRIES:
            return chain.height - start


async def _fetch_header(transport: Dials, holder: str) -> pb.ChainHeader:
    async with await transport.open_stream(holder, CHAIN) as stream:
        return await _ask(stream, first=BEYOND)


async def _fetch(
    transport: Dials,
    holder: str,
    chain: Chain,
    take: Callable[[pb.ChainEntry], object],
    first: int,
    succeed: Callable[[Sequence[pb.Signed]], None] | None = None,
) -> int:
    """Have `take` one answer's entries from version `first` on, after `succeed` has its successions; how many."""
    async with await transport.open_stream(holder, CHAIN) as stream:
        header = await _ask(stream, first)
        if header.run.payload != chain.run.payload:
            raise _another_run(holder)
        if succeed is not None:
            succeed(header.successions)
        for _ in range(header.count):
            take(parse(pb.ChainEntry, await stream.receive(MAX_ENTRY_BYTES)))
    return header.count


def _another_run(holder: str) -> ChainError:
    return ChainError(f"{holder} serves another run.", "Check the address with whoever launched the run.")


async def _ask(stream: Stream, first: int) -> pb.ChainHeader:
    await stream.send(pb.ChainRequest(first=first).SerializeToString())
    header = parse(pb.ChainHeader, await stream.receive(MAX_ENTRY_BYTES))
    if header.count > MAX_ENTRIES or header.first != first:
        raise FrameError(f"a chain header with {header.count} entries from {header.first}")
    check_count(header.successions)
    return header


OLDER_HINT = (
    "The coordinator was started from an old copy of its home, or somebody else has its key: do not contribute, and "
    "tell whoever launched the run."
)
