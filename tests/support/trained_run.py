"""A run's home, written by hand: a tiny random Qwen2, and versions 0 to 3 of its adapter, as a swarm leaves them.

Of the versions, 2 has its state in the home, 3 the spans that lead there from 2; what led to 1 and 2 is gone.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from hivegrpo.peer.learn.digests import model_digests, rows_digest
from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.policy import describe_layout
from hivegrpo.peer.learn.step import PolicyState, adamw_step, state_bytes
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector, encode_vector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef, blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chunks import chunk_count, split_evenly
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import PROTOCOL, run_id_of, sign, sign_payload
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars, fp32_bits
from support.runs import small_config

PROMPT = "12+34="
ROWS = b'{"answer":"46","prompt":"12+34="}\n'
CODEC = "mxint8"


@dataclass(frozen=True)
class MadeRun:
    """A run's folder with one peer's home in it, and what inference should find there."""

    folder: Path
    base: Path
    config: RunConfig
    coordinator: Identity
    chain: Chain
    vectors: list[torch.Tensor]
    """Parameters of each version."""

    @property
    def home(self) -> Path:
        return self.folder / "peer"

    def copy_to(self, folder: Path) -> "MadeRun":
        """The same run in another folder, to be damaged."""
        shutil.copytree(self.folder, folder)
        return replace(self, folder=folder)

    def blob(self, blob: pb.Blob) -> Path:
        return self.home / "blobs" / blob.root.hex()

    def manifest(self, version: int) -> pb.VersionManifest:
        return self.chain.entries[version].manifest.message


def byte_level_tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", *alphabet])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token="<end>", eos_token="<end>", pad_token="<pad>")


def write_base(folder: Path, layers: int = 2, spread: float = 0.3) -> None:
    """A byte-level Qwen2; of two layers it is wide enough that the adapter spans two chunks, one for each reducer."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        initializer_range=spread,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(
    folder: Path,
    base: Path,
    metrics: Mapping[int, Mapping[str, float]] | None = None,
    held_out: bytes = b"",
    **sections: dict[str, Any],
) -> MadeRun:
    """Three steps with random gradients, each reduced by two peers, signed as a coordinator would.

    metrics: of the versions, by number. held_out: canonical rows of its [evaluation], if it has any. sections: as of
    `small_config`.
    """
    coordinator, *peers = sorted((Identity.generate() for _ in range(3)), key=lambda identity: identity.peer_id)
    tables = {"lora": {"r": 8}, "averaging": {"codec": CODEC}, "grpo": {"max_completion_length": 8}}
    if held_out:
        tables["evaluation"] = {"path": "held_out.jsonl", "limit": 3}
    config = small_config(**(tables | sections))
    home = folder / "peer"
    store = BlobStore(home / "blobs")
    layout = describe_layout(base, config.model, config.lora)
    manifest = pb.RunManifest(
        protocol=PROTOCOL,
        coordinator=coordinator.peer_id,
        config=config.published().canonical_json(),
        nonce=bytes(16),
        model=[pb.File(name=path.name, blob=as_blob(store.add_file(path))) for path in sorted(base.iterdir())],
        digests=model_digests(base),
        dataset=pb.File(name="rows.jsonl", blob=as_blob(store.add_bytes(ROWS))),
        rows=1,
        layout=[pb.Tensor(name=name, shape=shape) for name, shape in layout],
    )
    if held_out:
        manifest.evaluation.MergeFrom(pb.File(name="held_out.jsonl", blob=as_blob(store.add_bytes(held_out))))
        manifest.digests["evaluation"] = rows_digest(held_out)
    payload = manifest.SerializeToString(deterministic=True)
    run_id = run_id_of(payload)
    signed = sign_payload(coordinator, run_id, "RunManifest", payload)
    chainfile = ChainFile.create(home, signed, coordinator.peer_id)
    state = PolicyState.initial(version_zero(layout, config, base))
    genesis = pb.VersionManifest(version=0, parent=chainfile.chain.manifest.digest, state=state_blob(state))
    chainfile.append(pb.ChainEntry(manifest=sign(coordinator, run_id, genesis)))
    vectors = [state.parameters.clone()]
    for version in (1, 2, 3):
        told = (metrics or {}).get(version, {})
        voters = [peer.peer_id for peer in peers]
        state, spans, entry = take_step(coordinator, voters, run_id, chainfile.chain, state, told)
        chainfile.append(entry)
        vectors.append(state.parameters.clone())
        if version == 2:
            store.add_bytes(state_bytes(state))
        if version == 3:
            assert len([store.add_bytes(span) for span in spans]) == 2
    return MadeRun(folder, base, config, coordinator, chainfile.chain, vectors)


def take_step(
    coordinator: Identity,
    peers: list[str],
    run_id: str,
    chain: Chain,
    state: PolicyState,
    metrics: Mapping[str, float],
) -> tuple[PolicyState, list[bytes], pb.ChainEntry]:
    version = chain.height + 1
    head = chain.entries[-1].manifest
    values = state.parameters.numel()
    codec = get_codec(CODEC)
    chunks = encode_vector(codec, torch.randn(values, generator=torch.Generator().manual_seed(version)))
    shares = split_evenly(chunk_count(values), len(peers))
    spans = [b"".join(chunks[share.start : share.stop]) for share in shares]
    scalars = StepScalars.for_step(version, learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)
    shadow = state.empty_like()
    adamw_step(state, decode_vector(codec, b"".join(chunks), values), scalars, out=shadow)
    contributors = [pb.Contributor(peer=peer, lease=1, weight=1, root=bytes(32)) for peer in peers]
    plan = pb.RoundPlan(
        version=version,
        parent=head.digest,
        attempt=1,
        codec=CODEC,
        rule="mean",
        values=values,
        contributors=contributors,
        reducers=[
            pb.Reducer(peer=peer, addresses=[f"/ip4/127.0.0.1/tcp/1/p2p/{peer}"], first=share.start, chunks=len(share))
            for peer, share in zip(peers, shares, strict=True)
        ],
        scalars=scalars.to_bits(),
        exchange_seconds=1.0,
        step_seconds=1.0,
        audit_seconds=1.0,
    )
    signed_plan = sign(coordinator, run_id, plan)
    plan_digest = bytes.fromhex(run_id_of(signed_plan.payload))
    seal = pb.Seal(plan=plan_digest, contributors=[pb.Sealed(peer=peer, coefficient=fp32_bits(0.5)) for peer in peers])
    signed_seal = sign(coordinator, run_id, seal)
    manifest = pb.VersionManifest(
        version=version,
        parent=head.digest,
        plan=plan_digest,
        seal=bytes.fromhex(run_id_of(signed_seal.payload)),
        spans=[as_blob(blob_ref(span)) for span in spans],
        state=state_blob(shadow),
        contributors=contributors,
        metrics=metrics,
    )
    return (
        shadow,
        spans,
        pb.ChainEntry(manifest=sign(coordinator, run_id, manifest), plan=signed_plan, seal=signed_seal),
    )


def as_blob(ref: BlobRef) -> pb.Blob:
    return pb.Blob(root=ref.root, size=ref.size)


def state_blob(state: PolicyState) -> pb.Blob:
    return as_blob(blob_ref(state_bytes(state)))
