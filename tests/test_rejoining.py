"""A coordinator goes away in the middle of an exchange and comes back: the attempt goes on, as far as it has come."""

import asyncio
from pathlib import Path

from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.streams import on_stream
from support.swarm import Swarm

from hivegrpo.coordinator.events import AttemptFailed
from hivegrpo.peer.swarm.session import FOLLOW
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream

VALUES = 40_000
EXCHANGE_SECONDS = 1.5


class Deaf:
    """A fault: plans do not reach a peer, for as long as it is on."""

    def __init__(self) -> None:
        self.on = True
        self.missed = asyncio.Event()

    def __call__(self, stream: Stream) -> None:
        receive = stream.receive

        async def receiving(limit: int, timeout: float | None = 30.0) -> bytes:
            frame = await receive(limit, timeout)
            while self.on and parse(pb.Signed, frame).type == "RoundPlan":
                self.missed.set()
                frame = await receive(limit, timeout)
            return frame

        stream.receive = receiving  # type: ignore[method-assign]  # the fault


async def _lose_the_coordinator(swarm: Swarm, seconds: float) -> None:
    """It dies after it has told one of two peers of the plan, and stays away for so long."""
    deaf = Deaf()
    coordinator = await swarm.start_coordinator()
    await swarm.start_peer("told", IntegerLearner(VALUES))
    await swarm.start_peer("untold", IntegerLearner(VALUES), on_stream(FOLLOW, deaf))
    await deaf.missed.wait()
    await swarm.crash(coordinator)
    await asyncio.sleep(seconds)
    deaf.on = False
    coordinator = await swarm.start_coordinator()
    await swarm.committed(1)
    await asyncio.gather(*(node.task for node in swarm.peers.values()))
    await coordinator.leave()


def test_an_exchange_waits_for_its_coordinator(tmp_path: Path) -> None:
    timing = {"exchange": EXCHANGE_SECONDS, "grace": 5.0}
    config = small_config(run={"versions": 1}, timing=timing)
    identity = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(identity, config, VALUES), identity)
    asyncio.run(asyncio.wait_for(_lose_the_coordinator(swarm, 2 * EXCHANGE_SECONDS), 40))
    assert not [event for event in swarm.events if isinstance(event, AttemptFailed)]
    assert_invariants(swarm)
