"""How long the light client takes to fetch, verify and keep a chain, in a process without torch and hivemind.

A chain is signed beforehand. Then a fresh process reads it as `hivegrpo watch --once` does, through the in-memory
network and into an empty home, and says how long that took, and what it has imported. Exits with 0 if every bar is met.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BAR_SECONDS = 2.0
HEAVY = ("torch", "hivemind", "transformers", "numpy")
SECONDS = 300.0
"""For one process."""


def make(home: Path, versions: int, peers: int) -> str:
    """Sign a chain of that many versions after version 0, and write it down; its coordinator."""
    from support.chains import ChainMaker

    from hivegrpo.protocol.chainfile import ChainFile

    maker = ChainMaker(peers=peers, reducers=peers, versions=versions)
    file = ChainFile.create(home, maker.run, maker.identity.peer_id)
    for version in range(versions + 1):
        file.take(maker.entry(version))
    file.flush()
    return maker.identity.peer_id


async def read(home: Path, empty: Path, coordinator: str) -> dict[str, object]:
    """What a fresh client makes of the chain in `home`."""
    from hivegrpo.cli.launch_watch import watch
    from hivegrpo.protocol.chain import Chain
    from hivegrpo.protocol.chainfile import ChainFile
    from hivegrpo.protocol.chainstream import serve_chain
    from hivegrpo.protocol.transport.memory import MemoryNetwork

    chain: Chain = ChainFile.open(home).chain
    network = MemoryNetwork()
    server, client = network.join(coordinator), network.join("watcher")
    await serve_chain(server, chain)
    records: list[dict[str, object]] = []
    began, worked = time.perf_counter(), time.process_time()
    await watch(client, network.address(coordinator), records.append, sleep=asyncio.sleep, home=empty, once=True)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    return {
        "versions": chain.height,
        "verified": records[-1]["version"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes": (empty / "chain.bin").stat().st_size,
        "imported": sorted(set(HEAVY) & set(sys.modules)),
    }


def measure(versions: int, peers: int) -> dict[str, object]:
    """One figure, from a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        home, empty = Path(scratch, "served"), Path(scratch, "kept")
        coordinator = make(home, versions, peers)
        command = [sys.executable, __file__, "--read", str(home), str(empty), coordinator]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        figures: dict[str, object] = json.loads(done.stdout)
        return {"peers": peers, **figures}


def _line(figures: dict[str, object]) -> str:
    heavy = figures["imported"] or "none"
    return (
        f"{figures['verified']} versions of {figures['peers']} contributors: {figures['seconds']:.2f} s, "
        f"{figures['bytes']:,} bytes kept; imported of {', '.join(HEAVY)}: {heavy}"
    )


def main() -> None:
    """The bar, and what the size of a roster does to it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--peers", type=int, nargs="+", default=[3, 8, 32], help="contributors, all of them reducers")
    parser.add_argument("--json", action="store_true", help="one object a line, and nothing else")
    parser.add_argument("--read", nargs=3, metavar=("HOME", "EMPTY", "COORDINATOR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        home, empty, coordinator = arguments.read
        print(json.dumps(asyncio.run(read(Path(home), Path(empty), coordinator))))
        return
    if not arguments.json:
        print(f"load before: {os.getloadavg()[0]:.1f}")
    met = True
    for peers in arguments.peers:
        figures = measure(arguments.versions, peers)
        print(json.dumps(figures) if arguments.json else _line(figures), flush=True)
        met &= not figures["imported"] and figures["verified"] == arguments.versions
        if peers <= 8:
            met &= float(str(figures["seconds"])) < BAR_SECONDS
    if not arguments.json:
        print(f"bar, up to 8 contributors: below {BAR_SECONDS:g} s, none imported: {'met' if met else 'NOT met'}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
