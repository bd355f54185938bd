"""What comes from the network and is wrong is dropped, counted and shown; the process stays and the run goes on."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config
from support.streams import on_stream
from support.swarm import Swarm

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.envelope import sign, sign_payload
from hivegrpo.protocol.errors import RemoteError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_FRAME_BYTES, Stream, Transport

VALUES = 40_000
STRANGER = Identity.generate()


def make_swarm(folder: Path, versions: int = 3, exchange: float = 5.0) -> Swarm:
    config = small_config(run={"start_peers": 3, "versions": versions}, timing={"exchange": exchange})
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def bad_pushes(swarm: Swarm) -> dict[str, bytes]:
    """What a coordinator's stream may carry in the worst case, by what is wrong with it."""
    coordinator, run_id = swarm.coordinator_identity, swarm.run_id
    manifest = pb.VersionManifest(version=9, parent=bytes(32), state=pb.Blob(root=bytes(32), size=8))
    tampered = sign(coordinator, run_id, manifest)
    tampered.payload = tampered.payload[:-1] + b"\x07"
    plan = pb.RoundPlan(version=1, attempt=1).SerializeToString()
    return {
        "tampered manifest": tampered.SerializeToString(),
        "unsigned plan": pb.Signed(type="RoundPlan", payload=plan, signer=coordinator.peer_id).SerializeToString(),
        "another type's signature": pb.Signed(
            type="RoundPlan",
            payload=plan,
            signer=coordinator.peer_id,
            signature=sign_payload(coordinator, run_id, "Seal", plan).signature,
        ).SerializeToString(),
        "another run's signature": sign(coordinator, "00" * 32, manifest).SerializeToString(),
        "a stranger's signature": sign(STRANGER, run_id, manifest).SerializeToString(),
        "a plan that makes no sense": sign_payload(coordinator, run_id, "RoundPlan", plan).SerializeToString(),
        "a type that is never pushed": sign(coordinator, run_id, pb.Leave()).SerializeToString(),
        "no message at all": b"\xff\xff\xff",
    }


def test_bad_pushes_are_dropped_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swarm = make_swarm(tmp_path)
    bad = bad_pushes(swarm)

    def inject(stream: Stream) -> None:
        receive, waiting, answered = stream.receive, list(bad.values()), False

        async def receiving(limit: int, timeout: float = 30.0) -> bytes:
            nonlocal answered
            if answered and waiting:
                return waiting.pop(0)
            frame = await receive(limit, timeout)
            answered = True
            return frame

        stream.receive = receiving  # type: ignore[method-assign]  # the fault

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        victim = await swarm.start_peer("victim", IntegerLearner(VALUES), wrap=on_stream("follow", inject))
        for name in ("b", "c"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        assert sum(victim.transport.rejected.values()) == len(bad)
        assert victim.transport.rejected == {"SignatureError": 5, "FrameError": 3}
        await coordinator.leave()

    run(scenario)
    assert capsys.readouterr().out.count("dropped a push") == len(bad)
    assert_invariants(swarm)


def test_chunks_that_contradict_the_commitment_cost_the_sender_its_round(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, versions=2, exchange=1.0)

    def flip_a_bit(stream: Stream) -> None:
        send, frames = stream.send, 0

        async def sending(frame: bytes | memoryview, timeout: float = 30.0) -> None:
            nonlocal frames
            frames += 1
            data = bytearray(frame)
            if frames == 2:
                data[-1] ^= 1
            await send(bytes(data), timeout)

        stream.send = sending  # type: ignore[method-assign]  # the fault

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        await swarm.start_peer("liar", IntegerLearner(VALUES), wrap=on_stream("push", flip_a_bit))
        honest = [await swarm.start_peer(name, IntegerLearner(VALUES)) for name in ("b", "c")]
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        assert all(peer.transport.rejected["CommitmentError"] >= 1 for peer in honest)
        await coordinator.leave()

    run(scenario)
    chain = ChainFile.open(swarm.peer_home("b")).chain
    liar = swarm.identities["liar"].peer_id
    assert chain.height == 2
    for entry in chain.entries[1:]:
        assert entry.plan is not None
        assert liar in {contributor.peer for contributor in entry.plan.message.contributors}
        assert liar not in {contributor.peer for contributor in entry.manifest.message.contributors}
    assert_invariants(swarm)


def test_strangers_throw_garbage_at_every_handler_and_the_run_ends_well(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, versions=4)
    streams = {"coordinator": ("follow", "chain", "blob"), "peer": ("push", "push/lane", "span", "blob", "chain")}

    async def throw(stranger: Transport, target: str, name: str) -> None:
        for frame in (b"", b"\xff" * 40, b"\x00" * 5000, bytes(MAX_FRAME_BYTES)):
            try:
                async with await stranger.open_stream(target, name) as stream:
                    await stream.send(frame)
                    while True:
                        await stream.receive(MAX_FRAME_BYTES, timeout=5)
            except RemoteError:
                continue  # refused, or ended by the other side

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        peers = [await swarm.start_peer(name, IntegerLearner(VALUES)) for name in ("a", "b", "c")]
        await swarm.committed(0)  # so that everybody serves
        stranger = swarm.network.join(STRANGER)
        await stranger.connect(coordinator.transport.addresses())
        await stranger.connect(peers[0].transport.addresses())
        await asyncio.gather(
            *(throw(stranger, coordinator.identity.peer_id, name) for name in streams["coordinator"]),
            *(throw(stranger, peers[0].identity.peer_id, name) for name in streams["peer"]),
            *(_report_garbage(stranger, coordinator.identity.peer_id) for _ in range(4)),
        )
        assert coordinator.transport.rejected
        assert peers[0].transport.rejected
        await asyncio.gather(*(peer.task for peer in peers))
        await coordinator.leave()
        await stranger.close()

    run(scenario)
    assert ChainFile.open(swarm.peer_home("a")).chain.height == 4
    assert_invariants(swarm)


async def _report_garbage(stranger: Transport, coordinator: str) -> None:
    """Reports that do not parse, or come from somebody who never joined: each is refused with a reason."""
    for report in (b"", b"\xff" * 100, sign(STRANGER, "another run", pb.Ready()).SerializeToString()):
        ack = pb.Ack.FromString(await stranger.call(coordinator, "report", report))
        assert not ack.accepted
        assert ack.reason
