"""Digests that pin what every peer computes with."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from hivegrpo.peer.learn.base import CHAT_TEMPLATE, SETTINGS, TOKENIZER, WEIGHTS, model_files


def model_digests(folder: Path) -> dict[str, bytes]:
    """Digests of a base model's parts, by the names they have in the run manifest."""
    return {
        "base": files_digest(model_files(folder, WEIGHTS + SETTINGS)),
        "tokenizer": files_digest(model_files(folder, TOKENIZER)),
        "chat_template": files_digest(model_files(folder, CHAT_TEMPLATE)),
    }


def files_digest(paths: Iterable[Path]) -> bytes:
    """SHA-256 over "<SHA-256 of the content, hex> <file name>\\n" of each file, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{content} {path.name}\n".encode())
    return digest.digest()


def rows_digest(rows: bytes) -> bytes:
    """SHA-256 of a dataset's canonical rows."""
    return hashlib.sha256(rows).digest()
