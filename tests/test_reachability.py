"""Who can be dialled by strangers is found out, without scanning anybody; who cannot sends and receives only."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.beds import Bed, on_both_networks
from support.invariants import assert_invariants
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config
from support.scripted import Node, ScriptedPeer
from support.scripted import run as run_bounded
from support.swarm import Swarm

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator import prober as bounds
from hivegrpo.coordinator.prober import Prober, probed_addresses
from hivegrpo.coordinator.status import snapshot
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.dialling import GREETING, greets
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport
from hivegrpo.protocol.transport.serving import ServingTransport

PEER = Identity.generate().peer_id


def at(host: str, port: int = 4001, peer: str = PEER) -> str:
    kind = "ip6" if ":" in host else "ip4" if host[0].isdigit() else "dns"
    return f"/{kind}/{host}/tcp/{port}/p2p/{peer}"


@on_both_networks
def test_a_node_that_is_there_answers_and_one_that_is_gone_does_not(bed: Bed) -> None:
    async def scenario(server: ServingTransport, client: ServingTransport) -> None:
        nobody = at("127.0.0.1", 1)
        assert await client.probe([nobody, *server.addresses()])
        assert not await client.probe([nobody], timeout=2.0)
        await server.close()
        assert not await client.probe(server.addresses(), timeout=2.0)

    bed(scenario)


def test_a_node_behind_a_nat_is_reached_only_by_those_that_it_has_dialled() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        coordinator, hidden, other = (network.join(Identity.generate()) for _ in range(3))
        hidden.dialable = False
        await hidden.connect(coordinator.addresses())
        await coordinator.connect(hidden.addresses())
        assert not await coordinator.probe(hidden.addresses())
        network.cut(coordinator.peer_id, other.peer_id)
        assert not await coordinator.probe(other.addresses())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("says", "expected"), [(GREETING, True), (b"HTTP/1.1 400 Bad Request\r\n\r\n", False), (b"", False)]
)
def test_only_the_greeting_of_libp2p_counts(says: bytes, expected: bool) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if says:
            await writer.drain()
        writer.close()

    async def scenario() -> bool:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            return await greets(at("127.0.0.1", server.sockets[0].getsockname()[1]), 5.0)

    assert asyncio.run(scenario()) is expected


def test_who_accepts_and_says_nothing_is_not_waited_for() -> None:
    async def scenario() -> bool:
        ended = asyncio.Event()

        async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await ended.wait()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            answer = await greets(at("127.0.0.1", server.sockets[0].getsockname()[1]), 0.05)
            ended.set()
            return answer

    assert not asyncio.run(scenario())


def test_which_addresses_are_tried() -> None:
    public, private, loopback = at("9.9.9.9"), at("192.168.1.2"), at("127.0.0.1")
    assert probed_addresses(PEER, [loopback, private, public]) == [public, private], "not our own loopback"
    assert probed_addresses(PEER, [loopback]) == [loopback]
    assert len(probed_addresses(PEER, [at("9.9.9.9", port) for port in range(1, 17)])) == bounds.MOST_ADDRESSES
    others = at("9.9.9.9", peer=Identity.generate().peer_id)
    useless = [others, "nonsense", at("0.0.0.0"), at("224.0.0.1"), at("169.254.1.1"), at("::")]
    assert probed_addresses(PEER, useless) == []


def test_strangers_do_not_make_it_a_scanner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand identities, each joining again and again with other addresses."""
    monkeypatch.setattr(bounds, "SPACING", 0.0)
    monkeypatch.setattr(bounds, "RETRY_SECONDS", 0.0)
    probes: dict[str, int] = {}
    running = most = 0

    async def scenario() -> None:
        settled = asyncio.Event()
        results: list[str] = []

        async def probe(addresses: list[str], timeout: float) -> bool:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            (peer,) = {address.rpartition("/p2p/")[2] for address in addresses}
            probes[peer] = probes.get(peer, 0) + 1
            await asyncio.sleep(0)
            running -= 1
            return False

        def on_result(peer: str, addresses: tuple[str, ...], reachable: bool) -> None:
            assert not reachable
            results.append(peer)
            prober.want(peer, (at("9.9.9.9", len(results) + 1, peer),))
            if len(results) == bounds.MOST_WAITING:
                settled.set()

        prober = Prober(probe, on_result)
        task = asyncio.create_task(prober.run())
        for _ in range(bounds.MOST_WAITING + 100):
            peer = Identity.generate().peer_id
            prober.want(peer, (at("9.9.9.9", 1, peer),))
        await settled.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert most <= bounds.AT_ONCE
    assert len(probes) == bounds.MOST_WAITING, "those beyond are not probed"
    assert max(probes.values()) == 2, "one retry; a new join is not probed before its time"


def test_who_failed_the_test_is_no_reducer() -> None:
    machine = Machine()
    a, b, c = machine.peers
    machine.start()
    machine.happen(ev.PeerProbed(machine.now, a, True), ev.PeerProbed(machine.now, b, False))
    machine.contribute(a, b, c)
    assert [reducer.peer for reducer in machine.plan.reducers] == [a, c], "of c nothing is known: nobody waits for it"
    machine.exchange()
    machine.vote(a, b, c)
    assert len(machine.manifest.contributors) == 3
    machine.happen(ev.PeerProbed(machine.now, a, False), ev.PeerProbed(machine.now, c, False))
    machine.contribute(a, b, c)
    assert len(machine.plan.reducers) == 3, "if all failed, the test may be wrong"
    machine.join(b)
    assert machine.state.members[b].reachable is False, "the same addresses"
    machine.happen(ev.PeerJoined(machine.now, b, (at("9.9.9.9", peer=b),), "test"))
    assert machine.state.members[b].reachable is None
    shown = {peer["peer"]: peer["reachable"] for peer in snapshot(machine.state, {}, machine.now)["peers"]}
    assert shown == {a: False, b: None, c: False}
    machine.check_replay()


def test_joins_are_probed_and_told_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path / "coordinator", MemoryNetwork(), run={"start_peers": 9})
        peer = ScriptedPeer(node)
        async with node.running(), peer.online():
            await node.until(ev.PeerProbed(0.0, peer.peer_id, True))
        assert [record["reachable"] for record in node.records() if record["kind"] == "probed"] == [True]

    run_bounded(scenario())


def behind_a_nat(transport: Transport) -> Transport:
    assert isinstance(transport, MemoryTransport)
    transport.dialable = False
    return transport


def test_a_peer_behind_a_nat_contributes_and_costs_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "RETRY_SECONDS", 0.0)
    config = small_config(run={"start_peers": 4, "versions": 2})
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config), coordinator)

    async def scenario() -> None:
        node = await swarm.start_coordinator()
        await swarm.start_peer("hidden", IntegerLearner(40_000), behind_a_nat)
        hidden = swarm.identities["hidden"].peer_id
        await swarm.happened(lambda event: isinstance(event, ev.PeerProbed) and event.peer == hidden)
        for name in ("a", "b", "c"):
            await swarm.start_peer(name, IntegerLearner(40_000))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await node.leave()

    play(scenario)
    hidden = swarm.identities["hidden"].peer_id
    for entry in ChainFile.open(swarm.coordinator_home).chain.entries[1:]:
        assert entry.plan is not None
        assert entry.plan.message.attempt == 1
        assert hidden not in {reducer.peer for reducer in entry.plan.message.reducers}
        assert hidden in {contributor.peer for contributor in entry.manifest.message.contributors}
    assert_invariants(swarm)


def play(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())
