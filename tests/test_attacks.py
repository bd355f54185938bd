"""One hostile participant against a run: what it sends is well formed, and nobody exits, hangs or counts too much."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from support.invariants import assert_invariants
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config
from support.scripted import Node as ScriptedNode
from support.scripted import ScriptedPeer, is_version
from support.scripted import run as run_scripted
from support.swarm import Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.peer.daemon import _join
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.peer.swarm.sync import Synchroniser
from hivegrpo.peer.swarm.versions import Versions
from hivegrpo.protocol import blobs, merkle
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobfetch import fetch_blob
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.checks import MAX_ADDRESSES, MAX_METRIC, check_addresses, check_seal
from hivegrpo.protocol.envelope import parse, sign
from hivegrpo.protocol.errors import ChainError, CommitmentError, FrameError, StaleError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import fp32_bits
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

VALUES = 40_000


def make_swarm(folder: Path, **timing: float) -> Swarm:
    config = small_config(run={"start_peers": 3, "versions": 2}, timing=timing)
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def test_metrics_cannot_overflow_the_manifest(tmp_path: Path) -> None:
    """A manifest with an infinite mean would be signed, logged, and refused by everyone, at each restart again."""

    async def scenario() -> None:
        node = ScriptedNode(tmp_path / "coordinator", MemoryNetwork(), run={"versions": 1})
        peers = [ScriptedPeer(node, mute={"Lease"}) for _ in range(3)]
        async with node.running(), peers[0].online(), peers[1].online(), peers[2].online():
            for peer in peers:
                lease = await peer.until(lambda message: isinstance(message, pb.Lease))
                assert isinstance(lease, pb.Lease)
                contribution = pb.Contribution(
                    lease=lease.id, version=0, used=range(lease.count), weight=4 * lease.count, root=bytes(32)
                )
                contribution.metrics["reward"] = 1e308
                assert "metric" in (await peer.report(contribution)).reason
                contribution.metrics["reward"] = -MAX_METRIC
                assert (await peer.report(contribution)).accepted
            manifest = await peers[0].until(is_version(1))
            assert isinstance(manifest, pb.VersionManifest)
            assert manifest.metrics["reward"] == pytest.approx(-MAX_METRIC)

    run_scripted(scenario())


def test_the_weight_is_bound_by_what_is_used() -> None:
    machine = Machine()
    machine.start()
    peer = machine.peers[0]
    lease = machine.lease(peer)
    one = machine.contribution(peer, returned=range(1, lease.count))
    one.weight = lease.max_weight // lease.count + 1
    with pytest.raises(FrameError, match="weight"):
        machine.report(peer, one)
    one.weight -= 1
    assert machine.report(peer, one).accepted


def test_a_reducer_that_denies_all_others_loses_that_job_and_no_contribution_is_lost() -> None:
    machine = Machine()
    machine.start()
    machine.contribute(*machine.peers)
    liar, *honest = machine.peers
    for peer in honest:
        machine.senders(peer, *machine.peers)
    machine.senders(liar, liar)
    assert [event.culprits for event in machine.of(ev.AttemptFailed)] == [(liar,)]
    assert [reducer.peer for reducer in machine.plan.reducers] == honest
    machine.exchange()
    machine.vote(*machine.peers)
    assert [contributor.peer for contributor in machine.manifest.contributors] == machine.peers
    machine.check_replay()


def test_a_reducer_that_withholds_its_span_does_not_hold_up_the_run() -> None:
    machine = Machine(timing={"max_attempts": 50})
    machine.start()
    machine.contribute(*machine.peers)
    hostile, *honest = machine.peers
    while machine.state.version == 0:
        machine.exchange()
        if all(reducer.peer != hostile for reducer in machine.plan.reducers):
            machine.vote(*honest)
        machine.wait(30)
    assert machine.manifest.version == 1
    machine.check_replay()


def nobody_complete(identity: Identity, run_id: str, times: int) -> Callable[[Transport], Transport]:
    """A reducer that says, `times` times, that no sender is complete."""

    def wrap(transport: Transport) -> Transport:
        call, left = transport.call, times

        async def calling(peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
            nonlocal left
            signed = parse(pb.Signed, request)
            if signed.type == "SenderReport" and left:
                left -= 1
                report = pb.SenderReport(plan=parse(pb.SenderReport, signed.payload).plan)
                request = sign(identity, run_id, report).SerializeToString()
            return await call(peer_id, name, request, timeout)

        transport.call = calling  # type: ignore[method-assign]  # the fault
        return transport

    return wrap


def test_peers_whose_round_was_abandoned_in_the_exchange_take_the_next_lease(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, max_attempts=2)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in ("a", "b", "c"):  # all lie, so that no attempt can go on without the liars
            identity = swarm.identities.setdefault(name, Identity.generate())
            await swarm.start_peer(name, IntegerLearner(VALUES), nobody_complete(identity, swarm.run_id, times=2))
        async with asyncio.timeout(30):
            await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    asyncio.run(scenario())
    assert ChainFile.open(swarm.peer_home("a")).chain.height == 2
    assert_invariants(swarm)


def test_a_holder_with_another_run_costs_a_late_peer_nothing(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path)
    other = make_swarm(tmp_path / "other")

    async def scenario(source: str) -> None:
        network = MemoryNetwork()
        late, holder, coordinator = (network.join(key) for key in (LATE, Identity.generate(), COORD))
        await serve_chain(holder, Chain(other.run, other.coordinator_identity.peer_id))
        if source == "coordinator":
            await serve_chain(coordinator, Chain(other.run, other.coordinator_identity.peer_id))
        home = tmp_path / source
        chainfile = ChainFile.create(home, swarm.run, swarm.coordinator_identity.peer_id)
        versions = Versions(home, chainfile, BlobStore(home / "blobs"), swarm.config)
        sharing = Sharing(late, LATE, swarm.run_id, coordinator.peer_id, versions.store)
        sharing.directory.learn([pb.Endpoint(peer=holder.peer_id, addresses=holder.addresses())])
        await late.connect(holder.addresses())
        await late.connect(coordinator.addresses())
        with ThreadPoolExecutor(max_workers=1) as worker:
            await Synchroniser(versions, late, sharing, worker).run()

    COORD, LATE = swarm.coordinator_identity, Identity.generate()
    asyncio.run(scenario("peer"))
    with pytest.raises(ChainError, match="another run"):
        asyncio.run(scenario("coordinator"))


def test_a_plan_with_other_terms_than_the_runs_is_not_worked_on(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path)
    identity = swarm.coordinator_identity
    chainfile = ChainFile.create(tmp_path / "peer", swarm.run, identity.peer_id)
    versions = Versions(tmp_path / "peer", chainfile, BlobStore(tmp_path / "peer" / "blobs"), swarm.config)
    state = pb.Blob(root=versions.state_root, size=8)
    genesis = pb.VersionManifest(version=0, parent=chainfile.chain.manifest.digest, state=state)
    head = versions.extend(pb.ChainEntry(manifest=sign(identity, swarm.run_id, genesis))).manifest
    plan = pb.RoundPlan(codec="mxint8", rule="mean", values=versions.values, parent=head.digest)
    versions.check_plan(plan)
    wrong: list[dict[str, Any]] = [{"codec": "zip"}, {"rule": "max"}, {"values": 1}, {"parent": bytes(32)}]
    for fields in wrong:
        changed = pb.RoundPlan()
        changed.CopyFrom(plan)
        for name, value in fields.items():
            setattr(changed, name, value)
        with pytest.raises(StaleError):
            versions.check_plan(changed)


def test_a_holder_that_stalls_does_not_take_the_others_time(tmp_path: Path) -> None:
    async def stall(_: Stream) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        network = MemoryNetwork()
        asking, slow, good = (network.join(Identity.generate()) for _ in range(3))
        store = BlobStore(tmp_path / "good")
        ref = store.add_bytes(b"content")
        await slow.serve_stream("blob", stall)
        await serve_blobs(good, store)
        for holder in (slow, good):
            await asking.connect(holder.addresses())
        await fetch_blob(asking, ref, [slow.peer_id, good.peer_id], BlobStore(tmp_path / "mine"))
        for node in (asking, slow, good):
            await node.close()

    asyncio.run(scenario())


def test_a_seal_cannot_weigh_a_contribution_more_than_whole() -> None:
    plan = pb.RoundPlan(contributors=[pb.Contributor(peer="a", weight=1)])
    check_seal(pb.Seal(plan=bytes(32), contributors=[pb.Sealed(peer="a", coefficient=fp32_bits(1.0))]), plan)
    for coefficient in (1.5, -0.5, 1e30):
        seal = pb.Seal(plan=bytes(32), contributors=[pb.Sealed(peer="a", coefficient=fp32_bits(coefficient))])
        with pytest.raises(FrameError, match="coefficient"):
            check_seal(seal, plan)


def test_a_proof_is_made_of_hashes() -> None:
    leaf, sibling = merkle.leaf_hash(b"x"), bytes(64)
    root = sha256(b"\x01" + leaf + sibling).digest()
    with pytest.raises(CommitmentError, match="no hash"):
        merkle.check_range(root, 2, range(1), [leaf], [sibling])


def test_leaves_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    data = bytes(range(256)) * 8192 + b"rest"
    ref = store.add_bytes(data)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("a whole blob in memory"))
    assert store.leaves(ref) == blobs.blob_leaves(data)


def test_addresses_are_bound_in_bytes_and_a_machine_with_many_can_join() -> None:
    with pytest.raises(FrameError, match="addresses"):
        check_addresses(["\u20ac" * 100])

    class Many(MemoryNetwork):
        def address(self, peer_id: str) -> str:
            return f"/ip4/10.0.0.1/tcp/1/p2p/{peer_id}"

    async def scenario() -> pb.Join:
        transport = Many().join(Identity.generate())
        own = transport.addresses()
        transport.addresses = lambda: own * 40  # type: ignore[method-assign]  # a host with many interfaces
        coordinator = Identity.generate()
        return _join(transport, Chain(signed_run(coordinator, small_config(), VALUES), coordinator.peer_id), "")

    join = asyncio.run(scenario())
    assert len(join.addresses) == MAX_ADDRESSES
    check_addresses(join.addresses)


def test_a_flood_of_bad_reports_leaves_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        node = ScriptedNode(tmp_path / "coordinator", network)
        async with node.running() as coordinator:
            stranger = ScriptedPeer(node)
            async with stranger.connected() as transport:
                await transport.connect([network.address(node.identity.peer_id)])
                for _ in range(100):
                    await transport.call(node.identity.peer_id, "report", b"\xff")
            assert coordinator.snapshot()["rejected"]["FrameError"] == 100

    run_scripted(scenario())
    assert capsys.readouterr().out.count("rejected") <= 12
