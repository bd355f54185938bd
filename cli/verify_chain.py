"""`hivegrpo coordinator verify`: a run's whole chain, offline, from what its homes on this machine hold."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import typer

from hivegrpo.cli.coordinator_home import ROLE
from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.home import CONTRIBUTIONS_FOLDER
from hivegrpo.peer.inference.locate import LocalRun, open_run
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.step import PolicyState, state_bytes, state_from_bytes
from hivegrpo.peer.swarm.recompute import span_auditor
from hivegrpo.peer.swarm.replay import replay
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.chain import Entry
from hivegrpo.protocol.envelope import open_signed, parse
from hivegrpo.protocol.errors import HiveError, MismatchError, WireError
from hivegrpo.protocol.homes import latest_run


@dataclass(slots=True)
class Report:
    """What was verified, version by version, and what could not be."""

    run_id: str
    versions: int
    """All of them: signatures, links, plans, seals and coefficients, as every reader of the chain checks them."""
    made: int = 0
    """Versions that have a plan: all but version 0 and rollbacks."""
    quorums: list[int] = field(default_factory=list)
    """Versions for which the log has signed votes of two thirds of the roster."""
    states: list[int] = field(default_factory=list)
    """Versions whose whole state is here and has its root."""
    steps: list[int] = field(default_factory=list)
    """Versions whose state was made again from the one before and the reduced spans."""
    spans: int = 0
    """Reduced spans that are here and have their root."""
    reductions: int = 0
    """Spans that were made again from the contributions' chunks."""
    all_spans: int = 0
    wrong: list[str] = field(default_factory=list)


def verify_chain(run: Path | None, *, as_json: bool) -> None:
    """Print what holds and what could not be checked; exit with 76 if something is wrong.

    ChainError if the chain itself does not verify, ConfigError if there is no run.
    """
    folder = run if run is not None else latest_run()
    held = open_run(folder)
    report = Report(held.chain.run_id, len(held.chain.entries))
    manifests = [entry.manifest.message for entry in held.chain.entries]
    report.made = sum(entry.plan is not None for entry in held.chain.entries)
    report.all_spans = sum(len(manifest.spans) for manifest in manifests)
    _verify_votes(folder, held, report)
    _verify_reductions(folder, held, report)
    _verify_states(held, report)
    print(json.dumps(asdict(report)) if as_json else "\n".join(_describe(report)))
    if report.wrong:
        raise typer.Exit(MismatchError.exit_code)


def _verify_votes(folder: Path, held: LocalRun, report: Report) -> None:
    """The coordinator's log against the chain: the same versions, and a quorum of signed votes behind each."""
    path = folder / ROLE / LOG_FILE
    if not path.is_file():
        return
    votes: dict[bytes, dict[str, pb.StepReport]] = {}
    with closing(EventLog(path, held.chain.run_id)) as log:
        for event in log.replay():
            if isinstance(event, ev.StepReported):
                try:
                    opened = open_signed(event.signed, held.chain.run_id, pb.StepReport)
                except WireError as error:
                    report.wrong.append(f"a vote in the log does not verify: {error}")
                    continue
                votes.setdefault(opened.message.plan, {})[opened.signer] = opened.message
            elif isinstance(event, ev.VersionCommitted):
                version = parse(pb.VersionManifest, event.payload).version
                entries = held.chain.entries
                if version < len(entries) and entries[version].manifest.signed.payload != event.payload:
                    report.wrong.append(f"version {version} is another one in the log than in the chain")
    for entry in held.chain.entries:
        if entry.plan is not None and _has_quorum(entry, votes.get(entry.plan.digest, {})):
            report.quorums.append(entry.manifest.message.version)


