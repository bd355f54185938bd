"""One peer at work: it reacts to the newest signed facts, one task at a time.

Whatever is current after a crash, a reconnect or a new attempt leads to the right next task, since tasks are
chosen from what is known and held, not from what was done before.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog

from hivegrpo.peer.ahead import AheadSampler
from hivegrpo.peer.desk import Learns, LeaseDesk, Work
from hivegrpo.peer.feedback import ErrorFeedback
from hivegrpo.peer.floats import NonFiniteError
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.step import PolicyState
from hivegrpo.peer.swarm.auditor import Auditor
from hivegrpo.peer.swarm.contribution import ContributionStore, EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.exchange import Exchange, Span
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.session import Session
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.errors import RemoteError, WireError
from hivegrpo.protocol.history import History
from hivegrpo.protocol.identity import Identity

log = structlog.get_logger(__name__)

T = TypeVar("T")

ACK_SECONDS = 1.0
"""How long the last acknowledgements of a push, sent before the seal, may come after it: they take other ways."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """The state after an attempt's step, which is not committed yet."""

    plan: Opened[pb.RoundPlan]
    seal: Opened[pb.Seal]
    state: PolicyState
    root: bytes

    def is_made_by(self, manifest: pb.VersionManifest) -> bool:
        """Whether this is what a version commits."""
        committed = (manifest.plan, manifest.seal, manifest.state.root)
        return committed == (self.plan.digest, self.seal.digest, self.root)


Task = Callable[[], Awaitable[None]]


