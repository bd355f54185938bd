"""Policy versions out of what is here: a whole state, or an older one and the updates since."""

from math import prod
from pathlib import Path
from typing import Literal

from torch import Tensor

from hivegrpo.peer.inference.locate import FETCH_HINT, LocalRun
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.step import PolicyState, state_bytes, state_from_bytes
from hivegrpo.peer.swarm.replay import replay
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import blob_root
from hivegrpo.protocol.errors import ConfigError, MismatchError, WireError

Revision = int | Literal["latest", "base"]


def parse_revision(text: str) -> Revision:
    """What --revision says; ConfigError if it says nothing."""
    if text == "latest":
        return "latest"
    if text == "base":
        return "base"
    if text.isascii() and text.isdigit():
        return int(text)
    raise ConfigError(f"{text!r} is not a revision.", 'Use "latest", "base", or the number of a policy version.')


def available(run: LocalRun) -> list[int]:
    """Versions that can be made here, oldest first. Version 0 comes from the seed and needs no blob."""
    versions: list[int] = []
    for version, manifest in enumerate(_manifests(run)):
        follows = _before(manifest) in versions and all(run.has(ref_of(span)) for span in manifest.spans)
        if version == 0 or follows or run.has(ref_of(manifest.state)):
            versions.append(version)
    return versions


def choose(run: LocalRun, revision: int | Literal["latest"]) -> int:
    """The version that is meant; ConfigError, with those that are here, if it is not among them."""
    versions = available(run)
    if not versions:
        raise ConfigError(
            f"Run {run.chain.run_id[:16]} has no policy version yet.", "Wait until its peers have agreed on version 0."
        )
    if revision == "latest":
        return versions[-1]
    if revision not in versions:
        known = f"the chain ends at version {run.chain.height}" if revision > run.chain.height else "its state is gone"
        raise ConfigError(
            f"Version {revision} cannot be had: {known}. Available are {_ranges(versions)}.",
            f"Choose one of these. {FETCH_HINT}",
        )
    return revision


def policy_vector(run: LocalRun, version: int, base: Path) -> Tensor:
    """Flat fp32 parameters of an available version, on the base model in the folder `base`.

    MismatchError if a blob is damaged, or the updates do not lead to the state root that the chain names.
    """
    try:
        state = _make(run, version, base)
    except WireError as error:
        raise MismatchError(f"Version {version} cannot be made from the run's blobs: {error}.", REPORT_HINT) from error
    if blob_root(state_bytes(state)) != run.chain.entries[version].manifest.message.state.root:
        raise MismatchError(
            f"The updates to version {version} do not lead to the state root that the chain names.", REPORT_HINT
        )
    parameters: Tensor = state.parameters
    return parameters


def _make(run: LocalRun, version: int, base: Path) -> PolicyState:
    """The newest state at or before a version, and the updates from there on."""
    manifests = _manifests(run)
    anchor, updates = version, list[int]()
    while anchor > 0 and not run.has(ref_of(manifests[anchor].state)):
        if not manifests[anchor].HasField("restores"):
            updates.append(anchor)
        anchor = _before(manifests[anchor])
    layout = [(tensor.name, tuple(tensor.shape)) for tensor in run.chain.manifest.message.layout]
    if anchor == 0:
        state = PolicyState.initial(version_zero(layout, run.config, base))
    else:
        data = run.read(ref_of(manifests[anchor].state), f"the state of version {anchor}")
        state = state_from_bytes(data, sum(prod(shape) for _, shape in layout))
    for number in reversed(updates):
        plan = run.chain.entries[number].plan
        assert plan is not None
        spans = [run.read(ref_of(span), f"an update to version {number}") for span in manifests[number].spans]
        state = replay(state, plan.message, spans)
    return state


def _before(manifest: pb.VersionManifest) -> int:
    """The version whose state this one is made from, by its updates; or is, if the run went back to it."""
    return manifest.restores if manifest.HasField("restores") else manifest.version - 1


def _manifests(run: LocalRun) -> list[pb.VersionManifest]:
    return [entry.manifest.message for entry in run.chain.entries]


def _ranges(versions: list[int]) -> str:
    """[0, 8, 9, 10] as "0, 8-10"."""
    runs: list[list[int]] = []
    for version in versions:
        if runs and runs[-1][-1] == version - 1:
            runs[-1][1:] = [version]
        else:
            runs.append([version])
    return ", ".join("-".join(map(str, bounds)) for bounds in runs)


REPORT_HINT = "Try it on another machine; if it is the same there, report it to whoever launched the run."
