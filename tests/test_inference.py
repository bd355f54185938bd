"""Loading and exporting the policy of a run, from its homes and from its address (see support/trained_run.py)."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.trained_run import PROMPT, MadeRun, write_base, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from hivegrpo.peer.inference.export import Options, export
from hivegrpo.peer.inference.load import load
from hivegrpo.peer.inference.locate import CACHE, open_run
from hivegrpo.peer.inference.remote import mirror_run
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import PART, BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.envelope import sign
from hivegrpo.protocol.errors import ChainError, ConfigError, HiveError, MismatchError, UnreachableError
from hivegrpo.protocol.files import TEMPORARY
from hivegrpo.protocol.homes import run_folder
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("inference")
    write_base(folder / "base")
    return write_run(folder / "run", folder / "base")


@pytest.fixture
def made(original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeRun:
    """A copy in a state folder of its own, to be damaged."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    return original.copy_to(run_folder(original.chain.run_id))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokenizer: Qwen2Tokenizer) -> torch.Tensor:
    logits: torch.Tensor = model(**tokenizer(PROMPT, return_tensors="pt")).logits
    return logits


def base_logits(made: MadeRun) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(made.base), AutoTokenizer.from_pretrained(made.base))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, in units of the largest |logit|."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("home", ["", "peer", None], ids=["the run's folder", "a home", "the latest run"])
def test_the_latest_version_is_replayed_from_the_newest_state(made: MadeRun, home: str | None) -> None:
    trained = load(None if home is None else str(made.folder / home), "latest", "cpu")
    assert trained.version == 3
    assert torch.equal(trained.policy.flatten(), made.vectors[3])


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_version_is_the_one_asked_for(made: MadeRun, version: int) -> None:
    assert torch.equal(load(None, str(version), "cpu").policy.flatten(), made.vectors[version])


def test_the_base_is_the_base(made: MadeRun) -> None:
    trained = load(None, "base", "cpu")
    assert torch.equal(logits_of(trained.merged(), trained.tokenizer), base_logits(made))


def test_blobs_are_found_in_any_home_and_the_longest_chain_is_taken(made: MadeRun) -> None:
    """The coordinator's home has the model and the chain to version 1; the peer's lacks the model."""
    coordinator = made.folder / "coordinator"
    chainfile = ChainFile.create(coordinator, made.chain.run, made.coordinator.peer_id)
    for version in (0, 1):
        chainfile.append(made.chain.entry(version))
    blobs = BlobStore(coordinator / "blobs").folder
    for file in made.chain.manifest.message.model:
        made.blob(file.blob).rename(blobs / file.blob.root.hex())
    assert torch.equal(load(None, "latest", "cpu").policy.flatten(), made.vectors[3])


def test_reading_a_chain_leaves_an_entry_in_flight_alone(made: MadeRun) -> None:
    path = made.home / "chain.bin"
    written = path.read_bytes() + (1000).to_bytes(4, "big") + b"half an entry"
    path.write_bytes(written)
    assert open_run(made.folder).chain.height == 3
    assert path.read_bytes() == written


def test_a_merged_export_answers_like_the_policy(made: MadeRun, tmp_path: Path) -> None:
    folder = export(None, tmp_path / "out" / "model")
    live = load(None, "latest", "cpu")
    expected = logits_of(live.policy.model, live.tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    # Merging adds B A to W once, in fp32, instead of adding the outputs: the rounding differs, 1e-7 a product.
    assert difference(logits_of(merged, AutoTokenizer.from_pretrained(folder)), expected) < 1e-5
    assert difference(expected, base_logits(made)) > 1e-2
    card = (folder / "README.md").read_text()
    for named in (made.chain.run_id, made.manifest(3).state.root.hex(), made.coordinator.peer_id):
        assert named in card


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for what is renamed
def test_an_adapter_export_answers_like_the_policy_under_peft(made: MadeRun, tmp_path: Path) -> None:
    folder = export(str(made.folder), tmp_path / "adapter", "2", Options(adapter=True))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {path.name for path in folder.iterdir()}
    assert str(made.folder) not in (folder / "adapter_config.json").read_text()
    live = load(None, "2", "cpu")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), folder)
    assert torch.equal(logits_of(adapted, live.tokenizer), logits_of(live.policy.model, live.tokenizer))


def test_an_export_is_whole_or_absent(made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(None, full)
    assert [path.name for path in full.iterdir()] == ["mine"]

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Qwen2Tokenizer, "save_pretrained", fails)
    target = tmp_path / "exports" / "model"
    with pytest.raises(ConfigError, match="no space left"):
        export(None, target)
    assert list(target.parent.iterdir()) == []


def test_the_base_is_not_exported_as_an_adapter(made: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        export(None, tmp_path / "adapter", "base", Options(adapter=True))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_state(made: MadeRun) -> None:
    flip(made.blob(made.manifest(2).state))


def damage_span(made: MadeRun) -> None:
    flip(made.blob(made.manifest(3).spans[1]))


def damage_model(made: MadeRun) -> None:
    weights = next(file for file in made.chain.manifest.message.model if file.name == "model.safetensors")
    flip(made.blob(weights.blob))


def damage_chain(made: MadeRun) -> None:
    flip(made.home / "chain.bin")


def cut_manifest(made: MadeRun) -> None:
    path = made.home / "run.manifest"
    path.write_bytes(path.read_bytes()[:10])


def remove_model(made: MadeRun) -> None:
    for file in made.chain.manifest.message.model:
        made.blob(file.blob).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_state, MismatchError, "state of version 2 is damaged"),
        (damage_span, MismatchError, "update to version 3 is damaged"),
        (damage_model, MismatchError, "base"),
        (damage_chain, ChainError, "does not verify"),
        (cut_manifest, ChainError, "is damaged"),
        (remove_model, ConfigError, "not on this machine"),
    ],
)
def test_damage_is_named(
    made: MadeRun, damage: Callable[[MadeRun], None], error: type[HiveError], message: str
) -> None:
    damage(made)
    with pytest.raises(error, match=message):
        load(None, "latest", "cpu")


