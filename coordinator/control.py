"""The coordinator's local socket, in its home: one JSON line in, one out. docs/operations.md has the protocol.

Whoever can open the socket may do anything with the run: it belongs to the coordinator's user alone.
"""

import asyncio
import json
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from hivegrpo.coordinator.orders import Order, read_order
from hivegrpo.protocol.errors import BusyError, ConfigError, HiveError, WireError

SOCKET_FILE = "control.sock"
MAX_REQUEST = 1 << 16
MAX_ANSWER = 1 << 26
"""Bytes of a line: the status of ten thousand peers is some 4 MB."""

REQUEST_SECONDS = 10.0
ANSWER_SECONDS = 60.0
MAX_CLIENTS = 8
"""That are heard at once; the others wait."""

Execute = Callable[[Order], Awaitable[dict[str, Any]]]

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve_control(home: Path, execute: Execute) -> AsyncIterator[None]:
    """Answer orders in `home`, whose lock the caller holds."""
    clients: set[asyncio.Task[Any]] = set()
    places = asyncio.Semaphore(MAX_CLIENTS)

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        try:
            async with places:
                await _send(writer, await _answer(reader, execute))
        except (OSError, TimeoutError) as error:
            log.debug("a command's client went away", reason=str(error))
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            clients.discard(task)

    path = home / SOCKET_FILE
    server = await asyncio.start_unix_server(on_client, sock=_bound(home), limit=MAX_REQUEST)
    try:
        yield
    finally:
        server.close()
        for client in list(clients):
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        path.unlink(missing_ok=True)


def _bound(home: Path) -> socket.socket:
    """A socket in `home` that nobody else may connect to, at any moment: it listens only once its mode is set."""
    (home / SOCKET_FILE).unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(home) as path:
        made.bind(str(path))
    (home / SOCKET_FILE).chmod(0o600)
    return made


@contextmanager
def short_path(home: Path) -> Iterator[Path]:
    """A path to a home's socket, which systems want to be below 104 bytes, however long the home's own is."""
    with tempfile.TemporaryDirectory(prefix="hive-", dir="/tmp") as folder:
        link = Path(folder) / "h"
        link.symlink_to(home.resolve())
        yield link / SOCKET_FILE


async def _answer(reader: asyncio.StreamReader, execute: Execute) -> dict[str, Any]:
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            line = await reader.readline()
        order = read_order.validate_json(line)
        async with asyncio.timeout(ANSWER_SECONDS):
            return {"ok": True, "answer": await execute(order)}
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:])) or "the order"
        return _refused(ConfigError(f"{place}: {first['msg']}.", "docs/operations.md, Operating, has the commands."))
    except ValueError:
        return _refused(ConfigError(f"An order has at most {MAX_REQUEST} bytes.", "It is one line of JSON."))
    except WireError as error:
        return _refused(BusyError(f"{error}.".capitalize(), "Try again once it is up."))
    except HiveError as error:
        return _refused(error)


def _refused(error: HiveError) -> dict[str, Any]:
    return {"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}


async def _send(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
    async with asyncio.timeout(REQUEST_SECONDS):
        await writer.drain()
