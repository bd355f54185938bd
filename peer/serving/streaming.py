"""Answers to clients that may hang up: the work for them ends with them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hivegrpo.peer.serving.refusals import Refusal

T = TypeVar("T")
SEND_SECONDS = 60.0
"""How long a client may take to read a part of a stream."""
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger(__name__)


class HungUp(Exception):
    """The client has gone."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, whose request has been read whole; HungUp, with the work cancelled, once the client has gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each a JSON object, and [DONE]. One that fails ends with an event that says so instead."""

    media_type = "text/event-stream"

    def __init__(
        self, first: dict[str, Any], rest: AsyncIterator[dict[str, Any]], closing: AbstractAsyncContextManager[Any]
    ) -> None:
        """first: what came of the stream already; `closing` is entered, and left in the end."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._first = first
        self._rest = rest
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._closing:
                await unless_gone(receive, self._send_all(send))
        except (HungUp, TimeoutError):
            return

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await _send(send, _event(self._first))
            async for chunk in self._rest:
                await _send(send, _event(chunk))
            last = DONE
        except Refusal as refusal:
            last = _event(refusal.body)
        except TimeoutError:
            raise
        except Exception:
            log.exception("a stream failed")
            last = _event(Refusal(500, None, "The answer broke off by an error of this server.").body)
        await _send(send, last)
        await _send(send, b"", more=False)


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": more})


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The request's body; Refusal if it is over `limit` bytes, or does not come in time. HungUp if it never ends."""
    too_large = Refusal(413, "request_too_large", f"The request is over {limit} bytes.", "Send less.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refusal(408, None, f"The request took over {seconds:.0f} seconds to arrive.", "Try again.") from None
