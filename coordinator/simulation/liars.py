"""Peers that lie, in another way each time. Too few of them, in any roster, for what a quorum decides."""

from typing import TYPE_CHECKING

from hivegrpo.coordinator.simulation.peer import SimulatedPeer
from hivegrpo.coordinator.simulation.stubs import envelope
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import digest_of, parse

if TYPE_CHECKING:
    from hivegrpo.coordinator.simulation.exchange import Exchange

KEPT = 16
"""Own reports that are kept to be replayed."""


class Liar(SimulatedPeer):
    """Behaves until it can lie, and lies about half of the time."""

    def _lies(self) -> bool:
        return self._world.lying and self._world.chance.random() < 0.5

    def _may_spoil(self, exchange: "Exchange") -> bool:
        """Whether liars are less than a third of a roster: a run with open admission trusts its majority."""
        liars = sum(name in self._world.liars for name in exchange.roster)
        return 3 * liars < len(exchange.roster)

    def ready(self) -> pb.Ready:
        """Or of one that it does not hold."""
        honest = super().ready()
        if not self._lies():
            return honest
        return self._world.chance.choice(
            [
                pb.Ready(version=self.height + 1, state_root=honest.state_root),
                pb.Ready(version=self.height, state_root=self._noise()),
                pb.Ready(version=max(self.height - 1, 0), state_root=honest.state_root),
                pb.Ready(version=max(self.head[0], 0), state_root=self._world.root_of(max(self.head[0], 0))),
            ]
        )

    def contribute(self, lease: pb.Lease) -> None:
        """With more, less, or others' work, before the true one or in its place."""
        if not self._lies():
            super().contribute(lease)
            return
        true = self.contribution(lease)
        self.commit_to(true.root)
        false = pb.Contribution()
        false.CopyFrom(true)
        match self._world.chance.randrange(10):
            case 0:
                false.weight = lease.max_weight + 1
            case 1:
                false.used.append(0)
            case 2:
                false.lease = max(1, lease.id - self._world.chance.randrange(4))
            case 3:
                false.lease = lease.id + 1000
            case 4:
                false.version += 1
            case 5:
                false.root = self._noise()
                self.commit_to(false.root)
            case 6:
                del false.used[:], false.dropped[:], false.returned[:]
                false.returned.extend(range(lease.count))
                false.weight = 0
            case 7:
                false.metrics["reward"] = float("nan")
            case 8:
                return  # it never comes
            case _:
                self._replay(envelope("Contribution", true.SerializeToString(deterministic=True), self.name))
                self._replay(envelope("Contribution", true.SerializeToString(deterministic=True), self.name))
        self._tell(envelope("Contribution", false.SerializeToString(deterministic=True), self.name))
        if self._world.chance.random() < 0.5:
            self._tell(envelope("Contribution", true.SerializeToString(deterministic=True), self.name))

    def sender_report(self, exchange: "Exchange", payload: bytes) -> None:
        """Leaving some out, claiming all, or none at all."""
        if not self._lies():
            super().sender_report(exchange, payload)
            return
        report = parse(pb.SenderReport, payload)
        match self._world.chance.randrange(5):
            case 0:
                del report.complete[self._world.chance.randrange(len(report.complete) + 1) :]
            case 1 if report.complete:
                left_out = self._world.chance.randrange(len(report.complete))
                del report.complete[left_out]
            case 2:
                complete = {item.peer for item in report.complete}
                report.complete.extend(pb.Complete(peer=name) for name in exchange.roster if name not in complete)
            case 3:
                report.complete.append(pb.Complete(peer="12D3KooWNobody"))
            case _:
                return
        super().sender_report(exchange, report.SerializeToString(deterministic=True))
        if self._world.chance.random() < 0.3:
            super().sender_report(exchange, payload)

    def serves(self, exchange: "Exchange") -> bool:
        """Or keeps its span to itself, or gives out two of them, which can be proved."""
        if not self._lies() or not self._may_spoil(exchange):
            return True
        if self._world.chance.random() < 0.3:
            self._world.prove_fault_of(self)
            return True
        return False

    def vote(self, exchange: "Exchange", payload: bytes, root: bytes) -> None:
        """For another state, twice, for another attempt, or never."""
        if not self._lies() or not self._may_spoil(exchange):
            super().vote(exchange, payload, root)
            self._keep(envelope("StepReport", payload, self.name))
            return
        report = parse(pb.StepReport, payload)
        match self._world.chance.randrange(6):
            case 0:
                report.state_root = self._noise()
            case 1:
                report.spans[0].root = self._noise()
            case 2:
                report.seal = self._noise()
            case 3:
                report.version += 1
            case 4:
                del report.receipts[:]
            case _:
                for old in self._kept:
                    self._tell(old)
                return
        self._tell(envelope("StepReport", report.SerializeToString(deterministic=True), self.name))
        if self._world.chance.random() < 0.5:
            super().vote(exchange, payload, root)

    def audited(self, exchange: "Exchange", span: int) -> bytes:
        """Or something else, or nothing."""
        return self._world.chance.choice([b"", self._noise()]) if self._lies() else super().audited(exchange, span)

    def mischief(self) -> None:
        """Between rounds: what others have signed, what nobody has signed, and what was said long ago."""
        if not self.alive or not self._world.lying:
            return
        other = self._world.chance.choice(self._world.names)
        leave = pb.Leave(reason="not me").SerializeToString(deterministic=True)
        self._tell(envelope("Leave", leave, other))
        forged = envelope("Leave", leave, self.name)
        forged.signature = b"f" * 64
        self._tell(forged)
        self._tell(envelope("Nonsense", self._noise(), self.name))
        self._tell(envelope("Ready", self._noise(), self.name))
        for old in self._kept:
            self._tell(old)

    @property
    def _kept(self) -> list[pb.Signed]:
        return self._world.kept.setdefault(self.name, [])

    def _keep(self, signed: pb.Signed) -> None:
        kept = self._kept
        kept.append(signed)
        del kept[:-KEPT]

    def _replay(self, signed: pb.Signed) -> None:
        self._tell(signed)
        self._keep(signed)

    def _tell(self, signed: pb.Signed) -> None:
        self.deliver(signed, lambda: True)

    def _noise(self) -> bytes:
        return digest_of(self._world.chance.randbytes(8))
