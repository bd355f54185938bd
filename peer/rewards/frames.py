"""What a peer and the process of its reward functions say to each other: JSON, each message after its length."""

import json
import socket
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 64 << 20
"""Of one message."""

_JSON = json.JSONEncoder(default=str, separators=(",", ":"))
_LEVELS = 3
"""From a call to the values in the columns among its arguments."""

_HEADER = 4
_CHUNK = 1 << 16


def encode(message: dict[str, Any]) -> bytes:
    """A frame, in which things that JSON has no form for are their text. ValueError if it is too long, or too deep.

    A message that is too long is found out while it is written: never is more in memory than the limit and one value
    of a column.
    """
    body = bytearray()
    try:
        for part in _parts(message, _LEVELS):
            body += part.encode("ascii")
            if len(body) > MAX_BYTES:
                raise ValueError(f"is longer than {MAX_BYTES} bytes")
    except (RecursionError, TypeError) as error:
        raise ValueError(f"cannot be written as JSON: {type(error).__name__}") from error
    return len(body).to_bytes(_HEADER, "big") + body


def _parts(value: Any, levels: int) -> Iterator[str]:
    """The JSON of a value, in one part for each value so many levels down."""
    if levels and type(value) is dict and all(type(key) is str for key in value):
        for number, (key, item) in enumerate(value.items()):
            yield f"{',' if number else '{'}{_JSON.encode(key)}:"
            yield from _parts(item, levels - 1)
        yield "}" if value else "{}"
    elif levels and type(value) is list:
        for number, item in enumerate(value):
            yield "," if number else "["
            yield from _parts(item, levels - 1)
        yield "]" if value else "[]"
    else:
        yield _JSON.encode(value)


class Channel:
    """One end of a pair of connected sockets."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._received = bytearray()

    @property
    def empty(self) -> bool:
        """Whether no part of a frame has come that `next` has not given."""
        return not self._received

    def send(self, frame: bytes) -> None:
        """OSError if the other side is gone, or does not read before the socket's timeout."""
        self.socket.sendall(frame)

    def receive(self) -> bool:
        """Take what has come, or wait for it; False if the other side is gone."""
        try:
            part = self.socket.recv(_CHUNK)
        except OSError:
            return False
        self._received += part
        return bool(part)

    def next(self, limit: int = MAX_BYTES) -> dict[str, Any] | None:
        """The next message, None while it is not whole; ValueError if it is longer than the limit, or no message."""
        length = int.from_bytes(self._received[:_HEADER], "big")
        if len(self._received) < _HEADER:
            return None
        if length > limit:
            raise ValueError(f"a message of {length} bytes, above {limit}")
        end = _HEADER + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_HEADER:end])
        del self._received[:end]
        try:
            message = json.loads(body)
        except (RecursionError, ValueError) as error:
            raise ValueError("a message that is no JSON") from error
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message
