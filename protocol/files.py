"""Files that are either whole or absent, and those that have to hold a JSON object."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from hivegrpo.protocol.errors import ConfigError

TEMPORARY = ".writing-"
"""Begins the name of a file that is being written. If nobody writes to it any more, it is of no use to anyone."""


def write_whole(path: Path, data: bytes | memoryview, mode: int = 0o644) -> None:
    """Write through a temporary name, fsync, and rename; after a crash the old or the new content is there.

    mode: permissions of the file, less what the umask takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporaries(home: Path) -> None:
    """Remove what processes that were killed left half written, in a home that no other process has, and below."""
    for path in home.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file; ConfigError, which ends in the hint, if it cannot be read, or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", hint) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object.", hint)
    return values
