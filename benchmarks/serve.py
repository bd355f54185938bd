"""What the proxy of `hivegrpo serve` costs: requests a second through it, over those of its engine alone.

    python benchmarks/serve.py [--requests 200]

The model is the demo's starter, whose answers take milliseconds: with a larger one the proxy's share is smaller.
"""

import argparse
import asyncio
import os
import socket
import ssl
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx2
import uvicorn

from hivegrpo.peer.serving.app import Rules, build_app
from hivegrpo.peer.serving.dialects import MODEL, Transformers
from hivegrpo.peer.serving.engine import Launcher
from hivegrpo.peer.serving.engines import Engines
from hivegrpo.peer.serving.releases import folder_release

STARTER = Path(str(files("hivegrpo.cli"))) / "addition" / "starter"
BODY = {"prompt": "12+34=", "max_tokens": 5, "temperature": 0}
WIDTH = 8
REPEATS = 3


class _Dialect(Transformers):
    """Remembers where its engine listens."""

    ports: list[int] = []  # noqa: RUF012 - one engine

    def command(self, port: int) -> list[str]:
        self.ports.append(port)
        return super().command(port)


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        return nullcontext()


async def rate(url: str, model: str, requests: int) -> float:
    """Requests a second of `WIDTH` clients that ask one after the other."""
    async with httpx2.AsyncClient(timeout=60, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:

        async def ask() -> None:
            for _ in range(requests // WIDTH):
                response = await client.post(f"{url}/v1/completions", json={"model": model, **BODY})
                assert response.status_code == 200, response.text

        before = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(WIDTH)))
        return requests // WIDTH * WIDTH / (time.perf_counter() - before)


async def main(requests: int) -> None:
    """Rates of both in turn, and their ratio."""
    engines = Engines(Launcher(_Dialect("cpu")), lambda record: None)
    await engines.switch(folder_release(STARTER))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = build_app(engines, Rules(("m",), None, 1000, 1 << 20))
        server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        alone = f"http://127.0.0.1:{_Dialect.ports[-1]}"
        through = f"http://127.0.0.1:{listener.getsockname()[1]}"
        rates: dict[str, list[float]] = {"alone": [], "through": []}
        measure: dict[str, Callable[[], Awaitable[float]]] = {
            "alone": lambda: rate(alone, MODEL, requests),
            "through": lambda: rate(through, "m", requests),
        }
        for _ in range(REPEATS):
            for name, run in measure.items():
                rates[name].append(await run())
        server.should_exit = True
        await serving
    await engines.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"engine alone {medians['alone']:.1f} requests/s, through the proxy {medians['through']:.1f}", end="")
    print(f": a ratio of {medians['through'] / medians['alone']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    asyncio.run(main(parser.parse_args().requests))
