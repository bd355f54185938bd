"""The model that a run has trained, in memory, ready to answer or to be written out."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hivegrpo.peer.inference.locate import CACHE, FETCH_HINT, LocalRun, is_address, open_run
from hivegrpo.peer.inference.remote import mirror_run
from hivegrpo.peer.inference.states import Revision, choose, parse_revision, policy_vector
from hivegrpo.peer.learn.encoding import load_tokenizer
from hivegrpo.peer.learn.policy import Policy, choose_device
from hivegrpo.peer.learn.weights import Quantization
from hivegrpo.peer.materials import base_folder
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's policy at one version, or its base."""

    run: LocalRun
    version: int | None
    """None is the base, without the adapter."""
    policy: Policy
    tokenizer: "PreTrainedTokenizerBase"
    base: Path
    """Folder of the base model."""
    quantized: Quantization | None
    """How the base is held here; None is in the precision of the run's [model] dtype."""

    @property
    def title(self) -> str:
        """Run and version, for people."""
        head = self.run.chain.height
        version = "the base model" if self.version is None else f"version {self.version} of {head}"
        return f"{self.run.config.run.name} ({self.run.chain.run_id[:16]}), {version}"

    def merged(self) -> "PreTrainedModel":
        """The base model with the adapter added to its weights; uses the policy up."""
        adapted = self.policy.adapted
        if adapted is None:
            return self.policy.model
        merged: PreTrainedModel = adapted.unload() if self.version is None else adapted.merge_and_unload()
        return merged

    def answering(self) -> "PreTrainedModel":
        """The model to sample from; uses the policy up.

        Merged it is faster, but weights of a lower precision, or in fewer bits, would round much of the adapter away.
        """
        if self.version is None or (self.quantized is None and self.run.config.model.dtype == "float32"):
            return self.merged()
        return self.policy.model


def load(run: str | None, revision: str, device: str = "auto", quantize: Quantization | None = None) -> Trained:
    """RUN's policy at `revision`: from the homes on this machine, or, for an address, fetched first.

    quantize: holds the base in fewer bits than the run says, which makes answers that differ a little.
    ConfigError for a wrong folder or revision, UnreachableError for an address where nobody answers, MismatchError for
    content that is not what the chain or the manifest names.
    """
    wanted = parse_revision(revision)
    device = choose_device(device)
    found = find_run(run, wanted)
    version = None if wanted == "base" else choose(found, wanted)
    config = found.config
    if quantize is not None and config.model.trainable == "full":
        raise ConfigError(
            "This run trains every parameter: there is no base to hold in fewer bits.",
            "Export the model, and quantize the exported folder.",
        )
    folder = base_folder(found.chain.manifest.message, config, _model_store(found), found.folder / CACHE / "model")
    vector = None if version is None else policy_vector(found, version, folder)
    policy = Policy.load(folder, config.model, config.lora, device, quantize=quantize)
    if vector is not None:
        policy.load_vector(vector)
    return Trained(found, version, policy, load_tokenizer(folder), folder, quantize or config.model.quantize)


def find_run(run: str | None, revision: Revision | None, *, rows: bool = False) -> LocalRun:
    """The run that RUN names, with what `revision` needs as far as it can be had; None needs the chain alone.

    rows: as of `mirror_run`.
    """
    if run is not None and is_address(run):
        return open_run(asyncio.run(mirror_run(run, revision, _connect, rows=rows)))
    return open_run(Path(run).expanduser() if run is not None else None)


async def _connect() -> Transport:
    from hivegrpo.protocol.transport.p2p import P2PTransport  # here: this import takes seconds

    return await P2PTransport.create(Identity.generate(), dht=False)


def _model_store(run: LocalRun) -> BlobStore:
    """The home that has all files of the base; any if the base comes from a hub."""
    refs = [ref_of(file.blob) for file in run.chain.manifest.message.model]
    for store in run.stores:
        if all(map(store.has, refs)):
            return store
    raise ConfigError("The base model's files are not on this machine.", FETCH_HINT)
