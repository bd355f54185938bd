"""What came of a demo: a few lines for people, and JSON for programs."""

from dataclasses import asdict
from typing import Any

from hivegrpo.cli.accuracy import Accuracy
from hivegrpo.cli.output import Record
from hivegrpo.cli.progress import Progress
from hivegrpo.peer.inference.cost import Cost, describe_cost


def report(progress: Progress, accuracy: Accuracy | None, cost: Cost, seconds: float) -> dict[str, Any]:
    """The content of --report. Seconds of exchange and step are means over the peers, the others by weight."""
    return {
        "run_id": progress.status["run_id"],
        "versions": [_version(progress, record) for record in progress.versions],
        "accuracy": asdict(accuracy) if accuracy is not None else None,
        "cost": asdict(cost),
        "seconds_total": round(seconds, 3),
    }


def summary(progress: Progress, accuracy: Accuracy | None, cost: Cost, seconds: float) -> list[str]:
    """What to tell at the end."""
    tokens = sum(record["metrics"].get("num_tokens", 0) for record in progress.versions)
    exchanged = progress.bytes_exchanged / 1e6
    versions = progress.versions[-1]["version"]
    lines = [f"{versions} versions in {seconds:.0f} s: {tokens:,.0f} tokens, {exchanged:.1f} MB exchanged."]
    differing = differing_versions(progress)
    if differing:
        lines.append(f"Peers reported different state roots for versions {differing}.")
    else:
        lines.append("In every version, every peer reported the same state root.")
    if accuracy is not None:
        solved = f"{accuracy.before:.1%} before, {accuracy.after:.1%} after"
        lines.append(f"Solved of {accuracy.problems} held-out problems: {solved}.")
    return [*lines, describe_cost(cost)]


def differing_versions(progress: Progress) -> list[int]:
    """Versions for which some peer reported another state root than was committed."""
    return [
        record["version"]
        for record in progress.versions
        if set(progress.roots[record["version"]].values()) - {record["state_root"]}
    ]


def _version(progress: Progress, record: Record) -> dict[str, Any]:
    version, metrics = record["version"], record["metrics"]
    votes = dict(sorted(progress.votes[version].items()))

    def mean(name: str) -> float:
        values = [vote[name] for vote in votes.values() if name in vote]
        return sum(values) / len(values) if values else 0.0

    return {
        "version": version,
        "state_root": record["state_root"],
        "roots": dict(sorted(progress.roots[version].items())),
        "reward": metrics.get("reward"),
        "num_tokens": int(metrics.get("num_tokens", 0)),
        "bytes_sent": {peer: int(vote.get("bytes_sent", 0)) for peer, vote in votes.items()},
        "bytes_received": {peer: int(vote.get("bytes_received", 0)) for peer, vote in votes.items()},
        "seconds": {
            "rollout": metrics.get("seconds/rollout", 0.0),
            "gradient": metrics.get("seconds/gradient", 0.0),
            "exchange": mean("seconds/exchange"),
            "step": mean("seconds/step"),
        },
    }
