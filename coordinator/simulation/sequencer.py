"""The simulated coordinator: the real state machine, with a disk that takes its time, and crashes.

As in `coordinator.service`: a report is judged, what follows from it is applied and written to the event history, and
only what is written there is answered and pushed. Events that a crash finds unwritten never were. It starts from a
snapshot and the events since.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.decide import decide
from hivegrpo.coordinator.pushes import Push, current_for, finished_push, push_of
from hivegrpo.coordinator.readings import lease_of
from hivegrpo.coordinator.reports import judge
from hivegrpo.coordinator.simulation.network import Network
from hivegrpo.coordinator.simulation.scheduler import Scheduler
from hivegrpo.coordinator.simulation.stubs import verify
from hivegrpo.coordinator.snapshots import Snapshot, read_snapshot, take_snapshot
from hivegrpo.coordinator.state import Phase, State, Terms
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import digest_of, parse
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.values import value

if TYPE_CHECKING:
    from hivegrpo.coordinator.simulation.peer import SimulatedPeer

PATIENCE_SECONDS = 6.0
"""Silence after which a peer counts as gone."""

RESET_SECONDS = 1.0
"""Within which both ends notice that a stream has broken."""

READERS: dict[str, Callable[[bytes], Message]] = {
    "RoundPlan": partial(parse, pb.RoundPlan),
    "Seal": partial(parse, pb.Seal),
    "VersionManifest": partial(parse, pb.VersionManifest),
    "Notice": partial(parse, pb.Notice),
}
"""What is pushed to many, by type."""

Answer = Callable[[bool | None, str], None]
"""Takes whether a report was accepted, and why not; None: no answer, as the coordinator is down."""


@value
class Told:
    """A push as peers read it: everybody the same object, so nobody changes it."""

    type: str
    message: Message
    digest: bytes


WELCOME = Told("Welcome", pb.Welcome(), b"")
"""What is in one differs from peer to peer, and nobody in a simulation fetches anything."""


def _told(push: Push) -> Told:
    """What peers hear of a push."""
    if push.type == WELCOME.type:
        return WELCOME
    if push.type == "Lease":  # for one peer, and nothing refers to it by its digest
        return Told(push.type, lease_of(push.payload), b"")
    return _read(push.type, push.payload)


@lru_cache(maxsize=64)
def _read(kind: str, payload: bytes) -> Told:
    """Read once, however many hear it."""
    return Told(kind, READERS[kind](payload), digest_of(payload))


@dataclass(slots=True, eq=False)
class Session:
    """One follow stream: frames arrive in order, or it is broken."""

    peer: "SimulatedPeer"
    broken: bool = False
    last: float = 0.0
    """When the newest frame arrives."""


class Fork(Exception):
    """A peer holds a version that this coordinator does not know: it must never happen."""


class Sequencer:
    """The coordinator of a simulation."""

    write_seconds = 0.005
    """A sync to disk; what happens meanwhile is written together."""

    snapshot_every = 5_000
    """Events: many more than could be replayed while a snapshot is made and read, which is some 1,500."""

    def __init__(
        self,
        terms: Terms,
        run_id: str,
        *,
        scheduler: Scheduler,
        network: Network,
        chance: Random,
        on_written: Callable[[Sequence[ev.Event]], None],
        keep_history: bool,
        timer: Callable[[], float],
    ) -> None:
        """`on_written` is told of the events that are on disk; `timer` measures the coordinator's own code."""
        self.run_id = run_id
        self.history: list[ev.Event] = []
        """What is on disk, if it is kept: a coordinator that crashes needs it."""
        self.unwritten: list[ev.Event] = []
        """What has happened since."""
        self.snapshot: Snapshot | None = None
        """What the history up to some event comes to, if it is kept."""
        self.chain: list[bytes] = []
        """Digests of the versions on disk."""
        self.refused: Counter[str] = Counter()
        """Reports that were refused, by the first word of the answer; errors by the name of their class."""
        self.cpu_seconds = 0.0
        self.up = False
        self._terms = terms
        self._scheduler = scheduler
        self._network = network
        self._chance = chance
        self._on_written = on_written
        self._keep_history = keep_history
        self._timer = timer
        self._sessions: dict[str, Session] = {}
        self._effects: list[Callable[[], None]] = []
        self._answers: list[tuple[Answer, bool, str]] = []
        self._next_snapshot: Snapshot | None = None
        """To be kept once its events are on disk."""
        self._alarm: float | None = None
        self._life = 0
        self._follow: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.VersionCommitted: self._extend,
            ev.PeerLeft: self._dismiss,
            ev.PeerBanned: self._dismiss,
        }
        """What follows here from an event that is on disk, by its kind."""
        self.state = State(terms)

    def start(self) -> None:
        """Come up: make the state again from what is on disk, and go on."""
        began = self._timer()
        kept, begin = self.snapshot, 0
        self.state = State(self._terms)
        if kept is not None and kept.sequence <= len(self.history):
            self.state, begin = read_snapshot(kept, self._terms), kept.sequence
        for event in islice(self.history, begin, None):
            apply(self.state, event)
        self.up = True
        self._alarm = None
        self.cpu_seconds += self._timer() - began
        self._happen([ev.CoordinatorStarted(self._scheduler.now)])

    def crash(self) -> None:
        """Lose whatever is not on disk, and all sessions."""
        self.up = False
        self._life += 1
        answers, self._answers = self._answers, []
        self.unwritten, self._effects, self._next_snapshot = [], [], None
        sessions, self._sessions = self._sessions, {}
        for answer, _, _ in answers:
            answer(None, "")
        for session in sessions.values():
            session.broken = True
            self._scheduler.after(RESET_SECONDS * self._chance.random(), session.peer.lose_session, session)

    def join(self, peer: "SimulatedPeer", head: tuple[int, bytes]) -> Session | None:
        """A peer has dialled, and shows the newest version that it knows; None if it is turned away."""
        if not self.up:
            return None
        version, digest = head
        if version >= 0 and (version >= len(self.chain) or self.chain[version] != digest):
            raise Fork(f"{peer.name} holds version {version}, the coordinator {len(self.chain) - 1}, at {head}")
        if peer.name in self.state.banned:
            self.refused["banned"] += 1
            peer.crash(for_good=True)
            return None
        session = Session(peer)
        if (older := self._sessions.pop(peer.name, None)) is not None:
            older.broken = True
        self._sessions[peer.name] = session
        began = self._timer()
        self._take(ev.PeerJoined(self._scheduler.now, peer.name, peer.addresses, "simulated"))
        pushes = current_for(self.state, peer.name, finished=self.state.phase is Phase.FINISHED)
        self._effects.append(lambda: self._send(session, *map(_told, pushes)))
        self._take_all([])
        self.cpu_seconds += self._timer() - began
        return session

    def report(self, signed: pb.Signed, peer: str, answer: Answer) -> None:
        """A report has arrived; `answer` is called once what follows from it is on disk."""
        if not self.up:
            answer(None, "")
            return
        began = self._timer()
        try:
            verdict = judge(self.state, signed, peer, self.run_id, self._scheduler.now, verify)
        except WireError as error:
            self.cpu_seconds += self._timer() - began
            self.refused[type(error).__name__] += 1
            answer(False, f"invalid: {error.message}")
            return
        if verdict.events:
            self._take_all(verdict.events)
        self.cpu_seconds += self._timer() - began
        if not verdict.accepted:
            self.refused[verdict.reason.partition(":")[0]] += 1
        if self.unwritten:
            self._answers.append((answer, verdict.accepted, verdict.reason))
        else:
            answer(verdict.accepted, verdict.reason)

    def end(self, session: Session) -> None:
        """Notice that a session is over."""
        session.broken = True
        name = session.peer.name
        if self._sessions.get(name) is session:
            del self._sessions[name]
            if self.up and self.state.members[name].connected:
                self._happen([ev.PeerDisconnected(self._scheduler.now, name)])

    def lose_sight_of(self, peer: "SimulatedPeer") -> None:
        """A peer is cut off: if it still is when patience ends, its session is over for both."""
        session = self._sessions.get(peer.name)
        if session is not None:
            self._scheduler.after(PATIENCE_SECONDS, self._give_up, session)

    def _give_up(self, session: Session) -> None:
        if session.peer.side != 0:
            self.end(session)
            session.peer.lose_session(session)

    def ban(self, peer: str, reason: str, proof: bytes) -> None:
        """A proof of fault has held, as `coordinator.bench` finds out."""
        if self.up and peer not in self.state.banned:
            self._happen([ev.PeerBanned(self._scheduler.now, peer, reason, proof, len(proof))])

    def _happen(self, events: Sequence[ev.Event]) -> None:
        began = self._timer()
        self._take_all(events)
        self.cpu_seconds += self._timer() - began

    def _take_all(self, events: Sequence[ev.Event]) -> None:
        """Events, and whatever is due by them; wake up when the next thing may be."""
        for event in events:
            self._take(event)
        now = self._scheduler.now
        while (decision := decide(self.state, now)).events:
            for event in decision.events:
                self._take(event)
        wake = decision.wake
        if wake is not None and (self._alarm is None or wake < self._alarm):
            self._alarm = wake
            self._scheduler.at(wake, self._ring, wake, self._life)
        if self._keep_history:
            self._take_snapshot()

    def _take_snapshot(self) -> None:
        """If one is due."""
        newest = self._next_snapshot or self.snapshot
        sequence = len(self.history) + len(self.unwritten)
        if sequence >= (newest.sequence if newest else 0) + self.snapshot_every:
            self._next_snapshot = take_snapshot(self.state, sequence)

    def _ring(self, alarm: float, life: int) -> None:
        if life == self._life and alarm == self._alarm:
            self._alarm = None
            self._happen([])

    def _take(self, event: ev.Event) -> None:
        apply(self.state, event)
        push = push_of(event, self.state)
        if not self.unwritten:
            self._scheduler.after(self.write_seconds, self._write, self._life)
        self.unwritten.append(event)
        if push is not None:
            told = _told(push)
            self._effects.append(lambda: self._deliver(push, told))

    def _write(self, life: int) -> None:
        """What happened is on disk: tell of it."""
        if life != self._life:
            return
        events, self.unwritten = self.unwritten, []
        effects, self._effects = self._effects, []
        answers, self._answers = self._answers, []
        if self._keep_history:
            self.history += events
            self.snapshot, self._next_snapshot = self._next_snapshot or self.snapshot, None
        height = len(self.chain)
        for event in events:
            follow = self._follow.get(type(event))
            if follow is not None:
                follow(event)
        self._on_written(events)
        for effect in effects:
            effect()
        for answer, accepted, reason in answers:
            answer(accepted, reason)
        if len(self.chain) > height and self.state.phase is Phase.FINISHED:
            push = finished_push(self.state)
            self._deliver(push, _told(push))

    def _extend(self, event: ev.VersionCommitted) -> None:
        self.chain.append(digest_of(event.payload))

    def _dismiss(self, event: ev.PeerLeft | ev.PeerBanned) -> None:
        session = self._sessions.pop(event.peer, None)
        if session is not None:
            session.broken = True
            if isinstance(event, ev.PeerBanned):
                session.peer.crash(for_good=True)

    def _deliver(self, push: Push, told: Told) -> None:
        for name in list(self._sessions) if push.peers is None else push.peers:
            session = self._sessions.get(name)
            if session is not None and not session.broken:
                self._send_frame(session, told)

    def _send(self, session: Session, *frames: Told) -> None:
        for told in frames:
            if not session.broken:
                self._send_frame(session, told)

    def _send_frame(self, session: Session, told: Told) -> None:
        peer, scheduler = session.peer, self._scheduler
        seconds = self._network.transit(peer)
        if seconds is None:
            session.broken = True
            scheduler.after(RESET_SECONDS * self._chance.random(), peer.lose_session, session)
            scheduler.after(RESET_SECONDS * self._chance.random(), self.end, session)
            return
        when = scheduler.now + seconds
        if when < session.last:
            when = session.last
        session.last = when
        scheduler.at(when, peer.hear, session, told)
