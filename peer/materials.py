"""What a run is made of, beside its chain: the base model's files and the canonical rows, by content."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hivegrpo.peer.learn.base import resolve_model
from hivegrpo.peer.learn.data import canonical_rows
from hivegrpo.peer.learn.digests import model_digests, rows_digest
from hivegrpo.peer.learn.sources import MAX_BYTES
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.config import DatasetSection, Rows, RunConfig
from hivegrpo.protocol.errors import ChainError, ConfigError, MismatchError

SUFFIXES = (".safetensors", ".json", ".jsonl", ".txt", ".jinja", ".model")
"""What may travel: data that is parsed, never code."""


def file_refs(manifest: pb.RunManifest) -> list[BlobRef]:
    """All files that travel with the run; ChainError if a name is not a plain one of a known kind, or rows are many."""
    rows = [file for file in (manifest.dataset, manifest.evaluation) if file.name]
    files = [*manifest.model, *rows]
    for file in files:
        if Path(file.name).name != file.name or not file.name.endswith(SUFFIXES) or file.name.startswith("."):
            raise ChainError(
                f"The run wants to send a file named {file.name[:80]!r}.", "No such file is ever written: do not join."
            )
    for file in rows:
        if file.blob.size > MAX_BYTES:
            raise ChainError(
                f"The run wants to send {file.blob.size} bytes of rows.", f"At most {MAX_BYTES} are taken: do not join."
            )
    return [BlobRef(file.blob.root, file.blob.size) for file in files]


def base_folder(manifest: pb.RunManifest, config: RunConfig, store: BlobStore, folder: Path) -> Path:
    """The base model's folder: laid out from the store, or resolved through the hub. MismatchError if it differs."""
    if bool(manifest.model) != (config.model.path is not None):
        raise MismatchError(
            "The run does not send its base model as its configuration says.",
            "Ask whoever launched the run to launch it again.",
        )
    if manifest.model:
        file_refs(manifest)
        _lay_out(manifest.model, store, folder)
    else:
        folder = resolve_model(config.model)
    for part, digest in model_digests(folder).items():
        if digest != manifest.digests[part]:
            raise MismatchError(
                f"The {part} in {folder} is not the one that the run was launched with.",
                "Remove that folder and start again; if it stays so, ask whoever launched the run for the revision.",
            )
    return folder


def read_rows(file: pb.File, digest: bytes, dataset: DatasetSection, held_out: Rows | None, store: BlobStore) -> bytes:
    """Canonical rows: from the store if they travel, or got as the run's configuration says.

    MismatchError if they are not the run's. A path in the configuration is the launcher's, and never opened here.
    """
    source = held_out or dataset
    if bool(file.name) != (source.path is not None):
        raise MismatchError(
            f"The run {'sends' if file.name else 'does not send'} the rows of {source.name or source.path}.",
            "Rows of a local file travel, others do not: ask whoever launched the run to launch it again.",
        )
    rows = store.read(BlobRef(file.blob.root, file.blob.size)) if file.name else canonical_rows(dataset, held_out)
    if rows_digest(rows) != digest:
        raise MismatchError(
            f"The rows of {source.name or source.path} are not those that the run was launched with.",
            "Ask whoever launched the run to name the dataset's revision, or the version of what generates it.",
        )
    return rows


def _lay_out(files: Sequence[pb.File], store: BlobStore, folder: Path) -> None:
    """Hard links (or copies) of the store's files under their names, and nothing else in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {file.name for file in files}
    for stale in folder.iterdir():
        if stale.name not in names:
            raise ConfigError(f"{stale} does not belong to the run's base model.", "Move it away and start again.")
    for file in files:
        source = store.path(BlobRef(file.blob.root, file.blob.size))
        if source is None:
            raise ConfigError(f"{file.name} of the base model is not here.", "Start the peer again to fetch it.")
        target = folder / file.name
        if target.exists() and target.samefile(source):
            continue
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
