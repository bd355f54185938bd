"""`hivegrpo serve`."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hivegrpo.cli.output import Record, Show, configure_logging, json_lines, short_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.peer.inference.origin import is_exported
from hivegrpo.protocol.errors import BusyError, ConfigError
from hivegrpo.protocol.limits import open_files

try:
    import uvicorn

    from hivegrpo.peer.serving.app import Rules, build_app
    from hivegrpo.peer.serving.dialects import choose_dialect
    from hivegrpo.peer.serving.engine import Launcher
    from hivegrpo.peer.serving.engines import Engines
    from hivegrpo.peer.serving.process import kill_all
    from hivegrpo.peer.serving.releases import Release, folder_release
    from hivegrpo.peer.serving.settings import ServeConfig
    from hivegrpo.peer.serving.source import Source
    from hivegrpo.peer.serving.streaming import SEND_SECONDS
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"`hivegrpo serve` needs {missing.name}.", "Install it: pip install 'hivegrpo[serving]'."
    ) from None

STOP_SECONDS = 120
"""How long requests in work may take after the first Ctrl-C."""
BACKLOG = 1024
CONNECTIONS = 4096
OTHER_FILES = 256
"""Open files that are no client's connection: engines', their pipes, the model's."""

T = TypeVar("T")


def launch(run: str | None, flags: dict[str, Any], *, revision: str, as_json: bool, verbose: bool) -> None:
    """Serve RUN, or an exported folder, until stopped: the first Ctrl-C lets requests finish, the second does not.

    Engines end with this process, however it ends: on Linux the kernel sees to it.
    """
    signals = StopSignals("the endpoint", kill_all)
    configure_logging(verbose)
    settings = ServeConfig.load(**flags)
    exported = is_exported(run)
    if settings.follow is not None and (exported or revision != "latest"):
        what = "an exported folder" if exported else f"--revision {revision}"
        raise ConfigError(f"--follow looks for newer versions, and {what} stays the same.", "Leave one of them out.")
    asyncio.run(_serve(run, exported, revision, settings, signals, as_json))


async def _serve(
    run: str | None, exported: bool, revision: str, settings: ServeConfig, signals: StopSignals, as_json: bool
) -> None:
    stop = asyncio.Event()
    signals.bind(stop)
    show = json_lines(stop) if as_json else short_lines(_describe)
    launcher = Launcher(choose_dialect(settings.engine, settings.device))
    with _listening(settings.host, settings.port) as listener:
        source, engines = Source(run, revision, settings.follow, show), Engines(launcher, show)
        try:
            first = await _unless(stop, _get_first(run if exported else None, revision, source, show))
            if first is None or await _unless(stop, _open(engines, first)) is None:
                return
            names = settings.names or (first.name,)
            key = settings.api_key.get_secret_value() if settings.api_key is not None else None
            rules = Rules(names, key, settings.queue, settings.max_body_bytes)
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            async with _answering(build_app(engines, rules), listener) as serving:
                show({"kind": "listening", "url": url, "models": list(names), "key": key is not None})
                if not as_json:
                    print(url, flush=True)
                following = [source.follow(engines)] if settings.follow is not None else []
                await _first_of(stop.wait(), asyncio.wait([serving]), engines.failed(), *following)
        finally:
            await source.close()
            await engines.close()
            show({"kind": "stopped"})


async def _get_first(folder: str | None, revision: str, source: Source, show: Show) -> Release:
    if folder is not None:
        return await asyncio.to_thread(folder_release, Path(folder), revision)
    show({"kind": "preparing"})
    return await source.first()


async def _open(engines: Engines, release: Release) -> bool:
    await engines.switch(release)
    return True


@contextmanager
def _listening(host: str, port: int) -> Generator[socket.socket, None, None]:
    """A socket at an address, which nobody can connect to yet. BusyError if the port is taken.

    Who does not read what is sent for `SEND_SECONDS` loses the connection: no answer that ends could close it.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have it from their listener
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(SEND_SECONDS * 1000))
            listener.bind(address)
            yield listener
    except socket.gaierror as error:
        raise ConfigError(f"There is no address {host}: {error}.", "Give one of this machine with --host.") from None
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise
        raise BusyError(f"Port {port} of {host} cannot be had: {error}.", "Give another with --port.") from None


def _most_connections() -> int:
    """`CONNECTIONS`, or as many as this process may have files open for; raises that limit as far as is needed."""
    files = open_files(CONNECTIONS + OTHER_FILES)
    return min(CONNECTIONS, max(files - OTHER_FILES, files // 2))


class _Server(uvicorn.Server):
    """Leaves the signals to us."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def _answering(app: Any, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
    """Serve the app on a socket; leaving lets requests finish, for `STOP_SECONDS`. Its task ends only by failing."""
    config = uvicorn.Config(
        app,
        backlog=BACKLOG,
        limit_concurrency=_most_connections(),
        timeout_graceful_shutdown=STOP_SECONDS,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        proxy_headers=False,
    )
    server = _Server(config)
    listener.listen(BACKLOG)  # who is told of the address may connect at once, and waits until the server has started
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield serving
    finally:
        server.should_exit = True
        await serving


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The outcome of `work`; None, with the work cancelled, if it is to stop first."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(working, stopping)


async def _first_of(*works: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of them is done, raise what it raises, and cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await _end(*tasks)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _describe(record: Record) -> tuple[str, str]:
    match record["kind"]:
        case "preparing":
            return "preparing", "Getting the model ready."
        case "listening":
            key = "with the API key" if record["key"] else "without a key"
            return "listening", f"Answers at {record['url']}, {key}, as {', '.join(record['models'])}."
        case "serving":
            return f"serving {record['version']}", f"Version {record['version']} of {record['model']} is served."
        case "drained":
            how = "has answered its last request" if record["done"] else "was ended with requests in work"
            return f"drained {record['version']}", f"Version {record['version']} {how}."
        case "lost":
            return "lost", f"The engine was lost, and is started again. {record['said']}"
        case "trouble":
            return record["message"], record["message"]
        case _:
            return "stopped", "Stopped."
