"""One simulated run: the coordinator, its peers, what goes wrong, and when it ends."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from hashlib import sha256
from operator import attrgetter
from random import Random
from struct import pack
from typing import Any, Protocol, get_args

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.history import record_of
from hivegrpo.coordinator.round import longest_round
from hivegrpo.coordinator.simulation.exchange import Exchange
from hivegrpo.coordinator.simulation.liars import Liar
from hivegrpo.coordinator.simulation.network import Network, spread
from hivegrpo.coordinator.simulation.outcome import Outcome, Tally
from hivegrpo.coordinator.simulation.peer import SimulatedPeer
from hivegrpo.coordinator.simulation.scheduler import Scheduler
from hivegrpo.coordinator.simulation.sequencer import Fork, Sequencer, Told
from hivegrpo.coordinator.simulation.setting import Setting
from hivegrpo.coordinator.simulation.stubs import GENESIS_ROOT, guilty_by, proof_against, state_root
from hivegrpo.coordinator.state import Terms
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import digest_of, parse
from hivegrpo.protocol.invariants import Calm, Checker, Violation

KEPT_EXCHANGES = 4
UNREACHABLE = 0.2
"""Share of the peers that cannot be dialled."""

STEPS = 64
"""Things that happen before it is looked again whether a simulation is over."""

STALLED = 20
"""A simulation is given up after as many times the longest wait without a commit."""

CHECKED = {
    ev.LeaseGranted,
    ev.LeaseExpired,
    ev.ContributionReceived,
    ev.ContributionRejected,
    ev.PlanMade,
    ev.SealMade,
    ev.PeerBanned,
    ev.VersionCommitted,
}
"""What the invariants are judged by, of the coordinator's events."""


Reader = Callable[[ev.Event], Iterable[Any]]
"""Takes an event's fields."""


