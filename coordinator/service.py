"""The network shell around the state machine: reports in, signed pushes out, a log on disk between them.

Everything that changes the state goes through `_happen`, which never awaits. What follows from an event outside this
process (an answer, a push, an entry of the chain) follows once the event is on disk.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.admission import MAX_AGENT, check_head, refusal, use_of_invite
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.archive import Archive
from hivegrpo.coordinator.bans import ban_words
from hivegrpo.coordinator.bench import Bench, JudgeProof
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.followers import Followers
from hivegrpo.coordinator.journal import Journal, disk_error
from hivegrpo.coordinator.log import DAMAGED_HINT, EventLog
from hivegrpo.coordinator.operator import Operator
from hivegrpo.coordinator.prober import Prober
from hivegrpo.coordinator.pushes import Push, current_for, finished_push, push_of, replaced_push, state_holders
from hivegrpo.coordinator.reports import judge, open_heartbeat
from hivegrpo.coordinator.secret import audit_secret, keep_audit_secret
from hivegrpo.coordinator.snapshots import read_snapshot, take_snapshot
from hivegrpo.coordinator.state import Phase, State, Terms
from hivegrpo.coordinator.status import Pulse, snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import BlobServer
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import open_signed, parse, run_id_of, sign_payload
from hivegrpo.protocol.errors import ChainError, RemoteError, WireError
from hivegrpo.protocol.holders import HolderBook
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, Stream, Transport
from hivegrpo.protocol.transport.serving import Noise, is_shown

REPORT = "report"
FOLLOW = "follow"
HEARTBEAT_SECONDS = 2.0
MISSED_HEARTBEATS = 3
MAX_REASON = 300
CLOSE_SECONDS = 5.0
SNAPSHOT_EVERY = 10_000
"""Events, which are replayed in less than a second."""

LINGER_SECONDS = 10.0
"""How long a finished coordinator that is to exit waits for its followers to go."""

log = structlog.get_logger(__name__)


class Coordinator:
    """One run's sequencer."""

    def __init__(
        self,
        *,
        identity: Identity,
        transport: Transport,
        log: EventLog,
        run: pb.Signed,
        config: RunConfig,
        home: Path,
        blobs: BlobStore,
        clock: Callable[[], float] = time.time,
        on_event: Callable[[ev.Event, State], None] | None = None,
        exit_when_finished: bool = False,
        judge_proof: JudgeProof | None = None,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        """ChainError if `home` follows another run. The caller closes `transport` and `log`.

        `judge_proof` says who is guilty by a proof of fault, and why, or raises WireError; without it nobody is banned.
        `snapshot_every`: events after which a snapshot is kept, so many are replayed at a start, at most.
        """
        self.run_id = run_id_of(run.payload)
        self._manifest = parse(pb.RunManifest, run.payload)
        if self._manifest.run_key:
            keep_audit_secret(home, identity)
        self.state = State(Terms.of(run, config, audit_secret(home, identity)))
        self.chain = ChainFile.create(home, run, identity.peer_id)
        self._identity = identity
        self._transport = transport
        self._log = log
        self._journal = Journal(log, self._stop_for)
        self._config = config
        self._blobs = blobs
        self._clock = clock
        self._on_event = on_event
        self._exit_when_finished = exit_when_finished
        self._snapshot_every = snapshot_every
        self._snapshot_at = snapshot_every
        self._wake = asyncio.Event()
        self._fatal: Exception | None = None
        self._closing = False
        self._restored = asyncio.Event()
        self._told_finished_at: float | None = None
        self._pulses: dict[str, Pulse] = {}
        self._noise = Noise()
        self._followers = Followers(MISSED_HEARTBEATS * HEARTBEAT_SECONDS + config.timing.grace, self._wake.set)
        self._bench = Bench(
            transport,
            blobs,
            home / "proofs",
            judge_proof,
            run=run,
            successions=self.chain.chain.successions,
            state=lambda: self.state,
            ban=self._ban,
            sign_plan=lambda payload: self._sign("RoundPlan", payload),
        )
        self._blob_server = BlobServer(blobs, HolderBook(self.run_id, identity, transport.addresses))
        self._prober = Prober(transport.probe, self._on_probed)
        self._archive = Archive(
            transport,
            blobs,
            lambda version: state_holders(self.state, version),
            every=config.distribution.anchor_every,
            final=config.run.versions,
            on_idle=self._wake.set,
            promised=lambda: None if self.state.promotion is None else self.state.promotion.reference,
        )

        self.operator = Operator(
            identity=identity,
            chain=self.chain.chain,
            blobs=blobs,
            state=lambda: self.state,
            ready=self._restored.wait,
            happen=self._order,
            written=lambda: self._journal.written(),
            snapshot=self.snapshot,
            clock=clock,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, or until the run is finished if it is to exit then.

        ChainError if the log is damaged, or if a peer shows a newer chain than ours; ConfigError if the disk is full.
        """
        self._restore()
        self._bench.clear()
        self._restored.set()
        await serve_chain(self._transport, self.chain.chain)
        await self._blob_server.start(self._transport)
        await self._transport.serve_call(REPORT, self._on_report)
        await self._transport.serve_stream(FOLLOW, self._on_follow, max_per_peer=2)
        working = [asyncio.create_task(self._archive.run()), asyncio.create_task(self._prober.run())]
        watched: list[asyncio.Task[Any]] = [*working, asyncio.create_task(stop.wait())]
        for task in watched:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while not stop.is_set() and not self._may_exit():
                self._wake.clear()
                await self._sleep_until(self._advance())
                for task in working:
                    if task.done() and self._fatal is None:
                        task.result()
        finally:
            self._closing = True
            await self._bench.close()
            for task in watched:
                task.cancel()
            await asyncio.gather(*watched, return_exceptions=True)
            await self._journal.settled()
            await self._followers.close(CLOSE_SECONDS)

    def snapshot(self) -> dict[str, Any]:
        """What people are shown."""
        shown = snapshot(self.state, self._pulses, self._clock())
        shown["rejected"] = dict(self._transport.rejected)
        shown["served_bytes"] = self._blob_server.sent
        shown["archived"] = self._archive.versions
        shown["archive_failures"] = {str(version): reason for version, reason in self._archive.failed.items()}
        return shown

    def _restore(self) -> None:
        chain = self.chain.chain
        start = self._resume()
        self._snapshot_at = start + self._snapshot_every
        for event in self._log.replay(after=start):
            try:
                if isinstance(event, ev.VersionCommitted):
                    self._check_restored(self._entry(event), self.state.version + 1)
                apply(self.state, event)
            except (LookupError, AssertionError, WireError) as error:
                name = type(event).__name__
                raise ChainError(
                    f"An event of the log ({name}) does not follow from the others.", DAMAGED_HINT
                ) from error
            except OSError as error:
                raise disk_error(error) from error
        if chain.height > self.state.version:
            raise ChainError(
                f"The log ends at version {self.state.version}, the chain beside it at {chain.height}.", DAMAGED_HINT
            )
        self._happen([ev.CoordinatorStarted(self._clock())])
        self._archive.restore([entry.manifest.message for entry in chain.entries])

    def _resume(self) -> int:
        """Begin with the newest snapshot, if this software can read it and the chain has its head; its last event."""
        kept = self._log.snapshot()
        if kept is None:
            return 0
        try:
            state = read_snapshot(kept, self.state.terms)
        except ValueError as error:
            log.warning("the snapshot cannot be used: replaying all events", reason=str(error))
            return 0
        chain = self.chain.chain
        if state.head is not None and (
            chain.height < state.version or chain.entries[state.version].manifest.digest != state.head.digest
        ):
            log.warning("the chain beside the log lacks the snapshot's version: replaying all events")
            return 0
        self.state = state
        return kept.sequence

    def _check_restored(self, entry: pb.ChainEntry, version: int) -> None:
        """The chain beside the log has the same version, or lacks it since a crash."""
        chain = self.chain.chain
        if version > chain.height:
            self.chain.append(entry)
        elif chain.entry(version).manifest.payload != entry.manifest.payload:
            raise ChainError(f"The log and the chain beside it differ at version {version}.", DAMAGED_HINT)

    def _advance(self) -> float | None:
        """Let everything happen that is due; when to look again."""
        if self._fatal is not None:
            raise self._fatal
        wake = self._settle()
        now = self._clock()
        timers = [wake, self._followers.drop_silent(now)]
        if self.state.phase is Phase.FINISHED and self._journal.idle and self._archive.idle:
            if self._told_finished_at is None:
                self._told_finished_at = now
                self._deliver(finished_push(self.state))
            timers.append(self._told_finished_at + LINGER_SECONDS if self._exit_when_finished else None)
        return min((timer for timer in timers if timer is not None), default=None)

    def _may_exit(self) -> bool:
        told = self._told_finished_at
        if not self._exit_when_finished or told is None:
            return False
        return not self._followers or self._clock() >= told + LINGER_SECONDS

    async def _sleep_until(self, when: float | None) -> None:
        try:
            async with asyncio.timeout(None if when is None else max(0.0, when - self._clock())):
                await self._wake.wait()
        except TimeoutError:
            pass  # that is what it slept for

    def _happen(self, events: Sequence[ev.Event]) -> None:
        """Let events happen, and whatever is due by them. With `_settle`, the only way in which the state changes."""
        for event in events:
            self._take(event)
        self._settle()
        self._wake.set()

    def _settle(self) -> float | None:
        """Let everything happen that is due; when the next thing may be."""
        while (decision := decide(self.state, self._clock())).events:
            for event in decision.events:
                self._take(event)
        return decision.wake

    def _take(self, event: ev.Event) -> None:
        if self._fatal is not None:
            raise RemoteError("the coordinator is stopping")
        entry = self._entry(event) if isinstance(event, ev.VersionCommitted) else None
        try:
            apply(self.state, event)
        except Exception as error:
            self._stop_for(error)  # our own mistake: the state is half changed, and only the log has it whole
            raise
        push = push_of(event, self.state)
        self._journal.add(event, lambda: self._follow_up(event, entry, push))
        if self._journal.last >= self._snapshot_at:
            self._journal.keep(take_snapshot(self.state, self._journal.last))
            self._snapshot_at = self._journal.last + self._snapshot_every

    def _follow_up(self, event: ev.Event, entry: pb.ChainEntry | None, push: Push | None) -> None:
        """What an event that is on disk has for others."""
        if entry is not None:
            self._archive.want(self.chain.append(entry).manifest.message)
        if push is not None:
            self._deliver(push)
        if isinstance(event, ev.PeerJoined):
            self._prober.want(event.peer, event.addresses)
        if isinstance(event, ev.PeerLeft | ev.PeerBanned):
            self._followers.end(event.peer)
        if isinstance(event, ev.PeerBanned):
            log.error("a peer is banned", peer=event.peer, reason=event.reason, proof=event.root.hex())
        if isinstance(event, ev.RoundEmpty):
            self._warn("nothing to learn in a round", version=str(event.version), reason=event.reason)
        if self._on_event is not None:
            self._on_event(event, self.state)
        self._wake.set()

    def _entry(self, event: ev.VersionCommitted) -> pb.ChainEntry:
        """The entry of a version that is about to be applied."""
        entry = pb.ChainEntry(manifest=self._sign("VersionManifest", event.payload))
        attempt = self.state.round.attempt
        if attempt is not None:
            entry.plan.CopyFrom(self._sign("RoundPlan", attempt.payload))
            entry.seal.CopyFrom(self._sign("Seal", attempt.seal_payload))
        return entry

    async def _on_report(self, request: bytes, remote: str) -> bytes:
        try:
            signed = parse(pb.Signed, request)
            if signed.type == "Heartbeat":
                return _ack(self._beat(signed, remote))
            if signed.type == "FaultReport":
                return _ack(self._bench.take(open_signed(signed, self.run_id, pb.FaultReport, signer=remote)))
            verdict = judge(self.state, signed, remote, self.run_id, self._clock())
        except WireError as error:
            self._count(error, remote)
            return _ack(f"invalid: {error.message}"[:MAX_REASON])
        equivocations = self._bench.compare(verdict.events, self._clock())
        self._happen([*verdict.events, *equivocations])
        await self._journal.written()
        return _ack(None if verdict.accepted else verdict.reason)

    def _ban(self, peer: str, reason: str, proof: BlobRef) -> None:
        """By a proof that holds, and is kept."""
        ban = self.state.banned.get(peer)
        if ban is None or not ban.proved:
            self._happen([ev.PeerBanned(self._clock(), peer, reason, proof.root, proof.size)])

    def _on_probed(self, peer: str, addresses: Sequence[str], reachable: bool) -> None:
        member = self.state.members[peer]
        if self._fatal is None and member.addresses == addresses and member.reachable is not reachable:
            self._happen([ev.PeerProbed(self._clock(), peer, reachable)])

    def _beat(self, signed: pb.Signed, remote: str) -> str | None:
        heartbeat = open_heartbeat(signed, remote, self.run_id)
        member = self.state.members.get(remote)
        if member is None or not member.connected:
            return "unknown: this peer has not joined"
        now = self._clock()
        self._pulses[remote] = Pulse(now, heartbeat.version, heartbeat.state, dict(heartbeat.metrics))
        self._followers.hear(remote, now)
        return None

    async def _on_follow(self, stream: Stream) -> None:
        peer = stream.remote
        join = open_signed(await stream.receive(MAX_CALL_BYTES), self.run_id, pb.Join, signer=peer).message
        if self._closing:
            return  # no refusal: the peer tries again, and finds whoever comes after
        now = self._clock()
        admitted = self._admit(join, peer, now)
        if isinstance(admitted, str):
            self._warn("join refused", peer=peer, reason=admitted)
            await stream.send(_ack(admitted))
            await stream.linger()
            return
        replaced = replaced_push(peer)
        farewell = self._sign(replaced.type, replaced.payload).SerializeToString()
        session = self._followers.begin(peer, stream, now, farewell)
        session.push(_ack(None))
        for event in admitted:
            self._take(event)
        self._take(ev.PeerJoined(now, peer, tuple(join.addresses), join.agent[:MAX_AGENT]))
        for push in current_for(self.state, peer, finished=self._told_finished_at is not None):
            session.push(self._sign(push.type, push.payload).SerializeToString())
        self._happen([])
        try:
            await self._journal.written()
            await session.run()
        finally:
            gone = self._followers.forget(peer, session)
            if gone and not self._closing and self._fatal is None and self.state.members[peer].connected:
                self._happen([ev.PeerDisconnected(self._clock(), peer)])

    def _order(self, events: Sequence[ev.Event]) -> None:
        """Let happen what an operator ordered."""
        if self._closing:
            raise RemoteError("the coordinator is stopping")
        self._happen(events)

    def _admit(self, join: pb.Join, peer: str, now: float) -> str | list[ev.Event]:
        """Why this join is refused, or what happens by it. Evidence that going on would fork the chain ends `run`."""
        if peer in self.state.banned:
            return f"banned: {ban_words(self.state.banned[peer])}"
        try:
            refused = refusal(join, peer, self._manifest, self._config.admission)
            if refused is not None:
                return refused
            if join.HasField("head"):
                check_head(self.chain.chain, join.head)
            return use_of_invite(self.state, join, peer, self.run_id, self._identity.peer_id, now)
        except ChainError as error:
            self._stop_for(error)
            return f"fork: {error.message}"
        except WireError as error:
            self._count(error, peer)
            return f"invalid: {error.message}"

    def _stop_for(self, error: Exception) -> None:
        """End `run` with an error that was met while serving."""
        if self._fatal is None:
            self._fatal = error
        self._wake.set()

    def _count(self, error: WireError, remote: str) -> None:
        name = type(error).__name__
        self._transport.rejected[name] = self._transport.rejected.get(name, 0) + 1
        self._warn("rejected", peer=remote, error=name, reason=printable(error.message))

    def _warn(self, event: str, **what: str) -> None:
        """Show the first ones of a kind, and peer, then ever fewer, so that a flood does not fill the disk."""
        count = self._noise.count(event, what.get("peer", ""))
        if is_shown(count):
            log.warning(event, **what, count=count)

    def _deliver(self, push: Push) -> None:
        self._followers.push(push.peers, self._sign(push.type, push.payload).SerializeToString())

    def _sign(self, type_name: str, payload: bytes) -> pb.Signed:
        """Sign, but for what is in the chain's head, which an earlier coordinator may have signed."""
        head = self.chain.chain.head
        for part in (head.manifest, head.plan, head.seal) if head is not None else ():
            if part is not None and part.signed.type == type_name and part.signed.payload == payload:
                return part.signed
        return sign_payload(self._identity, self.run_id, type_name, payload)


def _ack(refusal: str | None) -> bytes:
    """An Ack: accepted without a reason, or refused with one."""
    return pb.Ack(accepted=refusal is None, reason=refusal or "").SerializeToString()
