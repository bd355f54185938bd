"""The HTTP of an engine, of which nothing is believed: every wait and every size has a bound."""

import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx2

from hivegrpo.protocol.errors import RemoteError

STALL_SECONDS = 300.0
"""Longest wait for the next piece of an answer; the first needs the whole prompt computed."""
HEALTH_SECONDS = 2.0
MAX_EVENT_BYTES = 1 << 20
MAX_ANSWER_CHARACTERS = 1 << 24
MAX_ERROR_BYTES = 1 << 16
IDLE_SECONDS = 2.0
"""How long an idle connection is kept: less than engines keep theirs, or one would close as it is used."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    text: str
    finish_reason: str | None = None
    """In the last piece: "stop" or "length"."""
    tokens: int | None = None
    """In the last piece: of the whole answer, if the engine counted them."""


class Backend:
    """A client of one engine."""

    def __init__(self, base_url: str) -> None:
        self._client = httpx2.AsyncClient(
            base_url=base_url,
            timeout=httpx2.Timeout(STALL_SECONDS, connect=5.0, write=30.0),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # of no use on loopback, and without it a bundle is loaded
        )

    async def healthy(self) -> bool:
        """Whether it says that it is ready."""
        try:
            async with self._client.stream("GET", "/health", timeout=HEALTH_SECONDS) as response:
                return response.status_code == 200
        except httpx2.HTTPError:
            return False

    async def generate(self, payload: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer, the last with a finish_reason. Leaving early tells the engine to stop.

        RemoteError if it refuses, fails, falls silent, or ends before the answer does.
        """
        try:
            async with self._client.stream("POST", "/v1/completions", json=payload) as response:
                if response.status_code != 200:
                    raise RemoteError(f"the engine answers {response.status_code}: {await _start_of(response)}")
                async with aclosing(_pieces(response)) as pieces:
                    async for piece in pieces:
                        yield piece
        except httpx2.HTTPError as error:
            raise RemoteError(f"the engine is lost: {str(error) or type(error).__name__}") from None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


async def _pieces(response: httpx2.Response) -> AsyncGenerator[Piece, None]:
    """Usage may come with the finish_reason, or after it without a choice."""
    characters, reason, tokens = 0, None, None
    async for event in httpx2.EventSource(response, MAX_EVENT_BYTES):
        if event.data == "[DONE]":
            break
        text, ended, counted = _parse(event.data)
        reason, tokens = ended or reason, counted if counted is not None else tokens
        characters += len(text)
        if characters > MAX_ANSWER_CHARACTERS:
            raise RemoteError(f"the engine's answer is over {MAX_ANSWER_CHARACTERS} characters")
        if text:
            yield Piece(text)
    if reason is None:
        raise RemoteError("the engine's answer breaks off")
    yield Piece("", reason, tokens)


def _parse(data: str) -> tuple[str, str | None, int | None]:
    """Text, finish_reason and tokens of a chunk of a completion."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise RemoteError(f"the engine failed: {str(chunk['error'])[:MAX_ERROR_BYTES]}")
        usage = chunk.get("usage") or {}
        tokens = usage.get("completion_tokens")
        choice = chunk["choices"][0] if chunk["choices"] else {}
        text, reason = choice.get("text") or "", choice.get("finish_reason")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        # transformers puts its errors into JSON without escaping them.
        raise RemoteError(f"the engine sends something else than a completion: {data[:200]!r}") from None
    if not isinstance(text, str) or reason not in (None, "stop", "length") or not isinstance(tokens, int | None):
        raise RemoteError(f"the engine sends something else than a completion: {data[:200]!r}")
    return text, reason, tokens


async def _start_of(response: httpx2.Response) -> str:
    text = b""
    async for chunk in response.aiter_bytes():
        text += chunk[:MAX_ERROR_BYTES]
        if len(text) >= MAX_ERROR_BYTES:
            break
    return text[:200].decode(errors="replace")
