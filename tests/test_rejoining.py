"""A coordinator goes away in the middle of an exchange and comes back: the attempt goes on, as far as it has come."""

import asyncio
from pathlib import Path

import pytest
from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.streams import forever, on_stream
from support.swarm import Swarm, Wrap

from hivegrpo.coordinator.events import AttemptFailed
from hivegrpo.peer.swarm.exchange import PUSH
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.session import FOLLOW
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport

VALUES = 40_000
NAMES = ("a", "b", "c", "d")
"""In the roster's order; there are three chunks, so the last one is no reducer."""


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


def honest(transport: Transport) -> Transport:
    return transport


def mute(stream: Stream) -> None:
    stream.send = forever  # type: ignore[method-assign]  # the fault


class Bed:
    def __init__(self, folder: Path, exchange: float) -> None:
        timing = {"exchange": exchange, "grace": 5.0}
        config = small_config(run={"versions": 1, "start_peers": len(NAMES)}, timing=timing)
        identity = Identity.generate()
        self.swarm = Swarm(folder, config, signed_run(identity, config, VALUES), identity)
        keys = sorted((Identity.generate() for _ in NAMES), key=lambda key: key.peer_id)
        self.swarm.identities.update(zip(NAMES, keys, strict=True))

    def play(self, wraps: dict[str, Wrap], seconds: float) -> None:
        """A version, whose coordinator dies after it has told all but one peer of the plan, and is away for so long."""

        async def scenario() -> None:
            deaf = Deaf()
            coordinator = await self.swarm.start_coordinator()
            for name in NAMES:
                wrap = on_stream(FOLLOW, deaf) if name == "b" else wraps.get(name, honest)
                await self.swarm.start_peer(name, IntegerLearner(VALUES), wrap)
            await deaf.missed.wait()
            await asyncio.sleep(0.5)  # the others have begun
            await self.swarm.crash(coordinator)
            await asyncio.sleep(seconds)
            deaf.on = False
            coordinator = await self.swarm.start_coordinator()
            await self.swarm.committed(1)
            await asyncio.gather(*(node.task for node in self.swarm.peers.values()))
            await coordinator.leave()

        asyncio.run(asyncio.wait_for(scenario(), 40))
        assert not [event for event in self.swarm.events if isinstance(event, AttemptFailed)]
        assert_invariants(self.swarm)


def test_an_exchange_whose_time_is_up_goes_on_when_the_coordinator_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExchangeServer._find, "__defaults__", (0.2,))  # pushes do not wait at the peer that is untold
    bed = Bed(tmp_path, exchange=2.0)
    pushes: list[str] = []
    bed.play({"a": on_stream(PUSH, lambda stream: pushes.append(stream.remote))}, seconds=3.0)
    assert pushes.count(bed.swarm.identities["c"].peer_id) == 1, "what has arrived is not sent again"


def test_the_time_begins_anew_when_the_coordinator_is_back_before_it_is_up(tmp_path: Path) -> None:
    """Had reducers waited to the old end, and then as long again, they would report too late."""
    Bed(tmp_path, exchange=4.0).play({"d": on_stream(PUSH, mute)}, seconds=0.5)