def _has_quorum(entry: Entry, votes: dict[str, pb.StepReport]) -> bool:
    assert entry.plan is not None
    manifest = entry.manifest.message
    roster = {contributor.peer for contributor in entry.plan.message.contributors}
    agreed = [
        peer
        for peer, vote in votes.items()
        if peer in roster and vote.state_root == manifest.state.root and list(vote.spans) == list(manifest.spans)
    ]
    return 3 * len(agreed) >= 2 * len(roster)


def _verify_reductions(folder: Path, held: LocalRun, report: Report) -> None:
    """Spans against their roots, and against their rule where every sealed contributor's chunks are here."""
    recompute = span_auditor(held.chain, sorted(folder.glob(f"*/{CONTRIBUTIONS_FOLDER}")))
    for entry in held.chain.entries:
        if entry.plan is None or entry.seal is None:
            continue
        version = entry.manifest.message.version
        for index, span in enumerate(entry.manifest.message.spans):
            if held.has(ref_of(span)):
                report.spans += _reads(held, span, f"span {index} of version {version}", report)
            root = recompute({"digest": entry.plan.digest.hex()}, {"digest": entry.seal.digest.hex()}, index)
            if root is not None and root != span.root:
                report.wrong.append(
                    f"span {index} of version {version} is not what its rule makes of the contributions"
                )
            elif root is not None:
                report.reductions += 1


def _verify_states(held: LocalRun, report: Report) -> None:
    """States against their roots, and each step that can be made again."""
    layout = [(tensor.name, tuple(tensor.shape)) for tensor in held.chain.manifest.message.layout]
    values = sum(math.prod(shape) for _, shape in layout)
    gone_back_to = {entry.manifest.message.restores for entry in held.chain.entries}
    kept: dict[int, PolicyState | None] = {}
    before: PolicyState | None = None
    for entry in held.chain.entries:
        manifest = entry.manifest.message
        version, state = manifest.version, None
        if version == 0 and held.config.model.trainable == "lora":
            state = PolicyState.initial(version_zero(layout, held.config, None))
            if blob_root(state_bytes(state)) != manifest.state.root:
                report.wrong.append("version 0 is not what the run's seed gives")
        elif manifest.HasField("restores"):
            state = kept[manifest.restores]  # the chain has checked that it has the same root
        if entry.plan is not None and before is not None and all(held.has(ref_of(span)) for span in manifest.spans):
            try:
                spans = [held.read(ref_of(span), f"a span of version {version}") for span in manifest.spans]
                state = replay(before, entry.plan.message, spans)
            except (HiveError, WireError):
                state = None  # damaged spans are told of already
            if state is not None and blob_root(state_bytes(state)) == manifest.state.root:
                report.steps.append(version)
            elif state is not None:
                report.wrong.append(
                    f"the step to version {version} does not lead to the root that its quorum voted for"
                )
                state = None
        if held.has(ref_of(manifest.state)) and _reads(held, manifest.state, f"the state of version {version}", report):
            report.states.append(version)
            if state is None:
                state = state_from_bytes(held.read(ref_of(manifest.state), f"the state of version {version}"), values)
        before = state
        if version in gone_back_to:
            kept[version] = state


def _reads(held: LocalRun, blob: pb.Blob, what: str, report: Report) -> bool:
    try:
        held.read(ref_of(blob), what)
    except MismatchError as error:
        report.wrong.append(error.message)
        return False
    return True


def _describe(report: Report) -> Iterator[str]:
    yield f"run {report.run_id[:16]}: a chain of {report.versions} versions, whose signatures and links all verify."
    yield f"quorums: {len(report.quorums)} of {report.made} versions have their signed votes in the log here."
    yield f"spans: {report.spans} of {report.all_spans} are here, with their roots; {report.reductions} made again."
    yield f"states: {len(report.states)} of {report.versions} are here, with their roots."
    yield f"steps: {len(report.steps)} of {report.made} were made again, and led to the signed roots."
    yield from (f"wrong: {what}" for what in report.wrong)
    if not report.wrong:
        yield "Nothing is wrong; what is not counted could not be checked with what this machine keeps."
