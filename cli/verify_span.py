"""`hivegrpo verify-span`: who is at fault by a proof, offline.

`python -m hivegrpo.cli.verify_span RUN` reads a proof from stdin, under a bound on memory: the coordinator's judge.
"""

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from hivegrpo.peer.swarm.faults import Finding, examine, parse_proof
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.errors import ConfigError, HiveError, MismatchError, WireError

MEMORY_BYTES = 2 << 30
"""What judging a proof may take beyond the libraries."""


def verify(file: Path, run: str | None, *, as_json: bool) -> None:
    """Print what the proof shows. MismatchError if it shows nothing, ConfigError if the file is no proof."""
    try:
        with file.open("rb") as reader:
            proof = reader.read(MAX_PROOF_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The file {file} cannot be read: {error.strerror}.", "Check the path.") from None
    finding = find(proof, run)
    print(json.dumps(asdict(finding)) if as_json else _describe(finding))


def find(proof: bytes, run: str | None) -> Finding:
    """What a proof shows. MismatchError if that is nothing, ConfigError if it is no proof."""
    try:
        parse_proof(proof)
    except WireError as error:
        raise ConfigError(f"This is no proof of fault: {error}.", "Proofs are in a peer's folder faults.") from None
    try:
        return examine(proof, run)
    except WireError as error:
        raise MismatchError(f"The proof shows nothing: {error}.", "Nobody is at fault by it.") from None


def _describe(finding: Finding) -> str:
    lines = [f"run {finding.run_id} ({finding.run}), coordinator {finding.coordinator}"]
    if finding.version is not None:
        lines.append(f"version {finding.version}, attempt {finding.attempt}, span {finding.span}")
    return "\n".join([*lines, *(f"guilty: {peer} {reason}" for peer, reason in finding.guilty)])


def _limit_memory() -> None:
    """Bound this process's memory, by what it has now. macOS has the limit, and does not hold it."""
    status = Path("/proc/self/statm")
    if status.is_file():
        used = int(status.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def main() -> None:
    """One proof in, one JSON object out."""
    _limit_memory()
    try:
        finding = find(sys.stdin.buffer.read(MAX_PROOF_BYTES + 1), sys.argv[1])
    except HiveError as error:
        print(json.dumps({"error": error.message}))
        sys.exit(error.exit_code)
    except MemoryError:
        print(json.dumps({"error": "judging it takes too much memory"}))
        sys.exit(MismatchError.exit_code)
    print(json.dumps(asdict(finding)))


if __name__ == "__main__":
    main()
