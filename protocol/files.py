"""Files that are either whole or absent."""

import os
import tempfile
from pathlib import Path

TEMPORARY = ".writing-"
"""Begins the name of a file that is being written. If nobody writes to it any more, it is of no use to anyone."""


def write_whole(path: Path, data: bytes | memoryview, mode: int = 0o644) -> None:
    """Write through a temporary name, fsync, and rename; after a crash the old or the new content is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
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
