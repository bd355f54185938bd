"""Rounds over a wide-area network: eight peers on 20 Mbit/s uplinks, 50 ms apart. See README.md beside this.

Exits with 0 if a round takes at most 1.25 times what the uplinks alone need for it (with --overlap: if peers sample
in at least 0.95 of the time), with 1 if not, and with 77 where it cannot run: it needs root, for network namespaces.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from links import Link, LinkError, Links
from processes import Crew, WorkerError

BAR = 1.25
UTILISATION_BAR = 0.95
SPEED_UP = 4.0
"""Real rollouts over those of the first run with overlap, which must last longer than an exchange."""

WARM_UP = 1
"""Rounds before those that count: connections are made."""

START_SECONDS = 90.0
ROUND_SECONDS = 60.0
"""For one round at most; the run ends after as many of these as it has rounds."""

CANNOT = 77
BITS = 8.25
"""Of a value in mxint8."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    values: int
    peers: int
    rounds: int
    up_mbit: float
    down_mbit: float
    delay: float
    """Seconds from one node to another."""
    tcp: str
    """Its congestion control."""

    @property
    def contribution(self) -> float:
        """Encoded bytes of one vector."""
        return self.values * BITS / 8

    @property
    def ideal(self) -> float:
        """Seconds that the uplinks need at least: each peer sends its chunks to the others, then its span."""
        return 2 * (self.peers - 1) / self.peers * self.contribution / (self.up_mbit * 1e6 / 8)


def run(size: Size, folder: Path, overlap: bool = False, rollout: float = 0.0) -> list[dict[str, Any]]:
    """What each peer says at the end of a run."""
    links = [Link(size.up_mbit, size.down_mbit)] * size.peers + [Link(0.0, 0.0)]
    versions = WARM_UP + size.rounds
    folder.mkdir(exist_ok=True)
    with Links(links, size.tcp) as network, Crew(folder) as crew:
        crew.start("switch.py", "switch", len(links), size.delay, within=network.hub).hear("switching", START_SECONDS)
        averaging = {"audit_rate": 0.0, "overlap": overlap}
        tables = json.dumps({"averaging": averaging, "timing": {"exchange": 60.0}})
        coordinator = crew.start(
            "swarm_coordinator.py",
            "coordinator",
            folder / "coordinator",
            *(size.peers, size.values, versions, network.host(size.peers), tables),
            within=network.within(size.peers),
        )
        workers = [
            crew.start(
                "wan_peer.py",
                f"peer-{rank}",
                folder / f"peer-{rank}",
                *(rank, size.peers, size.values, network.host(rank), rollout),
                within=network.within(rank),
            )
            for rank in range(size.peers)
        ]
        for worker in workers:
            worker.hear("loaded", START_SECONDS)
        address = coordinator.hear("serving", START_SECONDS)["address"]
        for worker in workers:
            worker.tell("join", address=address)
        end = time.monotonic() + START_SECONDS + versions * (ROUND_SECONDS + rollout)
        return [worker.hear("finished", max(1.0, end - time.monotonic())) for worker in workers]


def measure(size: Size, folder: Path) -> list[list[dict[str, Any]]]:
    """Figures of each peer, for each round that counts."""
    answers = [answer["rounds"] for answer in run(size, folder)]
    counted = range(WARM_UP + 1, WARM_UP + size.rounds + 1)
    return [[_of_version(rounds, version) for rounds in answers] for version in counted]


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Share of the time in which peers sample; means over peers and rounds."""

    rollout: float
    """Seconds of each."""
    cycle: float
    """Seconds from the end of one rollout to the end of the next."""
    version: float
    """Seconds from the beginning of a rollout to the version that it waits for, or to its own end if that is later."""
    turn: float
    """Seconds from then to the beginning of the next: gradient, report, plan, lease."""

    @property
    def share(self) -> float:
        """Measured."""
        return self.rollout / self.cycle

    def at(self, rollout: float) -> float:
        """The model: a rollout or the version before it, whichever takes longer, and then the turn."""
        return rollout / (max(rollout, self.version) + self.turn)


def utilisation(size: Size, folder: Path, rollout: float) -> Utilisation:
    """Of a run with overlap, after its first rollout, which waits for nothing."""
    peers = [answer["rollouts"] for answer in run(size, folder, overlap=True, rollout=rollout)]
    if any(len(each) != WARM_UP + size.rounds for each in peers):
        raise WorkerError(f"peers sampled {[len(each) for each in peers]} times in {WARM_UP + size.rounds} rounds")
    pairs = [pair for each in peers for pair in pairwise(each)]
    return Utilisation(
        rollout,
        cycle=mean(end - before for (_, before, _), (_, end, _) in pairs),
        version=mean(ready - began for _, (began, _, ready) in pairs),
        turn=mean(began - ready for (_, _, ready), (began, _, _) in pairs),
    )


def _of_version(rounds: list[dict[str, Any]], version: int) -> dict[str, Any]:
    """One peer's figures of a version, with the bytes since the version before."""
    by_version = {figures["version"]: figures for figures in rounds}
    if version not in by_version or version - 1 not in by_version or not by_version[version]["averaged"]:
        raise WorkerError(f"a peer did not average version {version}")
    before, figures = by_version[version - 1], dict(by_version[version])
    figures["interface"] = [now - then for now, then in zip(figures["interface"], before["interface"], strict=True)]
    return figures


