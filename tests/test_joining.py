"""What a run pins when it begins, and what a peer refuses to join: checked against the real preparation, in memory."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.processes import addition_config
from transformers import AutoModelForCausalLM

from hivegrpo.cli.prepare import prepare_run
from hivegrpo.peer.daemon import run_peer
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.chainfile import RUN_FILE
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.envelope import open_run, run_id_of, sign
from hivegrpo.protocol.errors import BusyError, ChainError, HiveError, MismatchError, UnreachableError
from hivegrpo.protocol.homes import locked_home
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

COORDINATOR = Identity.generate()
RUN_KEY = Identity.generate().peer_id


class Prepared:
    """A run of the packaged task, as the launcher prepares it."""

    def __init__(self, folder: Path) -> None:
        config = RunConfig.load(addition_config(folder, run={"key": RUN_KEY}))
        self.store = BlobStore(folder / "blobs")
        self.run = prepare_run(config, COORDINATOR, self.store)
        self.manifest = open_run(self.run, COORDINATOR.peer_id).message


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a coordinator loads no weights")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        return Prepared(tmp_path_factory.mktemp("prepared"))


def test_a_run_pins_everything_that_peers_compute_with(prepared: Prepared) -> None:
    manifest = prepared.manifest
    assert (manifest.coordinator, manifest.run_key) == (COORDINATOR.peer_id, RUN_KEY)
    assert sorted(manifest.digests) == ["base", "chat_template", "dataset", "genesis", "known_answer", "tokenizer"]
    assert "config.json" in [file.name for file in manifest.model]
    assert all(
        prepared.store.has(BlobRef(file.blob.root, file.blob.size)) for file in (*manifest.model, manifest.dataset)
    )
    assert manifest.rows == prepared.store.read(BlobRef(manifest.dataset.blob.root, manifest.dataset.blob.size)).count(
        b"\n"
    )
    assert len(manifest.layout) == 4 * 7 * 2  # layers, linear modules in each, A and B
    assert dict(manifest.rewards) == {"exact_match": 1}


def test_a_manifest_tells_nobody_this_machines_folders(prepared: Prepared, tmp_path: Path) -> None:
    payload = prepared.run.payload
    for folder in (Path.home(), Path(__file__).parents[1], tmp_path.parent.parent):
        assert str(folder).encode() not in payload


class Source:
    """A chain as a hostile or broken coordinator may serve it."""

    successions = ()

    def __init__(self, run: pb.Signed, entries: Sequence[pb.ChainEntry] = ()) -> None:
        self.run = run
        self.entries = entries

    @property
    def height(self) -> int:
        return len(self.entries) - 1

    def entry(self, version: int) -> pb.ChainEntry:
        return self.entries[version]


def join(
    source: Source, store: BlobStore, home: Path, coordinator: str = COORDINATOR.peer_id, run_id: str | None = None
) -> None:
    """Start a peer, whose home is `home`, at a coordinator that serves `source`; it may insist on a run."""

    async def scenario() -> None:
        network = MemoryNetwork()
        server = network.join(coordinator)
        await serve_chain(server, source)
        await serve_blobs(server, store)

        async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
            return network.join(identity)

        settings = PeerConfig(home=home, device="cpu", threads=1)
        async with asyncio.timeout(100):
            await run_peer(
                server.addresses()[0],
                settings,
                asyncio.Event(),
                lambda record: None,
                make_transport=make_transport,
                run_id=run_id,
            )

    asyncio.run(scenario())


def signed(manifest: pb.RunManifest, identity: Identity = COORDINATOR) -> pb.Signed:
    return sign(identity, run_id_of(manifest.SerializeToString(deterministic=True)), manifest)


def test_a_peer_that_is_told_a_run_id_joins_no_other_run(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"is run [0-9a-f]{64}, not abab"):
        join(Source(prepared.run), prepared.store, tmp_path / "peer", run_id="ab" * 32)
    assert not (tmp_path / "peer" / RUN_FILE).exists()


def _digest(name: str) -> Callable[[pb.RunManifest], None]:
    def change(manifest: pb.RunManifest) -> None:
        manifest.digests[name] = bytes(32)

    return change


def _protocol(manifest: pb.RunManifest) -> None:
    manifest.protocol = "hivegrpo/2"


def _setting(manifest: pb.RunManifest) -> None:
    manifest.config = manifest.config.replace('"loss_type"', '"loss_kind"')


def _reward(manifest: pb.RunManifest) -> None:
    manifest.rewards["exact_match"] += 1


def _layout(manifest: pb.RunManifest) -> None:
    manifest.layout[0].shape[0] += 1


def _rows(manifest: pb.RunManifest) -> None:
    manifest.rows += 1


def _rows_not_sent(manifest: pb.RunManifest) -> None:
    manifest.ClearField("dataset")


def _code(manifest: pb.RunManifest) -> None:
    manifest.model[0].name = "modeling.py"


def _path(manifest: pb.RunManifest) -> None:
    manifest.model[0].name = "../config.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_digest("base"), "The base in"),
        (_digest("tokenizer"), "The tokenizer in"),
        (_digest("dataset"), "The rows of"),
        (_digest("known_answer"), "canonical arithmetic"),
        (_protocol, "hivegrpo/2"),
        (_setting, "loss_kind"),
        (_reward, "exact_match"),
        (_layout, "laid out differently"),
        (_rows, "its manifest counts"),
        (_rows_not_sent, "does not send the rows"),
        (_code, "modeling.py"),
        (_path, "../config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_a_run_that_cannot_be_computed_here_is_not_joined(
    prepared: Prepared, tmp_path: Path, change: Callable[[pb.RunManifest], None], says: str
) -> None:
    manifest = pb.RunManifest()
    manifest.CopyFrom(prepared.manifest)
    change(manifest)
    with pytest.raises(MismatchError) as refusal:
        join(Source(signed(manifest)), prepared.store, tmp_path)
    assert refusal.value.exit_code == 76
    assert says in refusal.value.message
    assert refusal.value.hint


def test_a_run_manifest_of_another_coordinator_is_not_joined(prepared: Prepared, tmp_path: Path) -> None:
    other = Identity.generate()
    for run in (prepared.run, signed(prepared.manifest, other)):
        with pytest.raises(ChainError, match="run manifest does not verify"):
            join(Source(run), prepared.store, tmp_path, coordinator=other.peer_id)


@pytest.mark.parametrize("fault", ["tampered", "signed by another", "not the first"])
def test_a_chain_that_does_not_verify_is_not_joined(prepared: Prepared, tmp_path: Path, fault: str) -> None:
    run_id = run_id_of(prepared.run.payload)
    manifest = pb.VersionManifest(parent=bytes.fromhex(run_id), state=pb.Blob(root=bytes(32), size=20))
    manifest.version = 1 if fault == "not the first" else 0
    entry = pb.ChainEntry(
        manifest=sign(Identity.generate() if fault == "signed by another" else COORDINATOR, run_id, manifest)
    )
    if fault == "tampered":
        entry.manifest.signature = bytes(64)
    with pytest.raises(ChainError) as refusal:
        join(Source(prepared.run, [entry]), prepared.store, tmp_path)
    assert refusal.value.exit_code == 76
    assert "report this message" in refusal.value.hint


def test_a_file_of_the_base_that_is_damaged_on_disk_is_fetched_again(prepared: Prepared, tmp_path: Path) -> None:
    """The chain that does not verify comes after the base: so far and no further the second start gets, too."""
    manifest = pb.VersionManifest(version=1, parent=bytes(32), state=pb.Blob(root=bytes(32), size=20))
    broken = Source(
        prepared.run, [pb.ChainEntry(manifest=sign(COORDINATOR, run_id_of(prepared.run.payload), manifest))]
    )
    with pytest.raises(ChainError, match="ersion 0"):
        join(broken, prepared.store, tmp_path)
    [weights] = [file.blob for file in prepared.manifest.model if file.name.endswith(".safetensors")]
    path = tmp_path / "blobs" / weights.root.hex()
    content = path.read_bytes()
    path.write_bytes(bytes(100) + content[100:])
    with pytest.raises(ChainError, match="ersion 0"):
        join(broken, prepared.store, tmp_path)
    assert path.read_bytes() == content


def test_a_file_that_is_not_to_be_had_is_not_waited_for(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="could not be fetched"):
        join(Source(prepared.run), BlobStore(tmp_path / "empty"), tmp_path / "home")


def test_a_home_in_use_is_not_joined_from(prepared: Prepared, tmp_path: Path) -> None:
    with locked_home(tmp_path), pytest.raises(BusyError):
        join(Source(prepared.run), prepared.store, tmp_path)


def test_a_home_of_another_run_is_not_joined_from(prepared: Prepared, tmp_path: Path) -> None:
    manifest = pb.RunManifest()
    manifest.CopyFrom(prepared.manifest)
    manifest.digests["base"] = bytes(32)
    with pytest.raises(HiveError):
        join(Source(signed(manifest)), prepared.store, tmp_path)
    with pytest.raises(ChainError, match="belongs to run"):
        join(Source(prepared.run), prepared.store, tmp_path)
