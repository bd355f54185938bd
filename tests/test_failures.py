"""One peer of four fails in the exchange: a version of one root follows, in this attempt or in the next one.

Four peers, three chunks, so the last peer is no reducer. Contributions are in the version or rejected with a reason,
and nothing counts twice (the invariants).
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.streams import forever, on_serving, on_stream, only_pushes
from support.swarm import Swarm, Wrap
from torch import Tensor

from hivegrpo.coordinator.events import AttemptFailed, ContributionRejected, VersionCommitted
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.exchange import SPAN, Exchange
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.volunteer import Shadow
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import open_signed, parse, sign
from hivegrpo.protocol.errors import RemoteError
from hivegrpo.protocol.history import read_history
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, StreamHandler, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

VALUES = 40_000
NAMES = ("a", "b", "c", "d")
REDUCER, SENDER = "a", "d"


class Bed:
    """A swarm of four, by name in the order of the roster."""

    def __init__(self, folder: Path, versions: int = 1) -> None:
        # Probes need more than they get here: reachability has tests of its own.
        timing = {"exchange": 1.5, "step": 6.0, "grace": 0.3}
        config = small_config(run={"start_peers": 4, "versions": versions}, timing=timing)
        coordinator = Identity.generate()
        self.swarm = Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)
        keys = sorted((Identity.generate() for _ in NAMES), key=lambda key: key.peer_id)
        self.swarm.identities.update(zip(NAMES, keys, strict=True))
        self.dead: set[str] = set()
        self.killing: set[asyncio.Task[None]] = set()

    def peer(self, name: str) -> str:
        return self.swarm.identities[name].peer_id

    def kill(self, name: str) -> None:
        """As `kill -9` does, from within one of its own tasks."""
        if name not in self.dead:
            self.dead.add(name)
            task = asyncio.get_running_loop().create_task(self.swarm.crash(self.swarm.peers[name]))
            self.killing.add(task)

    def play(self, faults: dict[str, Wrap], during: Callable[[], Awaitable[None]] | None = None) -> None:
        async def scenario() -> None:
            async with asyncio.timeout(40):
                coordinator = await self.swarm.start_coordinator()
                for name in NAMES:
                    await self.swarm.start_peer(name, IntegerLearner(VALUES), faults.get(name))
                if during is not None:
                    await during()
                await self.swarm.committed(self.swarm.config.run.versions)
                alive = [node.task for name, node in self.swarm.peers.items() if name not in self.dead]
                await asyncio.gather(*alive, *self.killing)
                await coordinator.leave()

        asyncio.run(scenario())
        assert_invariants(self.swarm)

    def version(self, version: int = 1) -> tuple[int, set[str], set[str]]:
        """Of a committed version: number of its attempt, names of its reducers and of its contributors."""
        entry = ChainFile.open(self.swarm.coordinator_home).chain.entries[version]
        assert entry.plan is not None
        names = {key.peer_id: name for name, key in self.swarm.identities.items()}
        reducers = {names[reducer.peer] for reducer in entry.plan.message.reducers}
        return (
            entry.plan.message.attempt,
            reducers,
            {names[contributor.peer] for contributor in entry.manifest.message.contributors},
        )

    def rejected(self) -> dict[str, str]:
        """Reasons by peer."""
        return {event.peer: event.reason for event in self.swarm.events if isinstance(event, ContributionRejected)}

    def culprits(self) -> list[tuple[str, ...]]:
        return [event.culprits for event in self.swarm.events if isinstance(event, AttemptFailed)]


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def after_the_header(then: Callable[[], Awaitable[None]]) -> Wrap:
    """A fault in the pushes of a peer: `then`, in place of the first chunk."""

    def change(stream: Stream) -> None:
        send, frames = stream.send, 0

        async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
            nonlocal frames
            frames += 1
            if frames == 2:
                await then()
            await send(frame, timeout)

        stream.send = sending  # type: ignore[method-assign]  # the fault

    return on_stream("push", change)


def test_a_slow_sender_is_left_out_of_the_same_attempt(bed: Bed) -> None:
    bed.play({SENDER: after_the_header(forever)})
    assert bed.version() == (1, {"a", "b", "c"}, {"a", "b", "c"})
    assert bed.rejected().keys() == {bed.peer(SENDER)}


def test_a_dead_sender_is_left_out_of_the_same_attempt(bed: Bed) -> None:
    async def die() -> None:
        bed.kill(SENDER)
        await forever()

    bed.play({SENDER: after_the_header(die)})
    assert bed.version() == (1, {"a", "b", "c"}, {"a", "b", "c"})
    assert bed.rejected().keys() == {bed.peer(SENDER)}


def test_a_reducer_that_dies_before_it_reports_is_not_in_the_next_attempt(bed: Bed) -> None:
    def dying(_: StreamHandler) -> StreamHandler:
        async def handler(_: Stream) -> None:
            bed.kill(REDUCER)
            await forever()

        return handler

    bed.play({REDUCER: on_serving("push", dying)})
    assert bed.version() == (2, {"b", "c", "d"}, {"b", "c", "d"})
    assert bed.culprits() == [(bed.peer(REDUCER),)]
    assert bed.rejected() == {bed.peer(REDUCER): "peer lost"}


def serving_spans(change: Callable[[StreamHandler], StreamHandler]) -> Wrap:
    """A fault in how spans are served, all of them on streams of their own."""
    return lambda transport: on_serving("span", change)(on_serving("push", only_pushes)(transport))


def test_a_reducer_that_dies_after_its_report_is_not_in_the_next_attempt(bed: Bed) -> None:
    def dying(_: StreamHandler) -> StreamHandler:
        async def handler(_: Stream) -> None:
            bed.kill(REDUCER)
            await forever()

        return handler

    bed.play({REDUCER: serving_spans(dying)})
    assert bed.version() == (2, {"b", "c", "d"}, {"b", "c", "d"})
    assert bed.culprits() == [(bed.peer(REDUCER),)]


@pytest.mark.parametrize("served", ["b", "d"])
def test_a_reducer_that_dies_after_serving_one_peer_costs_no_attempt(bed: Bed, served: str) -> None:
    """Whether that one is another reducer or not: the others have its span from there."""

    def dying(handler: StreamHandler) -> StreamHandler:
        async def serve(stream: Stream) -> None:
            if stream.remote != bed.peer(served):
                await forever()
            await handler(stream)
            await stream.close()
            bed.kill(REDUCER)

        return serve

    bed.play({REDUCER: serving_spans(dying)})
    assert bed.version() == (1, {"a", "b", "c"}, {"a", "b", "c", "d"})
    assert bed.culprits() == []


def test_a_peer_without_a_span_says_so_at_once() -> None:
    """Otherwise two would wait for each other, and a third that has the span would not be asked."""

    async def scenario() -> None:
        network, key, run_id = MemoryNetwork(), Identity.generate(), "00" * 32
        other = Identity.generate().peer_id
        plan = pb.RoundPlan(
            codec="fp32", values=1, step_seconds=3600.0, reducers=[pb.Reducer(peer=other, first=0, chunks=1)]
        )
        opened = open_signed(sign(key, run_id, plan), run_id, pb.RoundPlan, key.peer_id)
        transport, asking = network.join(key), network.join(other)
        with ThreadPoolExecutor(1) as worker:
            exchange = Exchange(
                opened,
                EncodedVector((b"",)),
                identity=key,
                run_id=run_id,
                directory=Directory(transport),
                worker=worker,
            )
            server = ExchangeServer()
            await server.start(transport)
            await server.add(exchange)
            await asking.connect(transport.addresses())
            async with asyncio.timeout(20), await asking.open_stream(key.peer_id, SPAN) as stream:
                await stream.send(pb.SpanRequest(plan=opened.digest, span=0).SerializeToString())
                with pytest.raises(RemoteError, match="ended"):
                    await stream.receive(1000)
        await transport.close()
        await asking.close()

    asyncio.run(scenario())


def test_a_reducer_that_serves_one_peer_and_keeps_the_rest_waiting_costs_no_attempt(bed: Bed) -> None:
    def stalling(handler: StreamHandler) -> StreamHandler:
        async def serve(stream: Stream) -> None:
            if stream.remote != bed.peer("b"):
                await forever()
            await handler(stream)

        return serve

    bed.play({REDUCER: serving_spans(stalling)})
    assert bed.version() == (1, {"a", "b", "c"}, {"a", "b", "c", "d"})


@pytest.mark.parametrize("name", [SENDER, REDUCER])
def test_a_peer_that_is_behind_at_the_commit_ends_its_attempt_and_fetches_nothing_twice(bed: Bed, name: str) -> None:
    """Its spans come once the others have their version: it steps on them, as its vote in its history shows."""
    fetched = []

    def late(stream: Stream) -> None:
        receive, frames = stream.receive, 0

        async def receiving(limit: int, timeout: float | None = 30.0) -> bytes:
            nonlocal frames
            frames += 1
            if frames == 2:  # the first is the Ack of the push
                await bed.swarm.committed(1)
            return await receive(limit, timeout)

        stream.receive = receiving  # type: ignore[method-assign]  # the fault

    def noting(transport: Transport) -> Transport:
        return on_stream("span", fetched.append)(on_stream("blob", fetched.append)(on_stream("push", late)(transport)))

    bed.play({name: noting})
    assert bed.version() == (1, {"a", "b", "c"}, {"a", "b", "c", "d"})
    history = read_history(PeerHome(bed.swarm.peer_home(name)).history)
    kinds = [record["kind"] for record in history if record.get("version") == 1]
    assert kinds[-2:] == ["vote", "version"]
    assert fetched == []


def test_a_peer_whose_catching_up_failed_does_not_learn_from_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the chain then, and has voted for the version, but does not hold it."""
    bed, doubting, failing = Bed(tmp_path, versions=2), [True], [True]
    learnt: dict[int, set[bytes]] = {}

    def noting(self: IntegerLearner, version: int, vector: Tensor) -> None:
        learnt.setdefault(version, set()).add(vector.numpy().tobytes())
        load(self, version, vector)

    load, is_made_by, run = IntegerLearner.load, Shadow.is_made_by, Synchroniser.run

    def doubted_once(self: Shadow, manifest: pb.VersionManifest) -> bool:
        return not (doubting and doubting.pop()) and is_made_by(self, manifest)

    async def failing_once(self: Synchroniser) -> None:
        if not doubting and failing:
            failing.pop()
            await self._extend()
            raise RemoteError("nobody has it now")
        await run(self)

    monkeypatch.setattr(IntegerLearner, "load", noting)
    monkeypatch.setattr(Shadow, "is_made_by", doubted_once)
    monkeypatch.setattr(Synchroniser, "run", failing_once)
    bed.play({})
    assert not failing
    assert bed.version(2)[2] == set(NAMES)
    assert {version: len(vectors) for version, vectors in learnt.items()} == {0: 1, 1: 1}


