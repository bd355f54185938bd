"""The invariant checker over what a test's nodes wrote down."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.recompute import guilty_by, span_auditor
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.history import Record, read_history
from hivegrpo.protocol.invariants import check
from support.runs import KEPT_VERSIONS
from support.swarm import Swarm


def assert_invariants(swarm: Swarm) -> None:
    """Of a swarm in memory."""
    assert_invariants_of_homes(swarm.coordinator_home, {name: swarm.peer_home(name) for name in swarm.peers})


def assert_invariants_of_homes(coordinator: Path, peers: Mapping[str, Path]) -> None:
    """No violation, and every span of every version was recomputed: no peer has forgotten a chunk yet."""
    homes = {name: PeerHome(path) for name, path in peers.items()}
    chain = ChainFile.open(coordinator).chain
    recomputed = span_auditor(chain, [home.contributions for home in homes.values()])
    missing: list[tuple[int, int]] = []

    def recompute(plan: Record, seal: Record, span: int) -> bytes | None:
        root = recomputed(plan, seal, span)
        if root is None:
            missing.append((plan["version"], span))
        return root

    with closing(EventLog(coordinator / LOG_FILE, chain.run_id)) as log:
        histories = {name: read_history(home.history) for name, home in homes.items()}
        violations = check(read_records(log), histories, recompute, guilty_by(coordinator / "blobs", chain.run_id))
    assert not violations
    assert chain.height < KEPT_VERSIONS
    assert not missing
