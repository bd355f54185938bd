"""Computing spans again: what a peer that was drawn does after its vote.

It pulls the sealed contributors' chunks of a span, checks them against the plan as a reducer does, applies the rule,
and signs what content the span must have. Memory is bounded as a reducer's: one span at a time, roster x span.
"""

import asyncio
from collections.abc import Sequence
from functools import partial

import structlog

from hivegrpo.peer.swarm.accuse import Sent, prove_bad_push, prove_wrong_span
from hivegrpo.peer.swarm.accuser import Accuser
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.exchange import Exchange, Span
from hivegrpo.peer.swarm.pulls import pull
from hivegrpo.peer.swarm.reducer import SpanReducer, reduce_span
from hivegrpo.peer.swarm.session import Session
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import Draw, draw
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.envelope import Opened, open_signed
from hivegrpo.protocol.errors import CommitmentError, HiveError, RemoteError, WireError
from hivegrpo.protocol.history import History
from hivegrpo.protocol.identity import Identity

log = structlog.get_logger(__name__)

PULLS_AT_ONCE = 4


class Auditor:
    """One peer's audits."""

    def __init__(
        self,
        *,
        run: pb.Signed,
        run_id: str,
        identity: Identity,
        directory: Directory,
        session: Session,
        accuser: Accuser,
        history: History,
        rate: float,
    ) -> None:
        """`rate` is the run's `averaging.audit_rate`."""
        self._run = run
        self._run_id = run_id
        self._identity = identity
        self._directory = directory
        self._session = session
        self._accuser = accuser
        self._history = history
        self._rate = rate

    async def audit(self, exchange: Exchange, seal: Opened[pb.Seal], voted: asyncio.Event) -> None:
        """Audit what this peer is drawn for, each span in its turn; the arithmetic waits until it has voted.

        The caller ends it with the attempt: where nothing is drawn, no seed is told.
        """
        if self._rate == 0.0:
            return
        plan, me = exchange.plan.message, self._identity.peer_id
        drawn = await self.drawn(plan, seal)
        began = asyncio.get_running_loop().time()
        turns = sorted(
            (item.starts(item.order.index(me), plan.audit_seconds), item.span) for item in drawn if me in item.order
        )
        for start, span in turns:
            await asyncio.sleep(began + start - asyncio.get_running_loop().time())
            await self._audit_span(exchange, seal, span, voted)

    async def drawn(self, plan: pb.RoundPlan, seal: Opened[pb.Seal]) -> tuple[Draw, ...]:
        """What is audited of a sealed plan, once the coordinator has told the seed."""

        def seed() -> bytes | None:
            told = self._session.audit_seed
            return told[1] if told is not None and told[0] == seal.digest else None

        return draw(plan, await self._session.wait(seed), self._rate)

    def accuse_sender(self, plan: Opened[pb.RoundPlan], sent: Sent) -> None:
        """Chunks were refused: report their sender, if it has signed what proves it."""
        if self._rate > 0.0:
            self._accuser.accuse(plan.digest, sent.header.signer, partial(prove_bad_push, self._run, plan, sent))

    async def _audit_span(self, exchange: Exchange, seal: Opened[pb.Seal], span: int, voted: asyncio.Event) -> None:
        plan = exchange.plan
        content = b""
        try:
            sent = await self._pull_all(exchange, seal, span)
            await voted.wait()
            computed = await asyncio.to_thread(_compute, plan, span, seal, sent)
            content = blob_root(computed)
            signed = exchange.spans[span]
            if signed.content.root != content:
                self._accuse_reducer(plan, seal, signed, computed, sent)
        except HiveError as error:
            log.warning("a span could not be audited", span=span, version=plan.message.version, reason=str(error))
        self._history.record(
            "audit",
            version=plan.message.version,
            attempt=plan.message.attempt,
            span=span,
            content=content,
            agrees=content == exchange.spans[span].content.root,
        )
        report = pb.AuditReport(plan=plan.digest, seal=seal.digest, span=span, content=content)
        await self._session.report(report, lambda: True)

    def _accuse_reducer(
        self,
        plan: Opened[pb.RoundPlan],
        seal: Opened[pb.Seal],
        signed: Span,
        computed: bytes,
        sent: dict[str, Sent],
    ) -> None:
        receipt = open_signed(signed.receipt, self._run_id, pb.SpanReceipt)
        self._accuser.accuse(
            plan.digest,
            receipt.signer,
            partial(prove_wrong_span, self._run, plan, seal, receipt, signed.data, computed, sent),
        )

    async def _pull_all(self, exchange: Exchange, seal: Opened[pb.Seal], span: int) -> dict[str, Sent]:
        """Every sealed contributor's chunks, checked; a WireError if one's cannot be had in time."""
        checker = SpanReducer(exchange.plan, span)
        slots = asyncio.Semaphore(PULLS_AT_ONCE)
        sent: dict[str, Sent] = {}

        async def get(sender: str) -> None:
            async with slots:
                sent[sender] = await self._pull(exchange, checker, sender, span)

        peers = [sealed.peer for sealed in seal.message.contributors]
        pulling = [asyncio.create_task(get(peer)) for peer in peers]
        try:
            async with asyncio.timeout(exchange.plan.message.exchange_seconds):
                await asyncio.gather(*pulling)
        except TimeoutError:
            raise RemoteError(f"the chunks of {len(peers) - len(sent)} contributors did not come in time") from None
        finally:
            for task in pulling:
                task.cancel()
            await asyncio.gather(*pulling, return_exceptions=True)
        return sent

    async def _pull(self, exchange: Exchange, checker: SpanReducer, sender: str, span: int) -> Sent:
        plan = exchange.plan
        if sender == self._identity.peer_id:
            return exchange.pulls.own(span)
        failures = []
        for source in dict.fromkeys((sender, plan.message.reducers[span].peer)):
            try:
                async with asyncio.timeout(plan.message.exchange_seconds / 3):
                    sent = await pull(source, sender, span, plan=plan, run_id=self._run_id, directory=self._directory)
                try:
                    await checker.take(sender, list(sent.chunks), sent.header.message)
                except CommitmentError:
                    self.accuse_sender(plan, sent)
                    raise
                return sent
            except WireError as error:
                failures.append(f"{source[-6:]}: {error}")
            except TimeoutError:
                failures.append(f"{source[-6:]}: too slow")
        raise RemoteError(f"no chunks of {sender} for span {span} ({'; '.join(failures)})")


def _compute(plan: Opened[pb.RoundPlan], span: int, seal: Opened[pb.Seal], sent: dict[str, Sent]) -> bytes:
    chunks: dict[str, Sequence[bytes]] = {peer: item.chunks for peer, item in sent.items()}
    return reduce_span(plan.message, span, seal.message, chunks)