def test_a_peer_that_stops_reading_is_no_reducer_in_the_next_attempt(bed: Bed) -> None:
    bed.play({REDUCER: on_serving("push", lambda _: forever)})
    assert bed.version() == (2, {"b", "c", "d"}, {"a", "b", "c", "d"})
    assert bed.culprits() == [(bed.peer(REDUCER),)]
    assert bed.rejected() == {}


def test_a_partition_costs_one_attempt_and_heals(tmp_path: Path) -> None:
    bed = Bed(tmp_path, versions=3)
    network = bed.swarm.network

    async def cut_then_heal() -> None:
        await bed.swarm.committed(0)
        network.partition([bed.peer(REDUCER)], [bed.peer(name) for name in NAMES if name != REDUCER])
        await bed.swarm.committed(1)
        network.heal()

    bed.play({}, cut_then_heal)
    assert bed.version() == (2, {"b", "c", "d"}, {"b", "c", "d"})
    assert bed.culprits()[0] == (bed.peer(REDUCER),)
    versions = [parse(pb.VersionManifest, e.payload) for e in bed.swarm.events if isinstance(e, VersionCommitted)]
    assert [manifest.version for manifest in versions] == [0, 1, 2, 3]
    heights = {name: ChainFile.open(bed.swarm.peer_home(name)).chain.height for name in NAMES}
    assert heights == dict.fromkeys(NAMES, 3), "whoever was cut off has caught up"