def test_updates_that_do_not_lead_to_the_signed_root_are_refused(made: MadeRun, tmp_path: Path) -> None:
    """As when the quorum's machines computed something else than this one."""
    entry = made.chain.entry(3)
    manifest = pb.VersionManifest.FromString(entry.manifest.payload)
    manifest.state.root = bytes(32)
    entry.manifest.CopyFrom(sign(made.coordinator, made.chain.run_id, manifest))
    forged = tmp_path / "forged"
    chainfile = ChainFile.create(forged, made.chain.run, made.coordinator.peer_id)
    for older in range(3):
        chainfile.append(made.chain.entry(older))
    chainfile.append(entry)
    shutil.copytree(made.home / "blobs", forged / "blobs")
    with pytest.raises(MismatchError, match="state root"):
        load(str(forged), "latest", "cpu")


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("1", "Version 1 cannot be had: its state is gone. Available are 0, 2-3"),
        ("7", "Version 7 cannot be had: the chain ends at version 3"),
        ("newest", "not a revision"),
        ("-1", "not a revision"),
    ],
)
def test_a_wrong_revision_is_answered_with_those_there_are(made: MadeRun, revision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, revision, "cpu")


def test_a_wrong_run_is_answered_with_what_to_name(made: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        load(str(made.folder.parent), "latest", "cpu")
    with pytest.raises(ConfigError, match="does not exist"):
        load(str(tmp_path / "nothing"), "latest", "cpu")
    with pytest.raises(ConfigError, match="not a node's address"):
        load("/ip4/127.0.0.1/tcp/4001", "latest", "cpu")


def test_a_folder_with_two_runs_is_refused(made: MadeRun, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", made.base)
    shutil.copytree(made.home, other.folder / "second")
    with pytest.raises(ConfigError, match="more than one run"):
        load(str(other.folder), "latest", "cpu")


def test_no_run_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no run"):
        load(None, "latest", "cpu")


class Network:
    """The coordinator of a made run, and a peer whose spans are its own; both serve as their daemons would."""

    def __init__(self, made: MadeRun) -> None:
        self.made = made
        self.network = MemoryNetwork()

    async def start_coordinator(self, archive: Path) -> str:
        transport = self.network.join(self.made.coordinator)
        store = BlobStore(archive)
        keep = [*(file.blob for file in self.made.chain.manifest.message.model), self.made.manifest(2).state]
        for blob in keep:
            store.add_file(self.made.blob(blob))
        await serve_chain(transport, self.made.chain)
        await serve_blobs(transport, store)
        return transport.addresses()[0]

    async def start_reducer(self) -> None:
        transport = self.network.join(self.made.chain.entries[3].plan.message.reducers[0].peer)
        await serve_blobs(transport, BlobStore(self.made.home / "blobs"))

    async def connect(self) -> Transport:
        return self.network.join(Identity.generate())


@pytest.mark.parametrize(("with_peer", "version"), [(True, 3), (False, 2)])
def test_an_address_gives_the_newest_version_that_its_holders_have(
    original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_peer: bool, version: int
) -> None:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))

    async def mirror() -> Path:
        network = Network(original)
        address = await network.start_coordinator(tmp_path / "archive")
        if with_peer:
            await network.start_reducer()
        return await mirror_run(address, "latest", network.connect)

    folder = asyncio.run(mirror())
    trained = load(str(folder), "latest", "cpu")
    assert trained.version == version
    assert torch.equal(trained.policy.flatten(), original.vectors[version])


def test_the_cache_keeps_what_is_used_and_lets_go_of_the_rest(
    original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old blobs, half of one, and what a killed process left; the second fetch needs what the first has."""
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))

    async def mirror() -> Path:
        network = Network(original)
        return await mirror_run(await network.start_coordinator(tmp_path / "archive"), "latest", network.connect)

    blobs = asyncio.run(mirror()) / CACHE / "blobs"
    used = {path.name for path in blobs.iterdir()}
    for name in ("00" * 32, "11" * 32, f"{PART}{'22' * 32}", f"{TEMPORARY}x"):
        (blobs / name).write_bytes(b"rest")
    for path in blobs.iterdir():
        if path.name != "11" * 32:
            os.utime(path, (0, 0))
    asyncio.run(mirror())
    assert {path.name for path in blobs.iterdir()} == {*used, "11" * 32}


def test_an_address_where_nobody_answers_is_unreachable(original: MadeRun, tmp_path: Path) -> None:
    network = Network(original)
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{original.coordinator.peer_id}"
    with pytest.raises(UnreachableError):
        asyncio.run(mirror_run(address, "latest", network.connect))


def test_a_coordinator_without_the_model_is_unreachable(
    original: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))

    async def mirror() -> None:
        network = Network(original)
        transport = network.network.join(original.coordinator)
        await serve_chain(transport, original.chain)
        await serve_blobs(transport, BlobStore(tmp_path / "empty"))
        await mirror_run(transport.addresses()[0], "latest", network.connect)

    with pytest.raises(UnreachableError, match="could not be read"):
        asyncio.run(mirror())
