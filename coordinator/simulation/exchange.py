"""One attempt's exchange, without bytes: who has sent what to whom by when, who reduces, and when all spans are there.

A sender's upload takes its size over its upload rate, and counts at every reducer on its side of a partition once it is
through. A reducer reports when everybody is complete, or when the plan's time is up. Spans are there once every reducer
has served its own; one that dies before that leaves all others without it.
"""

from typing import TYPE_CHECKING

from hivegrpo.coordinator.simulation.sequencer import Told
from hivegrpo.coordinator.simulation.stubs import SIGNATURE, span_root, state_root
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import TURNS, draw
from hivegrpo.protocol.coefficients import norm_bytes

if TYPE_CHECKING:
    from hivegrpo.coordinator.simulation.peer import SimulatedPeer
    from hivegrpo.coordinator.simulation.world import World

CHUNK_BYTES = 16_896
"""An encoded chunk, in mxint8."""

STEP_SECONDS = 0.5
"""Decoding, the step and its root."""


class Exchange:
    """What happens between the peers of a plan's roster."""

    def __init__(self, plan: Told, world: "World") -> None:
        assert isinstance(plan.message, pb.RoundPlan)
        self.plan = plan.message
        self.digest = plan.digest
        self.seal_digest = b""
        self.roster = {contributor.peer: contributor.root for contributor in self.plan.contributors}
        self._world = world
        self._reducers = {reducer.peer: index for index, reducer in enumerate(self.plan.reducers)}
        self._chunks = sum(reducer.chunks for reducer in self.plan.reducers)
        self._began: dict[str, int] = {}
        """Peers that take part, with the life in which they do."""
        self._sent: dict[str, tuple[float, int]] = {}
        """Seconds that a sender's upload took, and the side that it was on."""
        self._reporting: dict[str, SimulatedPeer] = {}
        """Reducers that have not reported yet."""
        self._report: tuple[tuple[int, int], bytes] = ((0, 0), b"")
        """The newest report that was made, by how many have sent, and the side."""
        self._served: dict[str, float] = {}
        """Seconds that a reducer took to serve its span."""
        self._waiting: list[tuple[SimulatedPeer, int]] = []
        """Peers that know the seal, and wait for the spans."""
        self._vote: tuple[bytes, bytes] | None = None
        """Payload of the vote, and the root in it."""
        self._whole: bool | None = None
        """Whether the sealed have all sent: a liar's report may say so where it is not."""
        self._audits: dict[str, list[tuple[int, float]]] | None = None

    def is_current(self) -> bool:
        """Whether reports of this attempt may still matter."""
        return self._world.newest_plan == self.digest

    def begin(self, peer: "SimulatedPeer") -> None:
        """A peer of the roster knows the plan: it sends, and reduces if that is its job."""
        if self._began.get(peer.name) == peer.life:
            return
        self._began[peer.name] = peer.life
        world, index = self._world, self._reducers.get(peer.name)
        own = self.plan.reducers[index].chunks if index is not None else 0
        seconds = CHUNK_BYTES * (self._chunks - own) / peer.upload
        while world.network.loses():
            seconds += 0.5
        world.scheduler.after(seconds + world.network.delay(), self._send, peer, peer.life, seconds)
        if index is not None:
            self._reporting[peer.name] = peer
            world.scheduler.after(self.plan.exchange_seconds, self._report_at_last, peer, peer.life)
            self._report_if_complete()

    def seal(self, peer: "SimulatedPeer", told: Told) -> None:
        """A peer that takes part knows the seal."""
        if self._began.get(peer.name) != peer.life:
            return
        self.seal_digest = told.digest
        world, index = self._world, self._reducers.get(peer.name)
        if index is not None and peer.name not in self._served:
            assert isinstance(told.message, pb.Seal)
            if self._whole is None:
                self._whole = all(item.peer in self._sent for item in told.message.contributors)
            if self._whole and peer.serves(self):
                size = CHUNK_BYTES * self.plan.reducers[index].chunks
                seconds = size * (len(self.roster) - 1) / peer.upload
                half = self.plan.step_seconds / 2  # then others pass it on
                measured = seconds if seconds < half else 0.0
                world.scheduler.after(min(seconds, half), self._serve, peer, peer.life, measured)
        self._waiting.append((peer, peer.life))
        if self._vote is not None:
            self._let_vote()

    def audits_of(self, auditor: str, seed: bytes) -> list[tuple[int, float]]:
        """The spans that a peer audits, and after how many seconds: drawn once for all."""
        if self._audits is None:
            self._audits = {}
            for drawn in draw(self.plan, seed, self._world.config.averaging.audit_rate):
                for rank, peer in enumerate(drawn.order[: drawn.needed + TURNS]):
                    begins = drawn.starts(rank, self.plan.audit_seconds)
                    self._audits.setdefault(peer, []).append((drawn.span, begins))
        return self._audits.get(auditor, [])

    def span_root(self, index: int) -> bytes:
        """What the rule makes of a span."""
        return span_root(self.digest, self.seal_digest, index)

    def _send(self, peer: "SimulatedPeer", life: int, seconds: float) -> None:
        if peer.life == life:
            self._sent.setdefault(peer.name, (seconds, peer.side))
            self._report_if_complete()

    def _report_if_complete(self) -> None:
        if len(self._sent) == len(self.roster):
            reporting, self._reporting = self._reporting, {}
            for reducer in reporting.values():
                if self._began[reducer.name] == reducer.life:
                    reducer.sender_report(self, self._report_of(reducer.side))

    def _report_at_last(self, reducer: "SimulatedPeer", life: int) -> None:
        if reducer.life == life and self._reporting.pop(reducer.name, None) is not None:
            reducer.sender_report(self, self._report_of(reducer.side))

    def _report_of(self, side: int) -> bytes:
        """All reducers of a side see the same: made once."""
        state = (len(self._sent), side)
        if self._report[0] != state:
            complete = [
                pb.Complete(peer=name, norm_squared=self._norm(name), seconds=seconds)
                for name, (seconds, sender_side) in sorted(self._sent.items())
                if sender_side == side
            ]
            report = pb.SenderReport(plan=self.digest, complete=complete)
            self._report = state, report.SerializeToString(deterministic=True)
        return self._report[1]

    def _norm(self, name: str) -> bytes:
        return norm_bytes((1 << 280) + (int.from_bytes(self.roster[name][:4], "big") << 249))

    def _serve(self, reducer: "SimulatedPeer", life: int, seconds: float) -> None:
        if reducer.life != life:
            return
        self._served[reducer.name] = seconds
        if len(self._served) == len(self._reducers):
            self._vote = self._make_vote()
            self._let_vote()

    def _make_vote(self) -> tuple[bytes, bytes]:
        root = state_root(self._world.root_of(self.plan.version - 1), self.digest, self.seal_digest)
        vote = pb.StepReport(
            version=self.plan.version,
            plan=self.digest,
            seal=self.seal_digest,
            spans=[
                pb.Blob(root=self.span_root(index), size=CHUNK_BYTES * reducer.chunks)
                for index, reducer in enumerate(self.plan.reducers)
            ],
            state_root=root,
            receipts=[SIGNATURE] * len(self.plan.reducers),
            seconds=[self._served[reducer.peer] for reducer in self.plan.reducers],
        )
        return vote.SerializeToString(deterministic=True), root

    def _let_vote(self) -> None:
        waiting, self._waiting = self._waiting, []
        for peer, life in waiting:
            seconds = self._world.network.delay() + STEP_SECONDS
            self._world.scheduler.after(seconds, self._step, peer, life)

    def _step(self, peer: "SimulatedPeer", life: int) -> None:
        if peer.life == life:
            assert self._vote is not None
            peer.vote(self, *self._vote)
