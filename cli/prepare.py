"""Begin a run: pin in its manifest everything that peers will compute with. Hashes files; loads no weights."""

import os
from collections.abc import Sequence
from pathlib import Path

from hivegrpo.peer.learn.base import model_files, resolve_model
from hivegrpo.peer.learn.data import PROMPT, Prompts, canonical_rows, require_same_columns
from hivegrpo.peer.learn.digests import model_digests, rows_digest
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.policy import describe_layout
from hivegrpo.peer.learn.step import PolicyState, state_bytes
from hivegrpo.peer.numerics import check_numerics
from hivegrpo.peer.rewards.registry import find_rewards, reward_versions
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef, blob_root
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.config import Rows, RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, run_id_of, sign
from hivegrpo.protocol.identity import Identity


def prepare_run(config: RunConfig, identity: Identity, store: BlobStore) -> pb.Signed:
    """The signed manifest of a new run, whose local files are in `store`.

    ConfigError for a setting that no swarm can have, and for a model, dataset or reward that is not there or does not
    fit; UnreachableError if a hub is needed and does not answer.
    """
    config.require_swarm()
    rewards = find_rewards(config.rewards.functions, config.rewards.options)
    rows = canonical_rows(config.dataset)
    held_out = canonical_rows(config.dataset, config.evaluation) if config.evaluation is not None else None
    sets = [Prompts.from_jsonl(data) for data in (rows, held_out) if data is not None]
    require_same_columns(sets[0], sets[-1])
    for reward in rewards:
        reward.require_columns(sets[0].columns)
    folder = resolve_model(config.model)
    encoder = PromptEncoder(load_tokenizer(folder), config.dataset)
    encoder.check(row[PROMPT] for prompts in sets for row in prompts.rows)
    layout = describe_layout(folder, config.model, config.lora)
    genesis = PolicyState.initial(version_zero(layout, config, folder))
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=identity.peer_id,
        config=config.published().canonical_json(),
        nonce=os.urandom(16),
        model=_send_model(folder, store) if config.model.path is not None else (),
        digests={
            **model_digests(folder),
            "dataset": rows_digest(rows),
            "known_answer": bytes.fromhex(check_numerics()),
            "genesis": blob_root(state_bytes(genesis)),
        },
        dataset=_send_rows(config.dataset, "dataset.jsonl", rows, store),
        rows=len(sets[0]),
        layout=[pb.Tensor(name=name, shape=shape) for name, shape in layout],
        rewards=reward_versions(rewards),
        run_key=config.run.key or "",
    )
    if config.evaluation is not None and held_out is not None:
        manifest.digests["evaluation"] = rows_digest(held_out)
        manifest.evaluation.MergeFrom(_send_rows(config.evaluation, "evaluation.jsonl", held_out, store))
    return sign(identity, run_id_of(manifest.SerializeToString(deterministic=True)), manifest)


def _send_model(folder: Path, store: BlobStore) -> Sequence[pb.File]:
    return [_file(path.name, store.add_file(path)) for path in model_files(folder)]


def _send_rows(source: Rows, name: str, rows: bytes, store: BlobStore) -> pb.File:
    """Rows of a local file travel; those from the hub or a generator each peer gets, and checks, by itself: no file."""
    return _file(name, store.add_bytes(rows)) if source.path is not None else pb.File()


def _file(name: str, ref: BlobRef) -> pb.File:
    return pb.File(name=name, blob=pb.Blob(root=ref.root, size=ref.size))
