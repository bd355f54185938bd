"""The network shell around the state machine: reports in, signed pushes out, a log on disk between them.

Everything that changes the state goes through `_commit`, which never awaits: the log is written, the state and the
chain advance, and only then is anything sent.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.admission import MAX_AGENT, check_head, refusal
from hivegrpo.coordinator.archive import Archive
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.followers import Followers
from hivegrpo.coordinator.log import DAMAGED_HINT, EventLog
from hivegrpo.coordinator.reports import judge, open_heartbeat
from hivegrpo.coordinator.state import Phase, State, Terms, apply
from hivegrpo.coordinator.status import Pulse, snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstream import BlobStore, serve_blobs
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import digest_of, open_signed, parse, run_id_of, sign, sign_payload
from hivegrpo.protocol.errors import ChainError, HiveError, WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, Stream, Transport

REPORT = "report"
FOLLOW = "follow"
HEARTBEAT_SECONDS = 2.0
MISSED_HEARTBEATS = 3
MAX_HOLDERS = 32
MAX_REASON = 300
CLOSE_SECONDS = 5.0
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
    ) -> None:
        """ChainError if `home` follows another run. The caller closes `transport` and `log`."""
        self.run_id = run_id_of(run.payload)
        self.state = State(Terms.of(run, config))
        self.chain = ChainFile.create(home, run, identity.peer_id)
        self._identity = identity
        self._transport = transport
        self._log = log
        self._manifest = parse(pb.RunManifest, run.payload)
        self._config = config
        self._blobs = blobs
        self._clock = clock
        self._on_event = on_event
        self._exit_when_finished = exit_when_finished
        self._wake = asyncio.Event()
        self._fatal: HiveError | None = None
        self._closing = False
        self._told_finished_at: float | None = None
        self._pulses: dict[str, Pulse] = {}
        self._followers = Followers(MISSED_HEARTBEATS * HEARTBEAT_SECONDS + config.timing.grace, self._wake.set)
        self._archive = Archive(
            transport,
            blobs,
            self._state_holders,
            every=config.distribution.anchor_every,
            final=config.run.versions,
            on_idle=self._wake.set,
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, or until the run is finished if it is to exit then.

        ChainError if the log is damaged, or if a peer shows a newer chain than ours; ConfigError if the disk is full.
        """
        self._restore()
        await serve_chain(self._transport, self.chain.chain)
        await serve_blobs(self._transport, self._blobs)
        await self._transport.serve_call(REPORT, self._on_report)
        await self._transport.serve_stream(FOLLOW, self._on_follow, max_per_peer=2)
        watched = [asyncio.create_task(self._archive.run()), asyncio.create_task(stop.wait())]
        for task in watched:
            task.add_done_callback(lambda _: self._wake.set())
        try:
            while not stop.is_set() and not self._may_exit():
                self._wake.clear()
                await self._sleep_until(self._advance())
                if watched[0].done():
                    watched[0].result()
        finally:
            self._closing = True
            for task in watched:
                task.cancel()
            await asyncio.gather(*watched, return_exceptions=True)
            await self._followers.close(CLOSE_SECONDS)

    def snapshot(self) -> dict[str, Any]:
        """What people are shown."""
        shown = snapshot(self.state, self._pulses, self._clock())
        shown["rejected"] = dict(self._transport.rejected)
        shown["archived"] = self._archive.versions
        shown["archive_failures"] = {str(version): reason for version, reason in self._archive.failed.items()}
        return shown

    def _restore(self) -> None:
        for event in self._log.replay():
            try:
                self._take(event)
            except (LookupError, AssertionError, WireError) as error:
                name = type(event).__name__
                raise ChainError(
                    f"An event of the log ({name}) does not follow from the others.", DAMAGED_HINT
                ) from error
        if self.chain.chain.height > self.state.version:
            raise ChainError(
                f"The log ends at version {self.state.version}, the chain beside it at {self.chain.chain.height}.",
                DAMAGED_HINT,
            )
        self._commit([ev.CoordinatorStarted(self._clock())])
        self._archive.restore([entry.manifest.message for entry in self.chain.chain.entries])

    def _advance(self) -> float | None:
        """Let everything happen that is due; when to look again."""
        if self._fatal is not None:
            raise self._fatal
        while (decision := decide(self.state, self._clock())).events:
            self._commit(decision.events)
        now = self._clock()
        timers = [decision.wake, self._followers.drop_silent(now)]
        if self.state.phase is Phase.FINISHED and self._archive.idle:
            if self._told_finished_at is None:
                self._told_finished_at = now
                self._send(None, self._finished_notice())
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

    def _commit(self, events: Sequence[ev.Event]) -> None:
        """Write events, let them happen, and tell those concerned. The only way in which the state changes."""
        if not events:
            return
        try:
            self._log.append(events)
        except HiveError as error:
            self._stop_for(error)
            raise
        for event in events:
            self._take(event)
            self._publish(event)
            if self._on_event is not None:
                self._on_event(event, self.state)
        self._wake.set()

    def _take(self, event: ev.Event) -> None:
        if isinstance(event, ev.VersionCommitted):
            self._extend_chain(event.payload)
        apply(self.state, event)

    def _extend_chain(self, payload: bytes) -> None:
        """Append the version that is about to be committed, unless the chain's file has it from before a restart."""
        chain, version = self.chain.chain, self.state.version + 1
        if version <= chain.height:
            if chain.entries[version].manifest.digest != digest_of(payload):
                raise ChainError(f"The log and the chain beside it differ at version {version}.", DAMAGED_HINT)
            return
        entry = pb.ChainEntry(manifest=self._envelope("VersionManifest", payload))
        attempt = self.state.round.attempt
        if attempt is not None:
            entry.plan.CopyFrom(self._envelope("RoundPlan", attempt.payload))
            entry.seal.CopyFrom(self._envelope("Seal", attempt.seal_payload))
        self.chain.append(entry)

    def _publish(self, event: ev.Event) -> None:
        """Push what an event has for the peers."""
        attempt = self.state.round.attempt
        match event:
            case ev.LeaseGranted(payload=payload):
                self._send([parse(pb.Lease, payload).peer], self._envelope("Lease", payload))
            case ev.PlanMade(payload=payload) if attempt is not None:
                self._send(sorted(attempt.roster), self._envelope("RoundPlan", payload))
            case ev.SealMade(payload=payload) if attempt is not None:
                self._send(sorted(attempt.roster), self._envelope("Seal", payload))
            case ev.VersionCommitted(payload=payload):
                self._send(None, self._envelope("VersionManifest", payload))
                self._archive.want(parse(pb.VersionManifest, payload))
            case ev.PeerLeft(peer=peer):
                self._followers.end(peer)

    def _current_for(self, peer: str) -> list[pb.Signed]:
        """What a peer that has just joined is told."""
        state = self.state
        holders = [pb.Endpoint(peer=other, addresses=state.members[other].addresses) for other in self._servers(peer)]
        told = [sign(self._identity, self.run_id, pb.Welcome(head=max(state.version, 0), holders=holders))]
        if state.head is not None:
            told.append(self._envelope("VersionManifest", state.head.payload))
        lease = state.members[peer].lease
        if lease is not None:
            told.append(self._envelope("Lease", state.leases[lease].payload))
        attempt = state.round.attempt
        if attempt is not None and peer in attempt.roster:
            told.append(self._envelope("RoundPlan", attempt.payload))
            if attempt.seal is not None:
                told.append(self._envelope("Seal", attempt.seal_payload))
        if self._told_finished_at is not None:
            told.append(self._finished_notice())
        return told

    def _servers(self, asking: str) -> list[str]:
        """Connected peers that hold the head and can be dialled."""
        members, version = self.state.members, self.state.version
        found = []
        for peer in self.state.connected:
            if peer != asking and members[peer].addresses and members[peer].ready == version:
                found.append(peer)
                if len(found) == MAX_HOLDERS:
                    break
        return found

    def _state_holders(self, version: int) -> list[str]:
        """Connected peers that hold this version or a newer one, those at exactly this version first."""
        members = self.state.members
        having = [(peer, members[peer].ready) for peer in self.state.connected]
        able = sorted((ready - version, peer) for peer, ready in having if ready is not None and ready >= version)
        return [peer for _, peer in able[:MAX_HOLDERS]]

    async def _on_report(self, request: bytes, remote: str) -> bytes:
        try:
            signed = parse(pb.Signed, request)
            if signed.type == "Heartbeat":
                return _ack(self._beat(signed, remote))
            verdict = judge(self.state, signed, remote, self.run_id, self._clock())
        except WireError as error:
            self._count(error, remote)
            return _ack(f"invalid: {error.message}"[:MAX_REASON])
        self._commit(verdict.events)
        return _ack(None if verdict.accepted else verdict.reason)

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
        refused = self._refusal(join, peer)
        if refused is not None:
            log.warning("join refused", peer=peer, reason=refused)
            await stream.send(_ack(refused))
            return
        now = self._clock()
        session = self._followers.begin(peer, stream, now)
        session.push(_ack(None))
        self._commit([ev.PeerJoined(now, peer, tuple(join.addresses), join.agent[:MAX_AGENT])])
        for told in self._current_for(peer):
            session.push(told.SerializeToString())
        try:
            await self._followers.serve(peer, session)
        finally:
            if not self._closing and peer not in self._followers and self.state.members[peer].connected:
                self._commit([ev.PeerDisconnected(self._clock(), peer)])

    def _refusal(self, join: pb.Join, peer: str) -> str | None:
        """Why this join is refused; None if it is not. Evidence that going on would fork the chain ends `run`."""
        try:
            refused = refusal(join, peer, self._manifest, self._config.admission)
            if refused is None and join.HasField("head"):
                check_head(self.chain.chain, join.head)
            return refused
        except ChainError as error:
            self._stop_for(error)
            return f"fork: {error.message}"
        except WireError as error:
            self._count(error, peer)
            return f"invalid: {error.message}"

    def _stop_for(self, error: HiveError) -> None:
        """End `run` with an error that was met while serving."""
        if self._fatal is None:
            self._fatal = error
        self._wake.set()

    def _count(self, error: WireError, remote: str) -> None:
        name = type(error).__name__
        self._transport.rejected[name] = self._transport.rejected.get(name, 0) + 1
        log.warning("rejected", peer=remote, error=name, reason=error.message[:MAX_REASON])

    def _send(self, peers: Sequence[str] | None, signed: pb.Signed) -> None:
        self._followers.push(peers, signed.SerializeToString())

    def _envelope(self, type_name: str, payload: bytes) -> pb.Signed:
        return sign_payload(self._identity, self.run_id, type_name, payload)

    def _finished_notice(self) -> pb.Signed:
        text = f"version {self.state.version} was the last; thank you"
        return sign(self._identity, self.run_id, pb.Notice(kind="finished", text=text))


def _ack(refusal: str | None) -> bytes:
    """An Ack: accepted without a reason, or refused with one."""
    return pb.Ack(accepted=refusal is None, reason=refusal or "").SerializeToString()
