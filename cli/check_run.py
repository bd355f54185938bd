"""`hivegrpo check`: a run's invariants, from the histories in its folder."""

from contextlib import closing
from pathlib import Path

import typer

from hivegrpo.cli.coordinator_home import ROLE
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.home import CONTRIBUTIONS_FOLDER
from hivegrpo.peer.inference.locate import BLOBS, read_chain
from hivegrpo.peer.swarm.recompute import guilty_by, span_auditor
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.history import Record, read_history
from hivegrpo.protocol.homes import latest_run
from hivegrpo.protocol.invariants import check

HISTORY_FILE = "history.jsonl"


def check_run(run: Path | None) -> None:
    """Print what does not hold, and exit with 1 if there is anything; ConfigError if no coordinator wrote there."""
    folder = run if run is not None else latest_run()
    home = folder / ROLE
    if not (home / LOG_FILE).is_file():
        raise ConfigError(
            f"There is no coordinator's log in {folder}.",
            "Name the folder of a run whose coordinator is on this machine.",
        )
    histories = {path.parent.name: read_history(path) for path in sorted(folder.glob(f"*/{HISTORY_FILE}"))}
    chain = read_chain(home)
    recomputed: list[bool] = []
    audit = span_auditor(chain, sorted(folder.glob(f"*/{CONTRIBUTIONS_FOLDER}")))

    def recompute(plan: Record, seal: Record, span: int) -> bytes | None:
        root = audit(plan, seal, span)
        recomputed.append(root is not None)
        return root

    with closing(EventLog(home / LOG_FILE, chain.run_id)) as log:
        violations = check(read_records(log), histories, recompute, guilty_by(home / BLOBS, chain.run_id))
    for violation in violations:
        print(f"invariant {violation.invariant}: {violation.text}")
    if violations:
        raise typer.Exit(1)
    print(
        f"{chain.height + 1} versions, {len(histories)} peers: invariants 1 to 6 hold; of {len(recomputed)} spans, "
        f"{sum(recomputed)} were recomputed from chunks that are still kept here."
    )
