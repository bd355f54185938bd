"""The HTTP of `hivegrpo serve`: who may ask, how much, and for which model; the engine does the rest."""

import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hivegrpo.peer.serving.answers import Answers, Json
from hivegrpo.peer.serving.engine import Engine
from hivegrpo.peer.serving.origins import OnlyLocal
from hivegrpo.peer.serving.refusals import Refusal
from hivegrpo.peer.serving.requests import Wanted, read_chat, read_completion
from hivegrpo.peer.serving.streaming import EventStream, HungUp, read_body, unless_gone

BODY_SECONDS = 30.0


class Serving(Protocol):
    """What the app needs to know of engines."""

    @property
    def current(self) -> Engine:
        """The engine for a new request; Refusal while there is none."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What this endpoint lets in."""

    names: tuple[str, ...]
    """Of the model, for its clients."""
    api_key: str | None
    queue: int
    """Requests in work or waiting."""
    max_body_bytes: int


def build_app(engines: Serving, rules: Rules) -> FastAPI:
    """The application; every error that it answers with has OpenAI's form."""
    app = FastAPI(openapi_url=None)
    endpoint = _Endpoint(engines, rules)
    for path, function, method in (
        ("/v1/chat/completions", endpoint.chat, "POST"),
        ("/v1/completions", endpoint.completion, "POST"),
        ("/v1/models", endpoint.models, "GET"),
        ("/v1/models/{name:path}", endpoint.model, "GET"),
        ("/health", endpoint.health, "GET"),
    ):
        app.add_api_route(path, function, methods=[method], response_model=None)
    if rules.api_key is None:
        app.add_middleware(OnlyLocal)
    app.add_exception_handler(Refusal, _refuse)
    app.add_exception_handler(HTTPException, _refuse_page)
    app.add_exception_handler(HungUp, _say_nothing)
    app.add_exception_handler(Exception, _fail)
    return app


class _Endpoint:
    def __init__(self, engines: Serving, rules: Rules) -> None:
        self._engines = engines
        self._rules = rules
        self._places = rules.queue
        self._begun = int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._rules.names]})

    async def model(self, request: Request, name: str) -> Response:
        self._authorize(request)
        self._require_name(name)
        return JSONResponse(self._model(name))

    async def health(self) -> Response:
        """Open to all, for load balancers; Refusal while nothing answers."""
        release = self._engines.current.release
        return JSONResponse({"status": "ok", "model": release.name, "version": release.version})

    async def _answer(self, request: Request, read: Callable[[bytes], Wanted]) -> Response:
        self._authorize(request)
        # A page in a browser can send anything but this to another site unasked.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, None, "The request's content-type is not application/json.")
        async with AsyncExitStack() as closing:
            # Before the body is read: so the queue bounds the memory that bodies take.
            closing.enter_context(self._place())
            wanted = read(await read_body(request, self._rules.max_body_bytes, BODY_SECONDS))
            self._require_name(wanted.model)
            engine = closing.enter_context(self._engines.current.request())
            answers = await unless_gone(request.receive, Answers.prepare(wanted, engine))
            if not wanted.stream:
                return JSONResponse(await unless_gone(request.receive, answers.whole()))
            chunks = await closing.enter_async_context(aclosing(answers.chunks()))
            # What fails before the first piece still gets a status of its own.
            first: Json = await unless_gone(request.receive, anext(chunks))
            return EventStream(first, chunks, closing.pop_all())

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._places == 0:
            raise Refusal(429, "queue_full", f"{self._rules.queue} requests wait already.", "Try again in a moment.")
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    def _authorize(self, request: Request) -> None:
        if self._rules.api_key is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode("latin-1"), self._rules.api_key.encode())
        if kind.lower() != "bearer" or not same:
            raise Refusal(401, "invalid_api_key", "The API key is missing or wrong.", "Send it as Bearer token.")

    def _require_name(self, name: str) -> None:
        if name not in self._rules.names:
            raise Refusal(
                404,
                "model_not_found",
                f"There is no model {name[:100]!r} here.",
                f"There is {', '.join(self._rules.names)}.",
                param="model",
            )

    def _model(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": self._begun, "owned_by": "hivegrpo"}


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse_page(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, None, f"{error.detail}.", "See docs/serve.md for what there is.")
    return JSONResponse(refusal.body, error.status_code, error.headers)


async def _say_nothing(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _fail(_request: Request, _error: Exception) -> Response:
    return JSONResponse(Refusal(500, None, "This server failed; its log says how.").body, 500)
