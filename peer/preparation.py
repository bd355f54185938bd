"""Get a run's materials, check them, and make the learner."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from hivegrpo.peer.learn.data import PROMPT, Prompts, require_same_columns
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.materials import base_folder, file_refs, read_rows
from hivegrpo.peer.rewards.registry import find_rewards, reward_versions
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import CommitmentError, ConfigError, MismatchError, UnreachableError, WireError


async def prepare_learner(
    chain: Chain,
    config: RunConfig,
    settings: PeerConfig,
    sharing: Sharing,
    model_folder: Path,
    worker: Executor,
) -> tuple[Learner, Path]:
    """Fetch what travels with the run, from whoever has it, check all digests, load the model.

    Returns the learner, and the base model's folder. What is damaged on this disk is fetched once more.
    """
    manifest, store = chain.manifest.message, sharing.store
    refs = file_refs(manifest)
    await _fetch(refs, sharing)
    loop = asyncio.get_running_loop()
    load = partial(_load, manifest, config, settings, store, model_folder)
    try:
        return await loop.run_in_executor(worker, load)
    except (MismatchError, CommitmentError):
        damaged = [await asyncio.to_thread(store.remove_damaged, ref) for ref in refs]
        if not any(damaged):
            raise
    await _fetch(refs, sharing)
    return await loop.run_in_executor(worker, load)


async def _fetch(refs: Sequence[BlobRef], sharing: Sharing) -> None:
    missing = [ref for ref in refs if not sharing.store.has(ref)]
    if missing:
        await sharing.find_once()
    for ref in missing:
        try:
            await sharing.fetch(ref)
        except WireError as error:
            raise UnreachableError(
                f"A file of the run could not be fetched: {error}.", "Start this peer again: it goes on where it was."
            ) from error


def _load(
    manifest: pb.RunManifest, config: RunConfig, settings: PeerConfig, store: BlobStore, model_folder: Path
) -> tuple[Learner, Path]:
    try:
        config.require_swarm()
    except ConfigError as error:
        raise MismatchError(f"The run cannot be a swarm's: {error.message}", "Tell whoever launched the run.") from None
    rewards = find_rewards(config.rewards.functions, config.rewards.options)
    here = reward_versions(rewards)
    if here != dict(manifest.rewards):
        raise MismatchError(
            f"The run uses reward functions {dict(manifest.rewards)}, installed are {here}.",
            "Install the versions that the run names.",
        )
    folder = base_folder(manifest, config, store, model_folder)
    rows = read_rows(manifest.dataset, manifest.digests["dataset"], config.dataset, None, store)
    prompts = Prompts.from_jsonl(rows)
    if len(prompts) != manifest.rows:
        raise MismatchError(
            f"The run has {len(prompts)} rows, and its manifest counts {manifest.rows}.",
            "Ask whoever launched the run to launch it again.",
        )
    held_out = None
    if config.evaluation is not None:
        digest = manifest.digests["evaluation"]
        held_out = Prompts.from_jsonl(read_rows(manifest.evaluation, digest, config.dataset, config.evaluation, store))
        require_same_columns(prompts, held_out)
    for reward in rewards:
        reward.require_columns(prompts.columns)
    learner = Learner.open(config, settings, folder, prompts, held_out)
    learner.encoder.check(known.rows[0][PROMPT] for known in (prompts, held_out) if known is not None)
    layout = [(tensor.name, tuple(tensor.shape)) for tensor in manifest.layout]
    if learner.layout != layout:
        raise MismatchError(
            "The model's trainable parameters are laid out differently here than in the run.",
            "Install the versions of transformers and peft that the run was launched with (constraints.txt).",
        )
    return learner, folder
