"""The p2pd child process: go-libp2p, which hivemind ships, started and ended by us.

hivemind's own `P2P.create` starts it in our process group, where Ctrl-C kills it before a node can take its leave. Here
it has a session of its own, gets its key through a pipe, and its control socket is in a folder of its own (mode 0700).
When this process dies without saying goodbye, p2pd sees its control connection end, and exits (in 0.1 s).
"""

import asyncio
import errno
import importlib.util
import ipaddress
import os
import shutil
import socket
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Self

import structlog

from hivegrpo.protocol.errors import BusyError, ConfigError, HiveError
from hivegrpo.protocol.identity import Identity

START_SECONDS = 30.0
STOP_SECONDS = 5.0
IDLE_SECONDS = 30
"""p2pd exits when nobody has taken control of it for this long."""

LAST_LINES = 20

log = structlog.get_logger(__name__)


class Daemon:
    """A running p2pd."""

    control: Path
    """Its control socket."""

    ended: asyncio.Event
    """Set when the process is gone, by `stop` or by itself."""

    def __init__(self, control: Path, process: asyncio.subprocess.Process) -> None:
        """Use `start`."""
        self.control = control
        self.ended = asyncio.Event()
        self._process = process
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._listening: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, identity: Identity, host: str, port: int, routing: bool) -> Self:
        """Listen on host:port as `identity`; `routing` joins libp2p's own DHT, which finds the addresses of peer ids.

        BusyError if the port is taken, ConfigError if this machine cannot listen there.
        """
        check_port(host, port)
        control = Path(tempfile.mkdtemp(prefix="hivegrpo-"), "control")
        try:
            self = cls(control, await _launch(identity, host, port, routing, control))
        except BaseException:
            shutil.rmtree(control.parent, ignore_errors=True)
            raise
        try:
            answered, _ = await asyncio.wait({self._listening}, timeout=START_SECONDS)
            if not (answered and self._listening.result()):
                raise self._failure(host, port)
        except BaseException:
            await self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    async def stop(self) -> None:
        """End the process and remove its socket; idempotent."""
        self._stopping = True
        for signal, patience in ((self._process.terminate, STOP_SECONDS), (self._process.kill, None)):
            with suppress(ProcessLookupError):
                signal()
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self.ended.wait()
                break
        shutil.rmtree(self.control.parent, ignore_errors=True)

    def _failure(self, host: str, port: int) -> HiveError:
        said = self._said[-1].rstrip() if self._said else "it said nothing"
        if "address already in use" in said:
            return _busy(host, port)
        return HiveError(f"p2pd did not start on {host} port {port}: {said}.", "Try another host or port.")

    async def _watch(self) -> None:
        """Read what p2pd prints, until it ends."""
        assert self._process.stdout is not None
        while line := await _line(self._process.stdout):
            self._said.append(line)
            log.debug("p2pd", line=line)
            if line.startswith("Peer ID:"):
                self._tell(listening=True)
        code = await self._process.wait()
        self.ended.set()
        if not self._tell(listening=False) and not self._stopping:
            log.error("p2pd ended by itself: this node is cut off", exit_code=code, said=list(self._said))

    def _tell(self, listening: bool) -> bool:
        """Answer `start`, unless it has its answer."""
        waiting = not self._listening.done()
        if waiting:
            self._listening.set_result(listening)
        return waiting


async def _launch(identity: Identity, host: str, port: int, routing: bool, control: Path) -> asyncio.subprocess.Process:
    address = ipaddress.ip_address(host)
    beyond = int(not address.is_loopback)
    key, key_writer = os.pipe()
    try:
        os.write(key_writer, identity.to_bytes())
        os.close(key_writer)
        return await asyncio.create_subprocess_exec(
            _p2pd(),
            f"-listen=/unix{control}",
            f"-hostAddrs=/ip{address.version}/{address}/tcp/{port}",
            f"-id=/dev/fd/{key}",
            f"-dhtServer={int(routing)}",
            f"-natPortMap={beyond}",
            f"-autonat={beyond}",
            "-connManager=1",
            f"-idleTimeout={IDLE_SECONDS}s",
            pass_fds=[key],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"GOLOG_LOG_LEVEL": "error", **os.environ},
            start_new_session=True,
        )
    finally:
        os.close(key)


async def _line(output: asyncio.StreamReader) -> str:
    """The next line, with its end; empty at the end of the output."""
    try:
        return (await output.readline()).decode(errors="replace")
    except ValueError:
        return "(a line too long to show)\n"


def check_port(host: str, port: int) -> None:
    """BusyError if somebody listens on host:port, ConfigError if we may not.

    Two p2pd would share a port (they set SO_REUSEPORT), and each would get some of the connections.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(
            f"{host!r} is not an IP address to listen on.",
            "Use 0.0.0.0 for every interface, 127.0.0.1 for this machine only.",
        ) from None
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _busy(host, port) from None
            raise ConfigError(
                f"This machine cannot listen on {host} port {port}: {error.strerror}.", "Choose another host or port."
            ) from None


def _busy(host: str, port: int) -> BusyError:
    return BusyError(
        f"Port {port} on {host} is in use.",
        "Another node may be running: stop it, or choose another --port (0 takes a free one).",
    )


def _p2pd() -> str:
    """Path of the program, found without importing hivemind (which takes two seconds)."""
    package = importlib.util.find_spec("hivemind")
    assert package is not None, "hivemind is a dependency"
    assert package.submodule_search_locations
    return str(Path(package.submodule_search_locations[0], "hivemind_cli", "p2pd"))