class Digest(Protocol):
    """Of hashlib's."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""


class World:
    """Everything that there is in one simulation."""

    def __init__(
        self, setting: Setting, timer: Callable[[], float] = lambda: 0.0, sequencer: type[Sequencer] = Sequencer
    ) -> None:
        """`timer` tells seconds, for the outcome alone: nothing in the simulation depends on it."""
        self.config = setting.config
        self.chance = Random(setting.seed)  # noqa: S311 - chosen to be repeated, not to be secret
        self.scheduler = Scheduler()
        self.network = Network(self.chance, setting.faults.loss)
        self.names: list[str] = []
        """Of all peers that there ever were."""
        self.liars: dict[str, Liar] = {}
        self.lying = True
        self.kept: dict[str, list[pb.Signed]] = {}
        """What liars keep to replay it."""
        self.newest_plan = b""
        self.tally = Tally()
        self._setting = setting
        self._faults = setting.faults
        self._honest: dict[str, SimulatedPeer] = {}
        self._present: list[SimulatedPeer] = []
        """Those that are not gone for good."""
        self._departing: set[str] = set()
        """Those that are drawn to be, or are: nobody makes room twice, so there are always as many."""
        self._exchanges: dict[bytes, Exchange] = {}
        self._roots = [GENESIS_ROOT]
        self._faulty: list[str] = []
        self._partition = 0
        self._news: list[ev.Event] = []
        """What is on disk, and not yet in the tally, the digest and the checker."""
        self._follow: dict[type[ev.Event], Callable[[Any], None]] = {
            ev.PlanMade: self._planned,
            ev.VersionCommitted: self._committed,
        }
        """What follows in the world from an event that is on disk, by its kind."""
        self._digest = sha256()
        self._healed_at: float | None = None
        self._checker = Checker()
        manifest = pb.RunManifest(
            config=self.config.canonical_json(), layout=[pb.Tensor(name="vector", shape=[setting.values])]
        )
        run = pb.Signed(type="RunManifest", payload=manifest.SerializeToString(deterministic=True))
        terms = Terms.of(run, self.config, digest_of(b"secret %d" % setting.seed))
        self._bound = 2 * longest_round(self.config) + self.config.timing.lease
        self.sequencer = sequencer(
            terms,
            terms.run_digest.hex(),
            scheduler=self.scheduler,
            network=self.network,
            chance=self.chance,
            on_written=self._note,
            keep_history=setting.faults.coordinator > 0.0,
            timer=timer,
        )
        self._found = self._checker.take({"kind": "run", "run_id": terms.run_digest.hex()})

    def run(self) -> Outcome:
        """To the last round, or until something is wrong."""
        self.sequencer.start()
        for _ in range(self._setting.peers):
            peer = self._new_peer()
            self.scheduler.after(2.0 * self.chance.random(), peer.start)
        patience = STALLED * self._bound
        try:
            while not self._is_over():
                if not self.scheduler.run(STEPS) and not self._is_over():
                    self._found.append(Violation(7, "nothing is left to happen"))
                if self.scheduler.now > self.tally.committed_at + patience:
                    self._found.append(Violation(7, f"no version was committed in {patience:.0f} s"))
        except Fork as fork:
            self._judge()
            self._found.append(Violation(4, str(fork)))
        return self._outcome()

    def spread(self) -> float:
        """A positive number around 1."""
        return spread(self.chance)

    def root_of(self, version: int) -> bytes:
        """The state that the canonical step gives for a committed version."""
        return self._roots[version]

    def exchange_of(self, plan: Told) -> Exchange:
        """The exchange of a plan."""
        exchange = self._exchanges.get(plan.digest)
        if exchange is None:
            while len(self._exchanges) >= KEPT_EXCHANGES:
                del self._exchanges[next(iter(self._exchanges))]
            exchange = self._exchanges[plan.digest] = Exchange(plan, self)
        return exchange

    def prove_fault_of(self, peer: SimulatedPeer) -> None:
        """This peer did what can be proved; the proof holds a moment later."""
        self._faulty.append(peer.name)
        proof = proof_against(peer.name)
        self.scheduler.after(1.0, self.sequencer.ban, peer.name, "signed two contents of a span", proof)

    def _new_peer(self) -> SimulatedPeer:
        setting, chance = self._setting, self.chance
        index = len(self.names)
        name = "12D3KooW" + sha256(b"%d/%d" % (setting.seed, index)).hexdigest()[:44]
        lies = chance.random() < setting.faults.liars
        pace = 0.1 if chance.random() < setting.faults.slow else 1.0
        speed = setting.speed * max(self.spread(), 0.2) * pace
        upload = setting.upload_mbit * 125_000 * max(self.spread(), 0.2) * pace
        dialable = chance.random() >= UNREACHABLE
        peer: SimulatedPeer
        if lies:
            peer = self.liars[name] = Liar(name, self, speed=speed, upload=upload, dialable=dialable)
        else:
            peer = self._honest[name] = SimulatedPeer(name, self, speed=speed, upload=upload, dialable=dialable)
        self.names.append(name)
        self._present.append(peer)
        return peer

    # What happens, and what goes wrong.

    def _note(self, events: Sequence[ev.Event]) -> None:
        """Events of the coordinator's are on disk."""
        self._news += events
        for event in events:
            follow = self._follow.get(type(event))
            if follow is not None:
                follow(event)

    def _judge(self) -> None:
        """Take in what has happened since this was done last: many events at once, as nothing follows from it but the
        end."""
        news, self._news = self._news, []
        self.tally.count(news)
        _absorb(self._digest, news)
        for event in news:
            if type(event) in CHECKED:
                self._found += self._checker.take(record_of(event))

    def _planned(self, event: ev.PlanMade) -> None:
        self.newest_plan = digest_of(event.payload)

    def _committed(self, event: ev.VersionCommitted) -> None:
        self.tally.commit(event.at)
        manifest = parse(pb.VersionManifest, event.payload)
        version = manifest.version
        if version > 0:
            self._roots.append(state_root(self._roots[version - 1], manifest.plan, manifest.seal))
        last = self.config.run.versions
        if version == last - 1:
            self.scheduler.after(self.tally.mean_round * self.chance.random(), self._heal)
        if version < last:
            self._disturb()

    def _disturb(self) -> None:
        """Draw what goes wrong in the round that begins now."""
        if self._healed_at is not None:
            return
        faults, chance, span = self._faults, self.chance, self.tally.mean_round or self.config.timing.lease
        self._present = [peer for peer in self._present if not peer.gone]
        count = len(self._present)
        staying = [peer for peer in self._present if peer.name not in self._departing]
        for peer in chance.sample(staying, min(round(faults.churn * count / 2), len(staying))):
            self._departing.add(peer.name)
            self.scheduler.after(span * chance.random(), self._depart, peer)
            self.scheduler.after(span * chance.random(), self._arrive)
        for peer in chance.sample(self._present, round(faults.crashes * count)):
            self.scheduler.after(span * chance.random(), self._crash, peer)
        for liar in self.liars.values():
            if chance.random() < 0.3:
                self.scheduler.after(span * chance.random(), liar.mischief)
        if chance.random() < faults.coordinator:
            self.scheduler.after(span * chance.random(), self._crash_coordinator)
        if chance.random() < faults.partitions:
            self.scheduler.after(span * chance.random(), self._part)

    def _depart(self, peer: SimulatedPeer) -> None:
        if self._healed_at is None:
            if self.chance.random() < 0.5:
                peer.crash(for_good=True)
            else:
                peer.leave()

    def _arrive(self) -> None:
        if self._healed_at is None:
            self._new_peer().start()

    def _crash(self, peer: SimulatedPeer) -> None:
        if self._healed_at is None and peer.alive:
            peer.crash()
            self.scheduler.after(10.0 * self.spread(), peer.start)

    def _crash_coordinator(self) -> None:
        if self._healed_at is None and self.sequencer.up:
            self.sequencer.crash()
            self.tally.restarts += 1
            self.scheduler.after(5.0 * self.spread(), self._restart_coordinator)

    def _restart_coordinator(self) -> None:
        if not self.sequencer.up:
            self.sequencer.start()

    def _part(self) -> None:
        if self._healed_at is None and not self._partition:
            self._partition = 1
            away = self.chance.sample(self._present, int(len(self._present) * self.chance.random() / 2))
            for peer in away:
                peer.side = 1
                self.sequencer.lose_sight_of(peer)
            self.scheduler.after(15.0 * self.spread(), self._join_again)

    def _join_again(self) -> None:
        self._partition = 0
        for peer in self._present:
            peer.side = 0

    def _heal(self) -> None:
        """From here on nothing goes wrong any more."""
        if self._healed_at is None:
            self._healed_at = self.scheduler.now
            self.lying = False
            self.network.loss = 0.0
            self._restart_coordinator()
            self._join_again()
            for peer in self._present:
                peer.start()

    # The end.

    def _is_over(self) -> bool:
        self._judge()
        return bool(self._found) or self.tally.version >= self.config.run.versions

    def _outcome(self) -> Outcome:
        self._judge()
        honest = {name: peer.records() for name, peer in self._honest.items()}
        calm = []
        if self._healed_at is not None:
            calm.append(Calm(self._healed_at, self.scheduler.now, self._bound))
        found = self._found + self._checker.finish(honest, lambda root, _: guilty_by(root, self._faulty), calm)
        return self.tally.outcome(
            violations=found,
            seconds=self.scheduler.now,
            digest=self._digest.hexdigest(),
            refused=self.sequencer.refused,
            cpu_seconds=self.sequencer.cpu_seconds,
            peers=len(self.names),
        )


def _absorb(digest: Digest, events: Iterable[ev.Event]) -> None:
    """Take events into a digest, whole: the repr of all that is in one, but for the bytes, which follow as they are.

    In the repr their lengths stand for them, and the event's time follows as eight bytes, too: to spell them out would
    take a seventh of a simulation's time.
    """
    told = []
    for event in events:
        kind = type(event)
        read, places = _FIELDS[kind]
        at, *whole = read(event)
        data = [whole[place] for place in places]
        for place in places:
            whole[place] = len(whole[place])
        told += [f"{kind.__name__} {whole!r}\n".encode(), pack("<d", at), *data]
    digest.update(b"".join(told))


def _fields(kind: type[ev.Event]) -> tuple[Reader, list[int]]:
    """What takes all fields of an event of this kind, first its time, and which of the others are bytes."""
    at, *others = fields(kind)
    # attrgetter gives no tuple of one
    read: Reader = attrgetter(at.name, *[other.name for other in others]) if others else lambda event: (event.at,)
    return read, [place for place, other in enumerate(others) if other.type is bytes]


_FIELDS = {kind: _fields(kind) for kind in get_args(ev.Event)}
"""By the kind of an event."""
