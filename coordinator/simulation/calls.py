"""How simulated reports reach the coordinator, and its answers the peers."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from hivegrpo.protocol import hivegrpo_pb2 as pb

if TYPE_CHECKING:
    from hivegrpo.coordinator.simulation.peer import SimulatedPeer
    from hivegrpo.coordinator.simulation.world import World

RETRY_SECONDS = 1.0
"""Pause before a call that failed is made again."""


class Call:
    """One report under way: the request or its answer may be lost, or the coordinator down; then it is made again."""

    __slots__ = ("_life", "_matters", "_peer", "_signed", "_taken", "_world")

    def __init__(
        self,
        peer: "SimulatedPeer",
        signed: pb.Signed,
        matters: Callable[[], bool],
        taken: Callable[[bool, str], None] | None,
        world: "World",
    ) -> None:
        self._peer = peer
        self._life = peer.life
        self._signed = signed
        self._matters = matters
        self._taken = taken
        self._world = world

    def make(self) -> None:
        """Try, unless it has ceased to matter, or the process that began it."""
        if self._life != self._peer.life or not self._matters():
            return
        world = self._world
        seconds = world.network.transit(self._peer)
        if seconds is not None:
            world.scheduler.after(seconds, self._arrive)
        else:
            world.scheduler.after(RETRY_SECONDS, self.make)

    def _arrive(self) -> None:
        self._world.sequencer.report(self._signed, self._peer.name, self._answer)

    def _answer(self, accepted: bool | None, reason: str) -> None:
        world = self._world
        if accepted is None or not world.network.carries(self._peer):
            world.scheduler.after(RETRY_SECONDS, self.make)
        elif self._taken is not None:
            world.scheduler.after(world.network.delay(), self._end, self._taken, accepted, reason)

    def _end(self, taken: Callable[[bool, str], None], accepted: bool, reason: str) -> None:
        if self._life == self._peer.life:
            taken(accepted, reason)
