"""Late joins at once onto a run with three holders: who serves how much, and what faults of holders change.

A coordinator and three peers make some versions over libp2p and then stand still. Then processes that only synchronise
join, all at once, without anything on their disks: the chain, the newest anchor, the updates since, replayed. This is
done twice: with three honest holders; and with one that serves wrong pieces, and one that is killed in mid-transfer.

Exits with 1 if a bar is missed: every joiner has the state root that the chain names, and the coordinator has served no
more than three copies of the state.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from processes import Crew, Worker, WorkerError

HOLDERS = 3
VERSIONS = 6
ANCHOR_EVERY = 4
"""So a joiner fetches the state of version 4, and replays 5 and 6."""

MOST_COPIES = 3.0
START_SECONDS = 300.0
ROUND_SECONDS = 60.0
JOIN_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Joins:
    """What came of one run. Bytes served are of pieces."""

    faults: bool
    joiners: int
    state_bytes: int
    verified: int
    seconds: list[float]
    """Of each joiner, from its start to its verified state."""
    by_coordinator: int
    by_joiners: int

    @property
    def copies(self) -> float:
        """Of the state, that the coordinator served to joiners."""
        return self.by_coordinator / self.state_bytes

    @property
    def met(self) -> bool:
        return self.verified == self.joiners and self.copies <= MOST_COPIES

    def __str__(self) -> str:
        kind = "one holder lies, one is killed" if self.faults else "three honest holders"
        times = f"{min(self.seconds):.1f} / {median(self.seconds):.1f} / {max(self.seconds):.1f} s"
        return (
            f"{kind}: {self.verified} of {self.joiners} joiners have the state root; first / median / last {times}; "
            f"copies served by the coordinator {self.copies:.2f} (at most {MOST_COPIES:g}), "
            f"by joiners {self.by_joiners / self.state_bytes:.1f}: {'met' if self.met else 'MISSED'}"
        )


def measure(joiners: int, values: int, faults: bool) -> Joins:
    """One run, with processes of its own."""
    with tempfile.TemporaryDirectory(prefix="joins-") as name, Crew(Path(name)) as crew:
        folder = Path(name)
        tables = json.dumps({"distribution": {"anchor_every": ANCHOR_EVERY, "keep_versions": 2 * ANCHOR_EVERY}})
        coordinator = crew.start(
            "swarm_coordinator.py", "coordinator", folder / "coordinator", HOLDERS, values, 1000, "127.0.0.1", tables
        )
        holders = [
            crew.start(
                "swarm_peer.py",
                f"holder-{rank}",
                folder / f"holder-{rank}",
                *(rank, HOLDERS, values),
                *(["corrupt"] if faults and rank == 0 else []),
            )
            for rank in range(HOLDERS)
        ]
        for holder in holders:
            holder.hear("loaded", START_SECONDS)
        address = coordinator.hear("serving", START_SECONDS)["address"]
        make_versions(holders, address)
        coming = [crew.start("join_peer.py", f"joiner-{n}", folder / f"joiner-{n}") for n in range(joiners)]
        for joiner in coming:
            joiner.hear("loaded", START_SECONDS)
        for joiner in coming:
            joiner.tell("join", address=address)
        for joiner in coming[: joiners // 3]:
            joiner.hear("piece", JOIN_SECONDS)
        if faults:
            holders[1].kill()
        for joiner in coming[joiners // 3 :]:
            joiner.hear("piece", JOIN_SECONDS)
        found = [joiner.hear("synchronised", JOIN_SECONDS) for joiner in coming]
        for joiner in coming:
            joiner.tell("count")
        served = sum(joiner.hear("counted", ROUND_SECONDS)["served"] for joiner in coming)
        coordinator.dismiss()
        by_coordinator = coordinator.hear("served", ROUND_SECONDS)["bytes"]
    return Joins(
        faults=faults,
        joiners=joiners,
        state_bytes=12 * values + 8,
        verified=sum(answer["verified"] and answer["version"] >= VERSIONS for answer in found),
        seconds=[answer["seconds"] for answer in found],
        by_coordinator=by_coordinator,
        by_joiners=served,
    )


def make_versions(holders: Sequence[Worker], address: str) -> None:
    """Have the holders join, and make some versions; then each waits in its next lease for a word that never comes."""
    for holder in holders:
        holder.tell("join", address=address)
    for version in range(VERSIONS + 1):
        for holder in holders:
            holder.hear("armed", ROUND_SECONDS)
            holder.tell("count")
            holder.hear("counted", ROUND_SECONDS)
        if version < VERSIONS:
            for holder in holders:
                holder.tell("go")
            for holder in holders:
                holder.hear("averaged", ROUND_SECONDS)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joiners", type=int, default=30, help="processes that join at once")
    parser.add_argument("--values", type=int, default=1_000_000, help="length of the vector; a state has 12 bytes each")
    parser.add_argument("--only", choices=["honest", "faults"], help="one of the two runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if arguments.joiners < 3 or arguments.values < 2:
        parser.error("--joiners must be at least 3, --values at least 2")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print(f"loopback; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}", flush=True)
    outcome = []
    try:
        for faults in {"honest": [False], "faults": [True]}.get(arguments.only, [False, True]):
            outcome.append(measure(arguments.joiners, arguments.values, faults))
            print(outcome[-1], flush=True)
    except WorkerError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(joins) for joins in outcome], indent=2) + "\n")
    return 0 if all(joins.met for joins in outcome) else 1


if __name__ == "__main__":
    sys.exit(main())
