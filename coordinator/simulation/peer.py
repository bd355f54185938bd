"""A simulated volunteer: it follows, works, averages and votes as `peer.volunteer` does, and computes nothing.

What it has on disk (the version it holds, its contribution's commitment) outlives a crash; all else does not.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from hivegrpo.coordinator.simulation.calls import RETRY_SECONDS, Call
from hivegrpo.coordinator.simulation.sequencer import PATIENCE_SECONDS, Session, Told
from hivegrpo.coordinator.simulation.stubs import envelope
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import NOTICE, read_seed
from hivegrpo.protocol.envelope import digest_of
from hivegrpo.protocol.history import Record

if TYPE_CHECKING:
    from hivegrpo.coordinator.simulation.exchange import Exchange
    from hivegrpo.coordinator.simulation.world import World

DRAIN_SECONDS = 60.0
"""That a peer which wants to leave gives the round that counts on it."""

SYNC_SECONDS = 5.0
"""Median time to fetch a state."""

GRADIENT_SECONDS = 1.0
"""A gradient of a rollout that is already there."""

UNUSABLE = 0.02
"""Share of the groups that are dropped."""

NOTHING_LEARNT = 0.01
"""Share of the contributions that have no weight."""

Name = tuple[int, int]
"""Of a contribution: lease and iteration."""


class SimulatedPeer:
    """An honest volunteer."""

    def __init__(self, name: str, world: "World", *, speed: float, upload: float, dialable: bool) -> None:
        """`speed`: groups a second; `upload`: bytes a second."""
        self.name = name
        self.speed = speed
        self.upload = upload
        self.addresses = (f"/ip4/10.0.0.1/tcp/4001/p2p/{name}",) if dialable else ()
        self.side = 0
        self.alive = False
        self.gone = False
        """For good."""
        self.life = 0
        """Of the process: what was begun in an earlier one comes to nothing."""
        self.height = 0
        """The version that it holds; the manifest of version 0 may be still to come."""
        self.head: tuple[int, bytes] = (-1, b"")
        """Version and digest of the newest manifest that it was told of."""
        self.versions: list[tuple[int, bytes, bytes]] = []
        """Version, state root and manifest of what it took; with `acknowledged`, its history."""
        self.acknowledged: list[Name] = []
        self.session: Session | None = None
        self._world = world
        self._used: dict[int, list[int]] = {}
        """By lease: the offsets that iteration 0 used."""
        self._roots: set[bytes] = set()
        """What it committed to, lately."""
        self._forget()

    def _forget(self) -> None:
        self.session = None
        self._lease: pb.Lease | None = None
        self._working = False
        self._syncing = False
        self._done: Name = (0, 0)
        self._ready_said: tuple[int, int] | None = None
        self._joins = 0
        self._leaving = False
        self._owes = 0
        """The version that counts on its contribution."""
        self._plan: Told | None = None
        self._exchange: Exchange | None = None
        self._shadow: tuple[bytes, bytes] | None = None
        """Plan and state root of its newest vote."""
        self._sampled_at = 0.0

    def records(self) -> Iterator[Record]:
        """Its history, as `invariants.check` reads it."""
        for lease, iteration in self.acknowledged:
            yield {"kind": "contribution_acked", "lease": lease, "iteration": iteration}
        for version, root, manifest in self.versions:
            yield {"kind": "version", "version": version, "state_root": root.hex(), "manifest": manifest.hex()}

    def start(self) -> None:
        """Begin, or begin again from what is on disk."""
        if self.alive or self.gone:
            return
        self.alive = True
        self.life += 1
        self._forget()
        self._dial(self.life)

    def crash(self, *, for_good: bool = False) -> None:
        """Stop at once: the session breaks if only the process died, and falls silent if the machine did."""
        if not self.alive:
            return
        world, session = self._world, self.session
        self.alive, self.gone = False, for_good
        self.life += 1
        if session is not None:
            silent = world.chance.random() < 0.5
            world.scheduler.after(PATIENCE_SECONDS if silent else 0.1, world.sequencer.end, session)
        self._forget()

    def leave(self) -> None:
        """Take no new lease, finish the round that counts on this peer, for a minute, and go for good."""
        if self.alive and not self._leaving:
            self._leaving = True
            self._world.scheduler.after(DRAIN_SECONDS, self._say_goodbye, self.life)
            self._leave_if_free()

    def _leave_if_free(self) -> None:
        if self._leaving and self._owes <= self.height:
            self._say_goodbye(self.life)

    def _say_goodbye(self, life: int) -> None:
        if life == self.life:
            self.report(pb.Leave(reason="enough for today"), lambda: True, lambda *_: self._depart(life))

    def _depart(self, life: int) -> None:
        if life == self.life:
            self.crash(for_good=True)

    # The session.

    def _dial(self, life: int) -> None:
        if life != self.life or self.session is not None:
            return
        world = self._world
        seconds = world.network.transit(self)
        if seconds is not None:
            world.scheduler.after(seconds, self._join, life)
        else:
            world.scheduler.after(RETRY_SECONDS, self._dial, life)

    def _join(self, life: int) -> None:
        if life != self.life or self.session is not None:
            return
        self.session = self._world.sequencer.join(self, self.head)
        if self.session is None:
            self._world.scheduler.after(RETRY_SECONDS, self._dial, life)
            return
        self._joins += 1

    def lose_session(self, session: Session) -> None:
        """The session broke; join again."""
        if self.session is session:
            self.session = None
            self._dial(self.life)

    def hear(self, session: Session, told: Told) -> None:
        """Take a push."""
        if self.session is not session:
            return
        match told.type:
            case "Seal":
                self._hear_seal(told)
            case "Notice":
                self._hear_notice(told)
            case "VersionManifest":
                self._hear_version(told)
                self._act()
            case "Lease":
                self._hear_lease(told)
                self._act()
            case "RoundPlan":
                self._plan = told
                self._act()
            case _:  # a Welcome
                self._act()

    def report(
        self, message: Message, matters: Callable[[], bool], taken: Callable[[bool, str], None] | None = None
    ) -> None:
        """Deliver a report, again and again while it matters; `taken` gets the answer, if it is of use."""
        payload = message.SerializeToString(deterministic=True)
        self.deliver(envelope(type(message).__name__, payload, self.name), matters, taken)

    def deliver(
        self, signed: pb.Signed, matters: Callable[[], bool], taken: Callable[[bool, str], None] | None = None
    ) -> None:
        """Likewise, what is in its envelope already."""
        Call(self, signed, matters, taken, self._world).make()

    # Versions.

    def _hear_version(self, told: Told) -> None:
        manifest, digest = told.message, told.digest
        assert isinstance(manifest, pb.VersionManifest)
        version = manifest.version
        if (version, digest) == self.head or version < self.head[0]:
            return
        self.head = (version, digest)
        shadow, self._shadow = self._shadow, None
        if version == 0 or (version == self.height + 1 and shadow == (manifest.plan, manifest.state.root)):
            self._adopt(version)
        elif not self._syncing:
            self._synchronise()

    def _synchronise(self) -> None:
        self._syncing = True
        seconds = SYNC_SECONDS * self._world.spread()
        self._world.scheduler.after(seconds, self._synchronised, self.life)

    def _synchronised(self, life: int) -> None:
        if life == self.life:
            self._syncing = False
            self._adopt(self.head[0])
            self._act()

    def _adopt(self, version: int) -> None:
        """Hold a version, whose root is the canonical step's, whatever the manifest says."""
        self.height = version
        self.versions.append((version, self._world.root_of(version), self.head[1]))
        self._leave_if_free()

    # Work.

    def _hear_lease(self, told: Told) -> None:
        lease = told.message
        assert isinstance(lease, pb.Lease)
        self._lease = lease
        if lease.ahead:
            self._sampled_at = self._world.scheduler.now + self.rollout_seconds(lease)

    def _act(self) -> None:
        """Begin with the most urgent thing, as far as it is not under way."""
        if self._syncing:
            return
        plan = self._plan
        if plan is not None:
            assert isinstance(plan.message, pb.RoundPlan)
            exchange = self._world.exchange_of(plan)
            if plan.message.version == self.height + 1 and exchange.roster.get(self.name) in self._roots:
                self._plan = None
                self._exchange = exchange
                exchange.begin(self)
        if self.session is None or self._leaving:
            return
        if self._lease is not None and not self._working and self._is_due(self._lease):
            self._work(self._lease)
        elif not self._working and self._exchange_is_over() and self._ready_said != (self.height, self._joins):
            self._ready_said = (self.height, self._joins)
            self._world.scheduler.after(0.2, self._say_ready, self.life, self._ready_said)

    def _is_due(self, lease: pb.Lease) -> bool:
        return lease.version == self.height and (lease.id, lease.iteration) > self._done

    def _exchange_is_over(self) -> bool:
        return self._exchange is None or self._exchange.plan.version <= self.height

    def ready(self) -> pb.Ready:
        """What it says of the version that it holds."""
        return pb.Ready(version=self.height, state_root=self._world.root_of(self.height))

    def _say_ready(self, life: int, place: tuple[int, int]) -> None:
        if life == self.life and place == (self.height, self._joins) and not self._working:
            self.report(self.ready(), lambda: place == (self.height, self._joins))

    def rollout_seconds(self, lease: pb.Lease) -> float:
        """How long it samples for a lease."""
        return lease.wanted / self.speed * (0.9 + 0.2 * self._world.chance.random())

    def _work(self, lease: pb.Lease) -> None:
        self._working, self._lease = True, None
        seconds = GRADIENT_SECONDS if lease.iteration else self.rollout_seconds(lease)
        if lease.ahead:
            seconds = max(0.0, self._sampled_at - self._world.scheduler.now) + GRADIENT_SECONDS
        self._world.scheduler.after(min(seconds, lease.seconds), self._finish, self.life, lease, seconds)

    def _finish(self, life: int, lease: pb.Lease, seconds: float) -> None:
        if life != self.life:
            return
        self._working = False
        self._done = (lease.id, lease.iteration)
        if self._leaving:
            return
        if seconds >= lease.seconds or self.head[0] > lease.version:
            self._ready_said = None
        else:
            self.contribute(lease)
        self._act()

    def contribute(self, lease: pb.Lease) -> None:
        """Commit to a gradient."""
        contribution = self.contribution(lease)
        self.commit_to(contribution.root)

        def taken(accepted: bool, _: str) -> None:
            if accepted:
                self._owes = lease.version + 1 if contribution.weight else self._owes
                self.acknowledged.append((lease.id, lease.iteration))
            else:
                self._ready_said = None
                self._act()

        self.report(contribution, lambda: True, taken)

    def commit_to(self, root: bytes) -> None:
        """Keep a contribution: a plan that names it concerns this peer."""
        if len(self._roots) >= 8:
            self._roots.clear()
        self._roots.add(root)

    def contribution(self, lease: pb.Lease) -> pb.Contribution:
        """What it makes of a lease."""
        world, count = self._world, lease.count
        if lease.iteration:
            used, dropped, returned = self._used.get(lease.id, []), list[int](), range(0)
        else:
            chance = world.chance
            wanted = 0 if chance.random() < NOTHING_LEARNT else lease.wanted
            used, dropped, tried = [], [], 0
            while tried < count and len(used) < wanted:
                (dropped if chance.random() < UNUSABLE else used).append(tried)
                tried += 1
            returned = range(tried, count)
            self._used = {lease.id: used}
        weight = lease.max_weight * len(used) // lease.wanted * 3 // 4
        if used and not weight:
            weight = 1
        contribution = pb.Contribution(
            lease=lease.id,
            version=lease.version,
            iteration=lease.iteration,
            used=used,
            dropped=dropped,
            returned=returned,
            weight=weight,
            root=digest_of(f"{self.name} {lease.id} {lease.iteration} {lease.version}".encode()),
        )
        metrics = contribution.metrics  # one by one: a map takes a dict through several calls each
        if used:
            metrics["reward"] = 0.5
            metrics["num_tokens"] = float(weight)
        else:
            metrics["frac_reward_zero_std"] = 1.0
        return contribution

    # The exchange.

    def _hear_seal(self, told: Told) -> None:
        seal = told.message
        assert isinstance(seal, pb.Seal)
        if self._exchange is not None and self._exchange.digest == seal.plan:
            self._exchange.seal(self, told)

    def sender_report(self, exchange: "Exchange", payload: bytes) -> None:
        """As a reducer, report who is complete."""
        self.deliver(envelope("SenderReport", payload, self.name), exchange.is_current)

    def serves(self, exchange: "Exchange") -> bool:
        """Whether it reduces its span, and lets others have it."""
        return True

    def vote(self, exchange: "Exchange", payload: bytes, root: bytes) -> None:
        """Report the root of its step."""
        self._shadow = (exchange.digest, root)
        self.deliver(envelope("StepReport", payload, self.name), exchange.is_current)

    def _hear_notice(self, told: Told) -> None:
        notice, exchange = told.message, self._exchange
        assert isinstance(notice, pb.Notice)
        if notice.kind != NOTICE or exchange is None:
            return
        seal, seed = _seed_in(notice.text)
        if exchange.seal_digest != seal:
            return
        for span, begins in exchange.audits_of(self.name, seed):
            self._world.scheduler.after(begins + 1.0, self._audit, self.life, exchange, span)

    def _audit(self, life: int, exchange: "Exchange", span: int) -> None:
        if life == self.life and self.height < exchange.plan.version:
            report = pb.AuditReport(
                plan=exchange.digest,
                seal=exchange.seal_digest,
                span=span,
                content=self.audited(exchange, span),
            )
            self.report(report, lambda: self.height < exchange.plan.version)

    def audited(self, exchange: "Exchange", span: int) -> bytes:
        """The root that it finds for a span."""
        return exchange.span_root(span)


@lru_cache(maxsize=4)
def _seed_in(notice: str) -> tuple[bytes, bytes]:
    """Seal and seed in a notice's text, which the whole roster hears."""
    return read_seed(pb.Notice(text=notice))
