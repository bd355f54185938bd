"""`hivegrpo serve` in one process: its app on loopback, before engines whose answers the test writes."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from hivegrpo.peer.serving.app import Rules, build_app
from hivegrpo.peer.serving.backend import Backend
from hivegrpo.peer.serving.dialects import Transformers
from hivegrpo.peer.serving.engine import Engine
from hivegrpo.peer.serving.prompts import PromptReader
from hivegrpo.peer.serving.refusals import unavailable
from hivegrpo.peer.serving.releases import Release
from support.trained_run import byte_level_tokenizer

CONTEXT = 96
NAME = "tiny"
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}="
SECONDS = 30.0
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Without it every client loads a bundle of certificates, which takes longer than most tests here."""


def write_folder(folder: Path, template: str | None = TEMPLATE) -> Path:
    """What the proxy reads of an exported folder: all but the weights."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Script:
    """What a fake engine does, and what it has seen."""

    pieces: Sequence[str] = ("ab", "cd", "ef")
    hold_after: int | None = None
    """Pieces before it waits for `go`."""
    fail_after: int | None = None
    """Pieces before it breaks off."""
    error_after: int | None = None
    """Pieces before it sends an error, as transformers does."""
    status: int = 200
    requests: list[dict[str, Any]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    holding: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: int = 0
    most_at_once: int = 0

    def app(self) -> FastAPI:
        """Speaks like `transformers serve`: no [DONE], usage with the finish_reason."""
        app = FastAPI(openapi_url=None)

        @app.get("/health")
        async def health() -> Response:
            return JSONResponse({"status": "ok"})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            self.requests.append(await request.json())
            if self.status != 200:
                return JSONResponse({"detail": "no"}, self.status)
            return StreamingResponse(self._events(), media_type="text/event-stream")

        return app

    async def _events(self) -> AsyncIterator[str]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            for number, text in enumerate(self.pieces):
                if number == self.hold_after:
                    self.holding.set()
                    await self.go.wait()
                if number == self.fail_after:
                    return
                if number == self.error_after:
                    yield 'data: {"error": "bad "quotes" here"}\n\n'
                    return
                yield _chunk(text, None, None)
            yield _chunk("", "stop", {"completion_tokens": 7})
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.at_once -= 1


def _chunk(text: str, reason: str | None, usage: dict[str, int] | None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice], 'usage': usage})}\n\n"


class FakeChild:
    """A process that ends when the test says so."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    @property
    def running(self) -> bool:
        return not self.over.is_set()

    async def ended(self) -> int:
        await self.over.wait()
        return 1

    async def stop(self) -> None:
        self.over.set()

    def said(self) -> str:
        return "It said last: out of memory"


class QuietServer(uvicorn.Server):
    """Leaves signals to pytest."""

    def capture_signals(self) -> Any:
        return nullcontext()


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """The app on a free port of loopback; its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        server = QuietServer(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


@dataclass
class Bed:
    """A proxy with one engine, and a client."""

    url: str
    client: openai.AsyncOpenAI
    script: Script
    engine: Engine

    async def post(self, path: str, method: str = "POST", **options: Any) -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=self.url, timeout=SECONDS, verify=NO_TLS) as client:
            return await client.request(method, path, **options)


class Alone:
    """One engine, or none."""

    def __init__(self, engine: Engine | None) -> None:
        self.engine = engine

    @property
    def current(self) -> Engine:
        if self.engine is None or self.engine.lost:
            raise unavailable("none")
        return self.engine


@asynccontextmanager
async def fake_engine(folder: Path, reader: PromptReader, script: Script, version: str = "1") -> AsyncIterator[Engine]:
    """An engine whose process is a fake one; its reader outlives it."""
    async with listening(script.app()) as url:
        backend = Backend(url)
        try:
            yield Engine(Release(folder, NAME, version), FakeChild(), backend, reader, Transformers("cpu"))
        finally:
            await backend.close()


@asynccontextmanager
async def serving(
    folder: Path,
    reader: PromptReader,
    script: Script,
    *,
    api_key: str | None = None,
    queue: int = 100,
    body: int = 4096,
) -> AsyncIterator[Bed]:
    """The app before a fake engine. The client never tries again by itself."""
    async with fake_engine(folder, reader, script) as engine:
        rules = Rules((NAME,), api_key, queue, body)
        async with (
            listening(build_app(Alone(engine), rules)) as url,
            client_of(url, api_key or "none") as client,
        ):
            yield Bed(url, client, script, engine)


@asynccontextmanager
async def client_of(url: str, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own."""
    async with (
        httpx2.AsyncClient(timeout=SECONDS, verify=NO_TLS, limits=httpx2.Limits(max_connections=None)) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=http) as client,
    ):
        yield client