def round_seconds(peers: list[dict[str, Any]]) -> float:
    """From the last peer's report of its contribution until the last one has the average; they share a clock."""
    return float(max(peer["decoded"] for peer in peers) - max(peer["reported"] for peer in peers))


def show(size: Size, rounds: list[list[dict[str, Any]]]) -> bool:
    """Print the figures and the verdict; whether the bar is met."""
    least = 2 * (size.peers - 1) / size.peers * size.contribution
    print("round   seconds  / ideal  exchange  / ideal  sent, MB  / least  received, MB")
    for number, peers in enumerate(rounds, start=1):
        whole, exchange = round_seconds(peers), max(peer["exchange"] for peer in peers)
        sent, received = (max(peer["interface"][way] for peer in peers) for way in (0, 1))
        print(
            f"{number:5}{whole:10.2f}{whole / size.ideal:9.3f}{exchange:10.2f}{exchange / size.ideal:9.3f}"
            f"{sent / 1e6:10.2f}{sent / least:9.3f}{received / 1e6:14.2f}"
        )
    ratio = median(map(round_seconds, rounds)) / size.ideal
    print(f"\nmedian round over ideal: {ratio:.3f}; the bar is {BAR}: {'met' if ratio <= BAR else 'NOT met'}")
    return ratio <= BAR


def show_overlap(size: Size, folder: Path, rollout: float) -> bool:
    """Measure with short rollouts, say what follows for real ones, and measure these; whether the bar is met."""
    short = utilisation(size, folder / "short", rollout / SPEED_UP)
    print(f"{short.rollout:g} s of rollout: a cycle takes {short.cycle:.2f} s, utilisation {short.share:.3f}")
    print(f"model: {short.version:.2f} s to the version before, {short.turn:.2f} s of turn;", end=" ")
    print(f"{short.at(short.rollout):.3f} at {short.rollout:g} s, {short.at(rollout):.3f} at {rollout:g} s", flush=True)
    real = utilisation(size, folder / "real", rollout)
    print(f"{real.rollout:g} s of rollout: a cycle takes {real.cycle:.2f} s, utilisation {real.share:.3f}", flush=True)
    met = real.share >= UTILISATION_BAR
    print(f"the bar is {UTILISATION_BAR}: {'met' if met else 'NOT met'}")
    return met


@contextmanager
def keeping_failures(folder: Path) -> Iterator[None]:
    """If a run in the folder fails, what its nodes wrote, but for blobs, stays on disk; the error says where."""
    try:
        yield
    except WorkerError as error:
        kept = tempfile.mkdtemp(prefix="bench-wan-failed-")
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("blobs", "*.sock"), dirs_exist_ok=True)
        raise WorkerError(f"{error}\nwhat the nodes wrote is in {kept}") from None


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=9_100_000, help="length of the averaged vector")
    parser.add_argument("--peers", type=int, default=8, help="peers that average, beside a coordinator")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that count")
    parser.add_argument("--up", type=float, default=20.0, help="Mbit/s of each peer's uplink")
    parser.add_argument("--down", type=float, default=100.0, help="Mbit/s of each peer's downlink")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds from one node to another")
    parser.add_argument(
        "--tcp", default="cubic", help="congestion control; cubic is Linux's, macOS's and Windows' default"
    )
    parser.add_argument("--overlap", action="store_true", help="measure how much of the time peers sample, instead")
    parser.add_argument("--rollout", type=float, default=60.0, help="with --overlap: seconds of a real rollout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    arguments = parser.parse_args()
    line = (arguments.up, arguments.down, arguments.delay, arguments.tcp)
    size = Size(arguments.values, arguments.peers, arguments.rounds, *line)
    if size.values < 2 or size.peers < 2 or size.rounds < 1:
        parser.error("--values and --peers must be at least 2, --rounds at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"{size.peers} peers, {size.contribution / 1e6:.2f} MB each; {size.up_mbit:g} Mbit/s up,", end=" ")
    print(f"{size.down_mbit:g} down, {size.delay * 1e3:g} ms one way, {size.tcp}; ideal {size.ideal:.2f} s;", end=" ")
    print(f"load {os.getloadavg()[0]:.2f}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as name, keeping_failures(Path(name)):
            if arguments.overlap:
                return 0 if show_overlap(size, Path(name), arguments.rollout) else 1
            rounds = measure(size, Path(name))
    except LinkError as error:
        print(f"cannot run here: {error}", file=sys.stderr)
        return CANNOT
    except WorkerError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    met = show(size, rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"size": asdict(size), "rounds": rounds, "bar": BAR, "met": met}) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
