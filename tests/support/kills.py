"""A run on loopback, of real processes, whose coordinator is killed at random writes again and again."""

import math
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hivegrpo.protocol.chainfile import ENTRIES_FILE, count_entries
from support.crashes import whole_entries
from support.invariants import assert_invariants_of_homes
from support.processes import Machine, Process, Record, addition_config, machine

FAULTY_COORDINATOR = str(Path(__file__).parent / "faulty_coordinator.py")
PEERS = ("a", "b")
MOMENTS = 250
"""About two rounds have so many."""

EARLY_MOMENTS = 60
"""From the start of a coordinator to its first commit, about."""

PATIENCE = 60.0


@dataclass
class Kill:
    """A death, and what came after it."""

    moment: str
    version: int
    """Of the chain that it left."""
    seconds: float = math.inf
    """From the launch of the next coordinator that was let live so long, to its first commit."""


class Killing:
    """A run's coordinators, one after the other."""

    def __init__(self, host: Machine, config: Path, home: Path) -> None:
        self.kills: list[Kill] = []
        self._host = host
        self._arguments = ("coordinator", "run", "--config", str(config), "--host", "127.0.0.1", "--json")
        self._chain = home / ENTRIES_FILE

    async def live(self, since: str, count: int) -> None:
        """One that is killed at the `count`-th moment since its "start", or since its first "commit"."""
        launched, before = time.monotonic(), whole_entries(self._chain)
        process = await self._host.python(FAULTY_COORDINATOR, since, str(count), *self._arguments)
        if since == "commit":
            await self._commit(process, launched, before)
        assert await process.ended(PATIENCE) == -signal.SIGKILL, process.tail()
        after = whole_entries(self._chain)
        assert after.startswith(before), "the chain has changed"
        moment = next(line for line in process.lines if line.startswith("killed"))
        self.kills.append(Kill(moment, count_entries(self._chain.parent) - 1))

    async def live_on(self) -> Process:
        """One that is not killed, after its first commit."""
        launched, before = time.monotonic(), whole_entries(self._chain)
        process = await self._host.hivegrpo(*self._arguments)
        await self._commit(process, launched, before)
        assert whole_entries(self._chain).startswith(before), "the chain has changed"
        return process

    async def _commit(self, process: Process, launched: float, before: bytes) -> None:
        version = count_entries(self._chain.parent)
        try:
            await process.wait_for(is_version(version), PATIENCE)
        except AssertionError:
            if whole_entries(self._chain) == before:
                raise  # else it was killed before it could say so
        for kill in self.kills:
            if kill.seconds == math.inf:
                kill.seconds = time.monotonic() - launched


def is_version(version: int) -> Callable[[Record], bool]:
    return lambda record: record["kind"] == "version" and record["version"] >= version


async def kill_often(folder: Path, seed: int, points: int, show: Callable[[str], None]) -> list[Kill]:
    """Kill the coordinator at so many writes; AssertionError if the chain or a contribution does not survive it.

    A third of its lives is cut short before the first commit, about; the next one gets that far.
    """
    chance = random.Random(seed)
    config = addition_config(folder, run={"versions": 1000, "start_peers": len(PEERS)})
    async with machine(folder) as host:
        coordinator = await host.coordinator(config)
        begun = await coordinator.wait_for(lambda record: record["kind"] == "started")
        peers = [await host.peer(begun["address"], name) for name in PEERS]
        await coordinator.wait_for(is_version(1))
        coordinator.send(signal.SIGKILL)
        await coordinator.ended()
        killing = Killing(host, config, Path(begun["home"]))
        since = "commit"
        try:
            for number in range(points):
                since = "start" if since == "commit" and chance.random() < 0.5 else "commit"
                await killing.live(since, chance.randint(1, EARLY_MOMENTS if since == "start" else MOMENTS))
                show(f"{number + 1}: {killing.kills[-1].moment}, at version {killing.kills[-1].version}")
            coordinator = await killing.live_on()
        except AssertionError as error:
            tails = (f"peer {name}: {peer.tail()}" for name, peer in zip(PEERS, peers, strict=True))
            raise AssertionError("\n".join((str(error), *tails))) from error
        for process in (*peers, coordinator):
            process.send(signal.SIGINT)
            assert await process.ended() == 0, process.tail()
    assert_invariants_of_homes(Path(begun["home"]), {name: folder / name for name in PEERS})
    return killing.kills