class Volunteer:
    """Takes leases, learns, averages, steps and commits, until the run is finished or it is told to leave."""

    def __init__(
        self,
        *,
        config: RunConfig,
        identity: Identity,
        session: Session,
        versions: Versions,
        synchroniser: Synchroniser,
        exchanges: ExchangeServer,
        directory: Directory,
        contributions: ContributionStore,
        feedback: ErrorFeedback,
        learner: Learns,
        worker: Executor,
        canonical: Executor,
        history: History,
        auditor: Auditor,
    ) -> None:
        """`worker` learns; `canonical` reduces and steps, and never waits for a rollout."""
        self.state = "joining"
        self._identity = identity
        self._session = session
        self._versions = versions
        self._synchroniser = synchroniser
        self._exchanges = exchanges
        self._directory = directory
        self._contributions = contributions
        self._round_groups = config.grpo.prompts_per_round
        self._desk = LeaseDesk(config, learner, versions, contributions, feedback)
        self._worker = worker
        self._canonical = canonical
        self._ahead = AheadSampler(self._desk, session, versions, worker) if config.averaging.overlap else None
        self._history = history
        self._auditor = auditor
        self._leaving = False
        self._done_lease = (0, 0)
        self._done_plan = b""
        self._said_ready: tuple[int, int] | None = None
        self._shadow: Shadow | None = None
        self._owes_version = 0

    @property
    def metrics(self) -> dict[str, float]:
        """How fast this peer is, once it has sampled."""
        return {"tokens_per_second": self._desk.speed} if self._desk.speed else {}

    async def work(self) -> None:
        """Until the run is finished or `leave` was called, and nothing is owed to a round in flight."""
        ahead = asyncio.create_task(self._ahead.run(self._may_sample)) if self._ahead is not None else None
        try:
            while True:
                task = await self._session.wait(self._next)
                if task == self._rest:
                    return
                await task()
        finally:
            if ahead is not None:
                await _end(ahead)

    async def leave(self) -> None:
        """Take no new lease; finish the round that already counts on this peer's contribution."""
        self._leaving = True
        self.state = "draining"
        await self._session.touch()

    def _next(self) -> Task | None:
        """The most urgent thing to do, from what is known now."""
        session, height = self._session, self._versions.chain.height
        if session.head is not None and session.head.message.version > height:
            return partial(self._take_head, session.head)
        plan = session.plan
        if plan is not None and plan.message.version == height + 1 and plan.digest != self._done_plan:
            own = self._own_contribution(plan.message)
            if own is not None:
                return partial(self._attempt, plan, own)
        if session.finished or (self._leaving and self._owes_version <= height):
            return self._rest
        if not session.connected or self._leaving:
            return None
        if self._versions.version < height or self._versions.missing_reference() is not None:
            return self._synchronise  # it failed before; a gradient is taken at the head's state, with its reference
        if session.lease is not None and self._leased(height):
            return partial(self._contribute, session.lease.message)
        if self._said_ready != (height, session.joins):
            return self._say_ready
        return None

    async def _rest(self) -> None:
        """Nothing more to do."""

    async def _say_ready(self) -> None:
        """Tell the coordinator which version is held; for version 0 this is the vote."""
        place = (self._versions.chain.height, self._session.joins)
        ready = pb.Ready(version=self._versions.version, state_root=self._versions.state_root)
        ack = await self._session.report(ready, lambda: place[1] == self._session.joins and not self._leaving)
        self._said_ready = place
        self.state = "online"
        if ack is not None and not ack.accepted:
            log.debug("not ready after all", reason=ack.reason)

    async def _contribute(self, lease: pb.Lease) -> None:
        """Rollout and gradient under the lease, then the commitment to it (steps 2 to 4 of a round)."""
        work = await self._learn(lease) if self._agrees_with(lease) else None
        self._done_lease = _name(lease)
        if work is None:
            self._said_ready = None
            return
        if self._ahead is not None and work.contribution.weight:
            work.contribution.metrics["seconds/hidden"] = self._ahead.hidden(lease.id)
        place = {"lease": lease.id, "iteration": lease.iteration, "version": lease.version}
        root = work.contribution.root
        if work.note:
            log.info("nothing to learn", **place, reason=work.note)
        self._history.record("metrics", **place, note=work.note, metrics=dict(work.contribution.metrics))
        self._history.record("contribution", **place, root=root)
        ack = await self._session.report(work.contribution, lambda: not self._leaving)
        if ack is None:
            return
        if ack.accepted:
            self._owes_version = lease.version + 1 if work.encoded is not None else self._owes_version
            self._history.record("contribution_acked", **place, root=root)
        else:
            log.warning("a contribution was not taken", lease=lease.id, reason=ack.reason)
            self._said_ready = None

    def _may_sample(self, lease: pb.Lease) -> bool:
        """Whether a lease ahead is worth sampling under; the rest of it is checked when its version is here."""
        return not self._leaving and lease.wanted <= self._round_groups

    def _agrees_with(self, lease: pb.Lease) -> bool:
        """Whether a lease wants no more than a round, and names the KL reference that the chain has at its version."""
        if lease.wanted > self._round_groups:
            log.warning("refused a lease", lease=lease.id, wanted=lease.wanted, of_a_round=self._round_groups)
            return False
        chain = self._versions.chain.entries[lease.version].manifest.message.reference_version
        if lease.reference_version != chain:
            log.warning("refused a lease", lease=lease.id, reference=lease.reference_version, in_the_chain=chain)
        return bool(lease.reference_version == chain)

    async def _attempt(self, plan: Opened[pb.RoundPlan], own: EncodedVector) -> None:
        """Exchange, seal, reduce, step and vote (steps 6 to 9 of a round), unless a newer fact makes it pointless."""
        self._done_plan = plan.digest
        if self._ahead is not None:
            self._ahead.exchange_began()
        try:
            await self._unless(self._overtaken(plan), self._average(plan, own))
        except (WireError, NonFiniteError) as error:
            place = f"{plan.message.version}.{plan.message.attempt}"
            log.warning("an attempt failed", attempt=place, reason=str(error))

    async def _average(self, plan: Opened[pb.RoundPlan], own: EncodedVector) -> None:
        """One attempt as the architecture has it; each line is a step of the round."""
        self._versions.check_plan(plan.message)
        exchange = await self._open_exchange(plan, own)
        pushing = asyncio.create_task(self._push(exchange))
        try:
            seal = await self._exchange(exchange)
            asyncio.get_running_loop().call_later(self._ack_seconds(seal), pushing.cancel)
            spans = await exchange.collect(seal)
        finally:
            await _end(pushing)
            await exchange.end()
        voted = asyncio.Event()
        auditing = asyncio.create_task(self._auditor.audit(exchange, seal, voted))
        try:
            root = await self._step(exchange, seal, spans)
            await self._vote(exchange, seal, spans, root)
            voted.set()
            await auditing
        finally:
            await _end(auditing)

    async def _open_exchange(self, plan: Opened[pb.RoundPlan], own: EncodedVector) -> Exchange:
        exchange = Exchange(
            plan,
            own,
            identity=self._identity,
            run_id=self._versions.chain.run_id,
            directory=self._directory,
            worker=self._canonical,
            on_bad_push=partial(self._auditor.accuse_sender, plan),
        )
        await self._exchanges.add(exchange)
        return exchange

    async def _exchange(self, exchange: Exchange) -> Opened[pb.Seal]:
        """Report who is complete here, while the own chunks are pushed, and wait for the seal (steps 6 and 7)."""
        report = await self._gather(exchange)
        if report is not None:
            await self._session.report(report, lambda: True)
        return await self._session.wait(lambda: self._seal_of(exchange.plan))

    async def _gather(self, exchange: Exchange) -> pb.SenderReport | None:
        """Who is complete here when the exchange's time is up, which begins anew with each join.

        A coordinator that starts again gives every reducer its time anew, and only then do those hear of the plan whom
        it had not told yet. A report that was made while it was away would lack them.
        """
        session, report = self._session, None

        async def gather() -> None:
            nonlocal report
            report = await exchange.gather()

        while True:
            joins = await session.wait(lambda: session.joins if session.connected else None)
            await self._unless(self._joined_again(joins), gather())
            if session.connected and session.joins == joins:
                return report

    async def _joined_again(self, joins: int) -> None:
        """Until there is another session than that of so many joins."""
        await self._session.wait(lambda: None if self._session.joins == joins else True)

    async def _push(self, exchange: Exchange) -> None:
        """Push, and again what did not get through if the session broke meanwhile: for the same reason."""
        session = self._session
        while True:
            joins = session.joins
            try:
                return await exchange.push()
            except RemoteError:
                if session.connected and session.joins == joins:
                    raise
            await session.wait(lambda: session.connected or None)

    def _ack_seconds(self, seal: Opened[pb.Seal]) -> float:
        """How long the own push may go on: if all reducers took it, only acknowledgements lack, else it is in vain."""
        is_sealed = any(sealed.peer == self._identity.peer_id for sealed in seal.message.contributors)
        return ACK_SECONDS if is_sealed else 0.0

    async def _step(self, exchange: Exchange, seal: Opened[pb.Seal], spans: Sequence[Span]) -> bytes:
        """The optimizer step beside the current state; its root (step 9)."""
        plan, data = exchange.plan, [span.data for span in spans]
        with self._desk.device_time.stepping():
            state, root = await self._on_canonical(self._versions.shadow, plan.message, data, exchange.gradient)
        self._shadow = Shadow(plan, seal, state, root)
        await self._session.touch()
        return root

    async def _vote(self, exchange: Exchange, seal: Opened[pb.Seal], spans: Sequence[Span], root: bytes) -> None:
        plan = exchange.plan
        vote = pb.StepReport(
            version=plan.message.version,
            plan=plan.digest,
            seal=seal.digest,
            spans=[span.content for span in spans],
            state_root=root,
            receipts=[span.receipt.signature for span in spans],
            seconds=exchange.span_seconds,
            dots=exchange.reducer.dots if exchange.reducer is not None else (),
            metrics={
                "seconds/exchange": exchange.seconds,
                "seconds/step": time.perf_counter() - exchange.began - exchange.seconds,
                "bytes_sent": exchange.bytes_sent,
                "bytes_received": exchange.bytes_received,
            },
        )
        self._history.record("vote", version=plan.message.version, plan=plan.digest, state_root=root)
        await self._session.report(vote, lambda: True)

    async def _take_head(self, head: Opened[pb.VersionManifest]) -> None:
        """Swap the shadow in if it is what was committed; otherwise catch up (step 10 of a round)."""
        versions, version = self._versions, head.message.version
        shadow, self._shadow = self._shadow, None
        follows = version == versions.chain.height + 1
        if follows and version == 0:
            versions.extend(pb.ChainEntry(manifest=head.signed))
            versions.adopt(0, versions.state, versions.state_root)
        elif follows and shadow and shadow.is_made_by(head.message):
            versions.extend(pb.ChainEntry(manifest=head.signed, plan=shadow.plan.signed, seal=shadow.seal.signed))
            await self._on_canonical(versions.adopt, version, shadow.state, shadow.root)
            if versions.missing_reference() is not None:
                await self._synchronise()
        else:
            if shadow and shadow.plan.digest == head.message.plan:
                log.error("this machine's step gave another root; replaying from the sealed bytes", version=version)
            if head.message.HasField("restores") and self._session.lease is not None:
                self._done_lease = _name(self._session.lease.message)  # of what the run has given up
            await self._synchronise()
        if self._ahead is not None:
            self._ahead.exchange_ended()
            await self._session.touch()
        self._history.record(
            "version",
            version=versions.version,
            state_root=versions.state_root,
            manifest=versions.chain.entries[versions.version].manifest.digest,
        )

    async def _synchronise(self) -> None:
        state, self.state = self.state, "joining"
        try:
            await self._synchroniser.run()
        except WireError as error:
            log.warning("could not catch up; trying again", reason=str(error))
            await asyncio.sleep(1.0)
        self.state = state

    async def _learn(self, lease: pb.Lease) -> Work | None:
        """What the lease yields; None if it expired or a newer version came in the meantime."""
        parameters = self._versions.state.parameters
        deadline = asyncio.get_running_loop().time() + lease.seconds

        def over() -> bool | None:
            height = self._versions.chain.height
            head = self._session.head.message.version if self._session.head else height
            return True if self._leaving or head > lease.version else None

        cancelled = threading.Event()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._worker, self._desk.work, lease, parameters, cancelled)
        watch = asyncio.create_task(self._session.wait(over))
        try:
            running: set[asyncio.Future[Any]] = {work, watch}
            await asyncio.wait(running, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.set()
            await _end(watch)
        try:
            return await work
        except Cancelled:
            log.info("stopped working on a lease", lease=lease.id)
            return None

    def _own_contribution(self, plan: pb.RoundPlan) -> EncodedVector | None:
        """What this peer committed to in a plan, from memory or disk."""
        for contributor in plan.contributors:
            if contributor.peer == self._identity.peer_id:
                return self._contributions.find(contributor.root)
        return None

    def _seal_of(self, plan: Opened[pb.RoundPlan]) -> Opened[pb.Seal] | None:
        seal = self._session.seal
        return seal if seal is not None and seal.message.plan == plan.digest else None

    async def _overtaken(self, plan: Opened[pb.RoundPlan]) -> None:
        """Until a newer attempt, a committed version, or another rollout has overtaken a plan.

        A commit of the plan itself leaves this peer the step's time to get there too: what is still on its way need not
        be fetched again.
        """
        await self._session.wait(lambda: self._is_over(plan))
        if self._is_late(plan):
            with suppress(TimeoutError):
                async with asyncio.timeout(plan.message.step_seconds):
                    await self._session.wait(lambda: None if self._is_late(plan) else True)

    def _is_over(self, plan: Opened[pb.RoundPlan]) -> bool | None:
        session = self._session
        newer_plan = session.plan is not None and session.plan.digest != plan.digest
        committed = session.head is not None and session.head.message.version >= plan.message.version
        return True if newer_plan or committed or self._leased(plan.message.version - 1) else None

    def _is_late(self, plan: Opened[pb.RoundPlan]) -> bool:
        """Whether the head is what a plan has led to, this peer knows what was sealed, and has yet to step."""
        head, shadow = self._session.head, self._shadow
        if head is None or head.message.plan != plan.digest or self._seal_of(plan) is None:
            return False
        return shadow is None or shadow.plan.digest != plan.digest

    def _leased(self, version: int) -> bool:
        """Whether there is a lease to work on; who is in a plan gets none before the round is abandoned."""
        lease = self._session.lease
        return lease is not None and lease.message.version == version and _name(lease.message) > self._done_lease

    async def _unless(self, over: Awaitable[None], work: Awaitable[None]) -> None:
        """Run `work`, and cancel it once `over` has ended."""
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(over)
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            await _end(task)
            await _end(watch)

    async def _on_canonical(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._canonical, function, *args)


def _name(lease: pb.Lease) -> tuple[int, int]:
    """What a contribution is named by; a peer's leases come in this order."""
    return lease.id, lease.iteration


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task if it still runs, wait until it has ended, and have its exception seen."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
