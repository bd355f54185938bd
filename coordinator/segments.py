"""Older events in files of their own: compressed, written once, each with its digest in the log.

A line of a segment is one event: its kind, a space, and its fields as JSON; `zcat` reads it.
"""

import gzip
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from hivegrpo.protocol.files import sync_folder

LEVEL = 3
"""Of compression: three quarters of what the best one saves, in a fraction of its time."""

Row = tuple[str, bytes]
"""Kind and body of an event, as `events.encode_event` gives them."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A file that has the events `first` to `last`, counted from 1."""

    first: int
    last: int
    digest: bytes
    """SHA-256 of the file."""

    @property
    def name(self) -> str:
        return segment_name(self.first)


def segment_name(first: int) -> str:
    """Of the file that begins with this event."""
    return f"{first:012d}.gz"


def write_segment(folder: Path, first: int, rows: Iterable[Row]) -> Segment:
    """Write events, whole and synced, over what a crash may have left under that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / segment_name(first)
    partial = folder / f".{path.name}"
    count = 0
    with partial.open("wb") as file:
        with gzip.GzipFile("", "wb", LEVEL, fileobj=file, mtime=0) as packed:
            for kind, body in rows:
                packed.write(b"%s %s\n" % (kind.encode(), body))
                count += 1
        file.flush()
        os.fsync(file.fileno())
    digest = _digest(partial)
    partial.rename(path)
    sync_folder(folder)
    return Segment(first, first + count - 1, digest)


def read_segment(folder: Path, segment: Segment) -> Iterator[Row]:
    """Its events. OSError if the file is not there, ValueError if it is not what was written."""
    path = folder / segment.name
    if _digest(path) != segment.digest:
        raise ValueError(f"{path} is not the file that was written")
    with gzip.open(path) as lines:
        for line in lines:
            kind, _, body = line.rstrip(b"\n").partition(b" ")
            yield kind.decode(), body


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()
