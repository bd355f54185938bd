"""The coordinator alone: how fast it starts from a long log, and how many heartbeats it takes. See README.md.

Exits with 0 if every bar is met, with 1 if not.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from long_log import LongRun, make_run
from processes import Crew, WorkerError

from hivegrpo.coordinator import reports
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import FOLLOW, REPORT, Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.envelope import DIGEST_BYTES, PROTOCOL, open_signed, parse, run_id_of, sign
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, CallHandler, Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

START_BAR = 3.0
"""Seconds from opening the log to the first event on disk."""

MACHINE_BAR = 10_000.0
"""Heartbeats a second, their signatures not verified."""

NETWORK_BAR = 1000.0
"""Heartbeats a second over libp2p, sent at that rate: all have to be answered, as fast as they come."""

KEPT_UP = 0.99
"""Of that rate, at least, until the last answer is there."""

PEERS = 32
"""Of the run with the long log: 32 reducers, four events a peer and round."""

WORKER_SECONDS = 120.0
BATCH = 2000


@dataclass(frozen=True, slots=True)
class Bar:
    """What is asked of a figure, and the figure."""

    what: str
    found: float
    bar: float
    above: bool
    """Whether more is better."""

    @property
    def met(self) -> bool:
        return self.found >= self.bar if self.above else self.found <= self.bar

    def __str__(self) -> str:
        words = "at least" if self.above else "at most"
        return f"{'met    ' if self.met else 'NOT MET'}  {self.what}: {self.found:,.2f}, {words} {self.bar:,g}"


def measure_start(events: int, folder: Path, times: int) -> list[dict[str, Any]]:
    """Make a log of so many events, and start from copies of it, each in a new process: a start makes a snapshot."""
    begun = time.perf_counter()
    run = LongRun(folder, PEERS)
    run.write(events)
    run.log.close()
    size = {name: _size(folder / name) for name in ("events.sqlite", "events", "chain.bin")}
    print(f"{events:,} events, {run.state.version:,} versions, made in {time.perf_counter() - begun:.0f} s;", end=" ")
    print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in size.items()), flush=True)
    starts = []
    for number in range(times):
        copy = folder.with_name(f"start-{number}")
        shutil.copytree(folder, copy)
        with Crew(folder) as crew:
            starts.append(crew.start("starting.py", copy.name, copy).hear("started", WORKER_SECONDS))
        shutil.rmtree(copy)
    return starts


def hold_report(transport: Transport) -> list[CallHandler]:
    """Where what answers reports will be, so that it can be asked without a network in between."""
    held: list[CallHandler] = []
    serve_call = transport.serve_call

    async def serving(name: str, handler: CallHandler) -> None:
        await serve_call(name, handler)
        if name == REPORT:
            held.append(handler)

    transport.serve_call = serving  # type: ignore[method-assign]
    return held


async def measure_machine(folder: Path, peers: int, seconds: float) -> tuple[float, float]:
    """Heartbeats a second that the coordinator answers, of that many peers: as it is, and without verifying them."""
    network = MemoryNetwork()
    identity = Identity.generate()
    run, config = make_run(identity, peers + 1)
    run_id = run_id_of(run.payload)
    transport = network.join(identity)
    held = hold_report(transport)
    stop = asyncio.Event()
    log = EventLog(folder / LOG_FILE, run_id)
    coordinator = Coordinator(
        identity=identity,
        transport=transport,
        log=log,
        run=run,
        config=config,
        home=folder,
        blobs=BlobStore(folder / "blobs"),
    )
    serving = asyncio.create_task(coordinator.run(stop))
    joined = [await _join(network, identity.peer_id, run_id) for _ in range(peers)]
    (report,) = held
    beat = pb.Heartbeat(version=0, state="online", metrics={"tokens_per_second": 5.0})
    beats = [(sign(peer, run_id, beat).SerializeToString(), peer.peer_id) for peer in joined]
    verified = await _rate(report, beats, seconds)
    with patch.object(reports, "open_signed", partial(open_signed, verify=lambda signed, run_id: None)):
        unverified = await _rate(report, beats, seconds)
    stop.set()
    await serving
    await transport.close()
    log.close()
    return verified, unverified


async def _join(network: MemoryNetwork, coordinator: str, run_id: str) -> Identity:
    identity = Identity.generate()
    transport = network.join(identity)
    await transport.connect([network.address(coordinator)])
    stream = await transport.open_stream(coordinator, FOLLOW)
    join = pb.Join(protocol=PROTOCOL, known_answer=bytes(DIGEST_BYTES))
    await stream.send(sign(identity, run_id, join).SerializeToString())
    ack = parse(pb.Ack, await stream.receive(MAX_CALL_BYTES))
    assert ack.accepted, ack.reason
    return identity


async def _rate(report: CallHandler, beats: list[tuple[bytes, str]], seconds: float) -> float:
    """Answers a second; the event loop has its turn after each batch."""
    accepted = pb.Ack(accepted=True).SerializeToString()
    begun, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < begun + seconds or not count:
        for number in range(count, count + BATCH):
            assert await report(*beats[number % len(beats)]) == accepted
        count += BATCH
        await asyncio.sleep(0)
    return count / (now - begun)


def measure_network(folder: Path, peers: int, rate: float, seconds: float) -> dict[str, Any]:
    """Heartbeats over libp2p: a coordinator in one process, all peers in another."""
    with Crew(folder) as crew:
        serving = crew.start("swarm_coordinator.py", "coordinator", folder / "home", peers + 1, 1000, 2)
        address = serving.hear("serving", WORKER_SECONDS)["address"]
        beating = crew.start("beating_peers.py", "peers", address, peers, rate, seconds)
        beating.hear("ready", WORKER_SECONDS)
        beating.tell("go")
        return beating.hear("beaten", WORKER_SECONDS + seconds)


def show_start(starts: list[dict[str, Any]]) -> Bar:
    """Print the parts of each start."""
    for start in starts:
        rest = start["seconds"] - start["log"] - start["chain"]
        print(f"start: {start['seconds']:.2f} s: log opened and checked {start['log']:.2f},", end=" ")
        print(f"chain {start['chain']:.2f}, snapshot and the events after it {rest:.2f}", flush=True)
    return Bar("start-up, s", median(start["seconds"] for start in starts), START_BAR, above=False)


def show_machine(verified: float, unverified: float) -> Bar:
    """Print both rates."""
    print(f"heartbeats a second without a network: {unverified:,.0f}; with every signature verified {verified:,.0f}")
    return Bar("heartbeats a second into the machine", unverified, MACHINE_BAR, above=True)


def show_network(beaten: dict[str, Any], rate: float) -> Bar:
    """Print the latencies."""
    latencies = sorted(beaten["latencies"])
    answered = len(latencies) / beaten["seconds"] if latencies and not beaten["failed"] else 0.0
    if latencies:
        middle, high, last = (1e3 * latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99, 1.0))
        print(
            f"over libp2p, {rate:,.0f} sent a second: {len(latencies):,} answered, {beaten['failed']} failed;", end=" "
        )
        print(f"latency p50 {middle:.1f} ms, p99 {high:.1f} ms, longest {last:.1f} ms", flush=True)
    return Bar("heartbeats a second over libp2p", answered, KEPT_UP * rate, above=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="length of the log to start from")
    parser.add_argument("--starts", type=int, default=3, help="starts from it; the median counts")
    parser.add_argument("--peers", type=int, default=1000, help="peers whose heartbeats the machine takes")
    parser.add_argument("--nodes", type=int, default=4, help="libp2p nodes that send heartbeats")
    parser.add_argument("--rate", type=float, default=NETWORK_BAR, help="heartbeats a second that they send together")
    parser.add_argument("--seconds", type=float, default=20.0, help="for how long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if min(arguments.events, arguments.starts, arguments.peers, arguments.nodes) < 1 or arguments.rate <= 0:
        parser.error("all numbers must be positive")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            folder = Path(name)
            bars = [
                show_start(measure_start(arguments.events, folder / "long", arguments.starts)),
                show_machine(*asyncio.run(measure_machine(folder / "machine", arguments.peers, arguments.seconds / 4))),
                show_network(
                    measure_network(folder, arguments.nodes, arguments.rate, arguments.seconds), arguments.rate
                ),
            ]
    except WorkerError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(*bars, sep="\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(bar) | {"met": bar.met} for bar in bars]) + "\n")
    return 0 if all(bar.met for bar in bars) else 1


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))


if __name__ == "__main__":
    sys.exit(main())
