"""Stream "pull": the committed chunks of a span, for whoever computes it again.

Served by contributors (their own) and by the span's reducer (everybody's), to the plan's roster, once it is sealed:
before that nobody but the reducer has any use for them. A pull is what a push was: the sender's signed header, then its
chunks, in the same frames.
"""

import asyncio
from collections import Counter

from hivegrpo.peer.swarm.accuse import Sent
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.reducer import SpanLayout, SpanReducer, receive_frame
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import equal_parts
from hivegrpo.protocol.envelope import Opened, open_signed, parse, sign
from hivegrpo.protocol.errors import CommitmentError, RosterError, StaleError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream

PULL = "pull"
MAX_HEADER_BYTES = 4096
MAX_PULLS = 4
"""How often one peer may pull what it can pull here: an audit needs it once."""


class PullServer:
    """What one roster peer has of one plan's chunks."""

    def __init__(self, plan: Opened[pb.RoundPlan], own: EncodedVector, identity: Identity, run_id: str) -> None:
        self._plan = plan
        self._own = own
        self._identity = identity
        self._run_id = run_id
        self._headers: dict[str, pb.Signed] = {}
        self._reducer: SpanReducer | None = None
        self._roster = {contributor.peer for contributor in plan.message.contributors}
        self._served: Counter[str] = Counter()
        self._opened = asyncio.Event()

    def keep_header(self, signed: pb.Signed) -> None:
        """Keep what a sender signed of the chunks that the reducer now has."""
        self._headers[signed.signer] = signed

    def open(self, reducer: SpanReducer | None) -> None:
        """Serve from now on: the plan is sealed."""
        self._reducer = reducer
        self._opened.set()

    async def serve(self, stream: Stream, request: pb.PullRequest) -> None:
        """Send a sender's header and chunks; StaleError if they are not here."""
        plan = self._plan.message
        if stream.remote not in self._roster or request.span >= len(plan.reducers):
            raise RosterError("a pull by somebody who is not in the plan, or of no span of it")
        self._served[stream.remote] += 1
        if self._served[stream.remote] > MAX_PULLS * (len(self._roster) + len(plan.reducers)):
            raise StaleError("pulled too often")
        try:
            async with asyncio.timeout(plan.step_seconds):
                await self._opened.wait()
        except TimeoutError:
            raise StaleError("the plan was not sealed here") from None
        header, chunks = self._find(request.peer, request.span)
        await stream.send(header.SerializeToString())
        for frame in SpanLayout.of(plan, request.span).pack(chunks):
            await stream.send(frame)
        await stream.linger()

    def own(self, span: int) -> Sent:
        """This peer's own chunks of a span."""
        header, chunks = self._find(self._identity.peer_id, span)
        return Sent(open_signed(header, self._run_id, pb.PushHeader), chunks)

    def _find(self, sender: str, span: int) -> tuple[pb.Signed, list[bytes]]:
        if sender == self._identity.peer_id:
            run = SpanLayout.of(self._plan.message, span).chunks
            header = self._own.header(self._plan.digest, span, run)
            return sign(self._identity, self._run_id, header), list(self._own.chunks[run.start : run.stop])
        reducer = self._reducer
        chunks = reducer.chunks_of(sender) if reducer is not None and reducer.span == span else None
        if chunks is None or sender not in self._headers:
            raise StaleError("these chunks are not here")
        return self._headers[sender], chunks


async def pull(
    source: str, sender: str, span: int, *, plan: Opened[pb.RoundPlan], run_id: str, directory: Directory
) -> Sent:
    """A sender's chunks of a span, as `source` has them: signed for, of the right sizes, and not checked further."""
    chunks: list[bytes] = []
    async with await directory.open_stream(source, PULL) as stream:
        await stream.send(pb.PullRequest(plan=plan.digest, span=span, peer=sender).SerializeToString())
        signed = parse(pb.Signed, await stream.receive(MAX_HEADER_BYTES))
        header = open_signed(signed, run_id, pb.PushHeader, signer=sender)
        if (header.message.plan, header.message.span) != (plan.digest, span):
            raise CommitmentError("the header is of another plan or span")
        for run, size in SpanLayout.of(plan.message, span).frames():
            chunks += equal_parts(await receive_frame(stream, size), len(run))
    return Sent(header, chunks)
