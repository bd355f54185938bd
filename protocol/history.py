"""What a node did, one JSON object a line, for people and for the invariant checker (`invariants`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class History:
    """Appends records {"kind": ..., ...} to a file.

    Each is with the operating system before `record` returns: it outlives this process, however that ends, though not a
    machine that goes down. A sync to disk would hold up the event loop in the middle of a round, for what nothing but
    people and checks depend on.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def record(self, kind: str, **fields: Any) -> None:
        """Append one record; bytes are written as hex."""
        line = json.dumps({"kind": kind, **fields}, default=_hex, separators=(",", ":"))
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def read_history(path: Path) -> Iterator[Record]:
    """The records of a file, oldest first; a last line that a crash cut short is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _hex(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"cannot record a {type(value).__name__}")
