"""What a peer and the process of its reward functions say to each other: JSON, each message after its length."""

import json
import socket
from typing import Any

MAX_BYTES = 64 << 20
"""Of one message."""

_HEADER = 4
_CHUNK = 1 << 16


def encode(message: dict[str, Any]) -> bytes:
    """A frame, in which things that JSON has no form for are their text. ValueError if it is too long, or too deep."""
    try:
        body = json.dumps(message, default=str, separators=(",", ":")).encode("ascii")
    except (RecursionError, TypeError) as error:
        raise ValueError(f"cannot be written as JSON: {type(error).__name__}") from error
    if len(body) > MAX_BYTES:
        raise ValueError(f"is longer than {MAX_BYTES} bytes")
    return len(body).to_bytes(_HEADER, "big") + body


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
