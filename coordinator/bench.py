"""Where proofs of fault are judged: fetched from whoever reports them, checked outside this process, kept if they hold.

Nothing here computes with tensors: whoever starts a coordinator gives it a judge.
"""

import asyncio
import shutil
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.bans import ban_words
from hivegrpo.coordinator.equivocation import two_receipts
from hivegrpo.coordinator.reports import attempt_of
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.checks import check_digest
from hivegrpo.protocol.envelope import Opened, parse, run_id_of
from hivegrpo.protocol.errors import FrameError, RemoteError, WireError
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.base import Transport

JudgeProof = Callable[[bytes], Awaitable[list[tuple[str, str]]]]
"""Who is guilty by a proof, and why; WireError if it shows nothing, or is of another run. Bounded in time."""

FETCH_SECONDS = 60.0
MAX_CASES = 16
"""Proofs that are fetched or wait for the judge, one a peer."""

MAX_FALSE = 3
"""Proofs of one peer that showed nothing, after which no more are taken from it while this process runs."""

REMEMBERED = 1024
"""Outcomes that are remembered for who asks again."""

log = structlog.get_logger(__name__)


class Bench:
    """One case a peer at a time; the judge has one proof at a time."""

    def __init__(
        self,
        transport: Transport,
        blobs: BlobStore,
        folder: Path,
        judge: JudgeProof | None,
        *,
        run: pb.Signed,
        successions: Sequence[pb.Signed] = (),
        state: Callable[[], State],
        ban: Callable[[str, str, BlobRef], None],
        sign_plan: Callable[[bytes], pb.Signed],
    ) -> None:
        """`folder` holds what is being fetched; `ban` is told of who is guilty, by which blob of `blobs`."""
        self._transport = transport
        self._blobs = blobs
        self._folder = folder
        self._judge = judge
        self._run = run
        self._successions = successions
        self._run_id = run_id_of(run.payload)
        self._state = state
        self._ban = ban
        self._sign_plan = sign_plan
        self._cases: dict[str, asyncio.Task[None]] = {}
        self._outcomes: OrderedDict[bytes, str | None] = OrderedDict()
        self._false: Counter[str] = Counter()
        self._judging = asyncio.Lock()

    def take(self, report: Opened[pb.FaultReport]) -> str | None:
        """The answer to a report: None once its proof has held, "busy" until it is judged, or why it is refused."""
        peer, state = report.signer, self._state()
        ref = BlobRef(report.message.proof.root, report.message.proof.size)
        check_digest(ref.root, "the proof's root")
        if not 0 < ref.size <= MAX_PROOF_BYTES:
            raise FrameError(f"a proof of {ref.size} bytes; at most {MAX_PROOF_BYTES} are taken")
        if peer not in state.members:
            return "unknown: this peer has not joined"
        if peer in state.banned:
            return f"banned: {ban_words(state.banned[peer])}"
        if self._judge is None:
            return "refused: this coordinator has no judge"
        if ref.root in self._outcomes:
            return self._outcomes[ref.root]
        if self._false[peer] >= MAX_FALSE:
            return f"refused: {MAX_FALSE} proofs of this peer showed nothing"
        if peer not in self._cases and len(self._cases) < MAX_CASES:
            task = asyncio.create_task(self._try(peer, ref, self._judge))
            self._cases[peer] = task
            task.add_done_callback(lambda _: self._cases.pop(peer, None))
        return "busy: the proof is being fetched and judged"

    def compare(self, events: Sequence[ev.Event], now: float) -> list[ev.PeerBanned]:
        """Bans that follow from a vote that is about to be counted: reducers that signed two contents of a span."""
        state, bans = self._state(), list[ev.PeerBanned]()
        if self._judge is None or state.terms.config.averaging.audit_rate == 0.0:
            return bans
        for event in events:
            if not isinstance(event, ev.StepReported):
                continue
            report = parse(pb.StepReport, parse(pb.Signed, event.signed).payload)
            attempt = attempt_of(state, report.plan)
            assert attempt is not None
            for reducer, span, receipts in two_receipts(attempt, report, self._run_id):
                if not self._is_convicted(reducer) and all(reducer != ban.peer for ban in bans):
                    proof = pb.FaultProof(
                        run=self._run,
                        successions=self._successions,
                        plan=self._sign_plan(attempt.payload),
                        two_receipts=receipts,
                    )
                    ref = self._blobs.add_bytes(proof.SerializeToString(deterministic=True))
                    place = f"span {span} of version {report.version}, attempt {attempt.plan.attempt}"
                    bans.append(ev.PeerBanned(now, reducer, f"signed two contents of {place}", ref.root, ref.size))
        return bans

    def clear(self) -> None:
        """Remove what a process that was killed left of the proofs that it fetched."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def close(self) -> None:
        """Drop what is not judged yet: who reported it asks again."""
        tasks = list(self._cases.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _try(self, peer: str, ref: BlobRef, judge: JudgeProof) -> None:
        """Fetch a proof into a folder of its own, and judge it."""
        inbox = self._folder / peer
        outcome: str | None = None
        try:
            shutil.rmtree(inbox, ignore_errors=True)
            path = await fetch_blob(self._transport, ref, [peer], BlobStore(inbox), within=FETCH_SECONDS)
            proof = await asyncio.to_thread(path.read_bytes)
            await self._convict(proof, judge)
        except RemoteError as error:
            log.warning("a proof of fault could not be had", reporter=peer, reason=printable(error.message))
            return
        except OSError as error:
            log.error("a proof of fault could not be kept", reporter=peer, reason=str(error))
            return
        except WireError as error:
            self._false[peer] += 1
            outcome = f"refused: {printable(error.message)}"
            log.warning("a proof of fault shows nothing", reporter=peer, reason=outcome)
        finally:
            await asyncio.to_thread(shutil.rmtree, inbox, ignore_errors=True)
        self._outcomes[ref.root] = outcome
        while len(self._outcomes) > REMEMBERED:
            self._outcomes.popitem(last=False)

    async def _convict(self, proof: bytes, judge: JudgeProof) -> None:
        """Ban who is guilty, and the auditors that covered a wrong span. WireError if the proof shows nothing."""
        async with self._judging:
            guilty = await judge(proof)
        self._keep(proof, guilty)
        for signed in self._covering(proof):
            widened = parse(pb.FaultProof, proof)
            widened.wrong_span.audit.CopyFrom(signed)
            data = widened.SerializeToString(deterministic=True)
            try:
                async with self._judging:
                    also = await judge(data)
            except WireError as error:
                log.error("an auditor that agreed with a wrong span is not guilty by it", reason=str(error))
                continue
            self._keep(data, also)

    def _keep(self, proof: bytes, guilty: Sequence[tuple[str, str]]) -> None:
        if not all(self._is_convicted(peer) for peer, _ in guilty):
            ref = self._blobs.add_bytes(proof)
            for peer, reason in guilty:
                self._ban(peer, reason, ref)

    def _is_convicted(self, peer: str) -> bool:
        """By a proof: what an operator ordered may end, and makes none needless."""
        ban = self._state().banned.get(peer)
        return ban is not None and ban.proved

    def _covering(self, proof: bytes) -> list[pb.Signed]:
        """Reports of auditors that agreed with the span that this proof, which holds, shows to be wrong."""
        message, state = parse(pb.FaultProof, proof), self._state()
        if not message.HasField("wrong_span") or message.wrong_span.HasField("audit"):
            return []
        receipt = parse(pb.SpanReceipt, message.wrong_span.receipt.payload)
        for attempt in (state.round.attempt, state.failed, state.last):
            if attempt is not None and (attempt.digest, attempt.seal_digest) == (receipt.plan, receipt.seal):
                audits = attempt.audits.get(receipt.span, {})
                return [
                    parse(pb.Signed, audit.signed) for audit in audits.values() if audit.content == receipt.content.root
                ]
        return []
