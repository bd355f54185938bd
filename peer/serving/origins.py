"""Keeps web pages out of an endpoint that has no key: a browser on this machine reaches loopback for any site.

A site can point its own name at 127.0.0.1 after its page is loaded (DNS rebinding): then the browser takes the endpoint
for the site itself, and only the Host header, which still has the site's name, tells.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from hivegrpo.peer.serving.refusals import Refusal
from hivegrpo.peer.serving.settings import is_loopback


class OnlyLocal:
    """Lets requests to this machine's own names through, and of web pages only those that came from here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)


def _refusal(headers: Headers) -> Refusal | None:
    hosts = headers.getlist("host")
    for host in hosts:
        if not _is_here(host):
            return Refusal(
                403,
                "host_not_allowed",
                f"Without an API key this endpoint is only for this machine, not for {host[:100]!r}.",
                "Ask localhost, or start it with a key.",
            )
    for origin in headers.getlist("origin"):
        if origin.partition("://")[2].lower() not in [host.lower() for host in hosts]:
            return Refusal(
                403,
                "origin_not_allowed",
                f"Without an API key this endpoint is not for web pages of {origin[:100]!r}.",
                "Start it with a key.",
            )
    return None


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)
