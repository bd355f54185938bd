"""Real processes on loopback: whole runs, and what kill -9 does to them."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.invariants import assert_invariants_of_homes
from support.processes import Machine, Process, Record, addition_config, machine
from support.runs import KEPT_VERSIONS

from hivegrpo.peer.inference.cost import Cost, cost_of
from hivegrpo.protocol.chainfile import ChainFile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FAULTY_PEER = str(Path(__file__).parent / "support" / "faulty_peer.py")


def run(folder: Path, test: Callable[[Machine], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with machine(folder) as host:
            await test(host)

    asyncio.run(scenario())


def version(number: int) -> Callable[[Record], bool]:
    return lambda record: record["kind"] == "version" and record["version"] >= number


def contributed(peer: str, after: int = 0) -> Callable[[Record], bool]:
    return lambda record: version(after)(record) and peer in record["contributors"]


async def started(coordinator: Process) -> Record:
    return await coordinator.wait_for(lambda record: record["kind"] == "started")


async def peer_id(peer: Process) -> str:
    record = await peer.wait_for(lambda record: record["kind"] == "joining")
    return str(record["peer"])


def test_peers_die_in_rollout_and_exchange_and_late_ones_join(tmp_path: Path) -> None:
    """The run goes on after each death, with one root; a peer that joins late contributes within two rounds."""
    # At ten versions a second the last two anchors, two versions apart, are gone before a joiner can ask for them.
    lasting = {"anchor_every": 20, "keep_versions": KEPT_VERSIONS}
    config = addition_config(tmp_path, run={"versions": 900, "start_peers": 3}, distribution=lasting)

    async def test(host: Machine) -> None:
        coordinator = await host.coordinator(config)
        begun = await started(coordinator)
        address = begun["address"]
        steady = [await host.peer(address, "steady"), await host.peer(address, "second")]
        victim = await host.python(FAULTY_PEER, address, str(tmp_path / "rollout"), "rollout", "3")
        assert await victim.ended() == -signal.SIGKILL
        after_rollout = coordinator.records[-1].get("version", 0)
        await coordinator.wait_for(version(max(after_rollout, 5)))

        late = await host.python(FAULTY_PEER, address, str(tmp_path / "exchange"), "exchange", "5")
        assert await late.ended() == -signal.SIGKILL
        at_death = max(record["version"] for record in coordinator.records if record["kind"] == "version")
        await coordinator.wait_for(version(at_death + 2))

        joiner = await host.peer(address, "joiner")
        name = await peer_id(joiner)
        online = await joiner.wait_for(lambda record: record["kind"] == "status" and record["state"] == "online")
        first = await coordinator.wait_for(contributed(name))
        assert first["version"] <= online["version"] + 2
        await coordinator.wait_for(version(first["version"] + 1))
        for peer in (*steady, joiner):
            peer.send(signal.SIGINT)
        assert [await peer.ended() for peer in (*steady, joiner)] == [0, 0, 0]
        coordinator.send(signal.SIGTERM)
        assert await coordinator.ended() == 0
        homes = {name: tmp_path / name for name in ("steady", "second", "rollout", "exchange", "joiner")}
        assert_invariants_of_homes(Path(begun["home"]), homes)

    run(tmp_path, test)


def test_the_coordinator_is_killed_and_the_chain_goes_on(tmp_path: Path) -> None:
    """No gap, no fork, peers rejoin by themselves, and the run ends."""
    config = addition_config(tmp_path, run={"versions": 14, "start_peers": 2})

    async def test(host: Machine) -> None:
        coordinator = await host.coordinator(config)
        begun = await started(coordinator)
        peers = [await host.peer(begun["address"], name) for name in ("a", "b")]
        await coordinator.wait_for(version(3))
        coordinator.send(signal.SIGKILL)
        assert await coordinator.ended() == -signal.SIGKILL
        killed_at = max(record["version"] for record in coordinator.records if record["kind"] == "version")

        again = await host.coordinator(config, "--exit-when-finished")
        resumed = await started(again)
        assert resumed["run_id"] == begun["run_id"]
        assert resumed["address"] == begun["address"]
        assert resumed["version"] >= killed_at
        await again.wait_for(version(14))
        assert [await peer.ended() for peer in peers] == [0, 0]
        assert await again.ended() == 0
        cost = Cost(**again.records[-1]["cost"])
        assert cost == cost_of(ChainFile.open(Path(begun["home"])).chain.entries)
        assert cost.versions == 14
        assert cost.device_seconds > 0.0
        assert_invariants_of_homes(Path(begun["home"]), {name: tmp_path / name for name in ("a", "b")})

    run(tmp_path, test)


def test_a_killed_peer_resumes_from_its_home(tmp_path: Path) -> None:
    config = addition_config(tmp_path, run={"versions": 500, "start_peers": 2})

    async def test(host: Machine) -> None:
        coordinator = await host.coordinator(config)
        begun = await started(coordinator)
        steady = await host.peer(begun["address"], "steady")
        victim = await host.peer(begun["address"], "victim")
        name = await peer_id(victim)
        await coordinator.wait_for(contributed(name, after=3))
        victim.send(signal.SIGKILL)
        await victim.ended()
        at_death = max(record["version"] for record in coordinator.records if record["kind"] == "version")
        back = await host.peer(begun["address"], "victim")
        assert await peer_id(back) == name
        await coordinator.wait_for(contributed(name, after=at_death + 2))
        for process in (steady, back, coordinator):
            process.send(signal.SIGINT)
            assert await process.ended() == 0
        assert_invariants_of_homes(Path(begun["home"]), {name: tmp_path / name for name in ("steady", "victim")})

    run(tmp_path, test)


def test_two_processes_cannot_share_a_home(tmp_path: Path) -> None:
    config = addition_config(tmp_path, run={"versions": 500, "start_peers": 2})

    async def test(host: Machine) -> None:
        coordinator = await host.coordinator(config)
        begun = await started(coordinator)
        first = await host.peer(begun["address"], "same")
        await peer_id(first)
        second = await host.peer(begun["address"], "same")
        assert await second.ended() == 75
        assert "in use by another process" in second.tail()

    run(tmp_path, test)


def test_the_second_signal_ends_a_daemon_at_once(tmp_path: Path) -> None:
    code = (
        "import asyncio\n"
        "from hivegrpo.cli.signals import StopSignals\n"
        "async def drain_for_ever():\n"
        "    stop = asyncio.Event()\n"
        "    StopSignals('this daemon').bind(stop)\n"
        "    print('{}', flush=True)\n"
        "    await stop.wait()\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(drain_for_ever())\n"
    )

    async def test(host: Machine) -> None:
        daemon = await host.python("-c", code)
        await daemon.wait_for(lambda record: True)
        daemon.send(signal.SIGINT)
        await daemon.wait_for_stderr("once more to stop at once")
        daemon.send(signal.SIGINT)
        assert await daemon.ended(10.0) == 130

    run(tmp_path, test)
