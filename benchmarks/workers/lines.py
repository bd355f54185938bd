"""A worker's side of the conversation with the driver: one JSON object a line.

The driver reads the stdout that the process was started with; whatever else prints, logs among it, goes to stderr.
"""

import json
import os
import sys
from typing import Any

_driver = os.fdopen(os.dup(sys.stdout.fileno()), "w")
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def say(kind: str, **fields: Any) -> None:
    """Tell the driver."""
    print(json.dumps({"kind": kind, **fields}), file=_driver, flush=True)


def hear(kind: str) -> dict[str, Any] | None:
    """The driver's next line, which is of that kind; None when there are no more."""
    line = sys.stdin.readline()
    if not line:
        return None
    message: dict[str, Any] = json.loads(line)
    assert message["kind"] == kind, f"the driver said {message['kind']!r}, and {kind!r} was due"
    return message
