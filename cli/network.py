"""A daemon's place on the real network."""

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivegrpo.protocol.config import DaemonConfig
from hivegrpo.protocol.errors import HiveError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.limits import open_files
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.rate import UploadCap

if TYPE_CHECKING:
    from hivegrpo.protocol.transport.p2p import P2PTransport

PORT_FILE = "port"

OPEN_FILES = 16_384
"""Each stream is one: a reducer of a full plan has some four thousand at once."""


class Network:
    """Opens the transport of this process, and notices when it is lost."""

    def __init__(self) -> None:
        self._opened: asyncio.Future[P2PTransport] = asyncio.get_running_loop().create_future()

    async def open(
        self,
        identity: Identity,
        home: Path,
        settings: DaemonConfig,
        initial_peers: Sequence[str] = (),
        upload_mbit: float | None = None,
    ) -> Transport:
        """Listen on the port of the settings, else on the one that this home had before, else on a free one.

        BusyError if another process has that port.
        """
        from hivegrpo.protocol.transport.p2p import P2PTransport

        open_files(OPEN_FILES)
        port = settings.port or kept_port(home)
        upload = None if upload_mbit is None else UploadCap(upload_mbit)
        transport = await P2PTransport.create(identity, settings.host, port, initial_peers, settings.dht, upload)
        write_whole(home / PORT_FILE, transport.addresses()[0].split("/")[4].encode())
        self._opened.set_result(transport)
        return transport

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`; HiveError if p2pd ends by itself before it is done."""
        working, losing = asyncio.create_task(work), asyncio.create_task(self._lose())
        try:
            await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise HiveError("The network process p2pd ended by itself.", "Start again: it resumes from its home.")
        finally:
            for task in (working, losing):
                task.cancel()
            await asyncio.gather(working, losing, return_exceptions=True)
        working.result()

    async def _lose(self) -> None:
        await (await self._opened).lost.wait()


def kept_port(home: Path) -> int:
    """The port that this home's daemon listened on last; 0 if it never did."""
    path = home / PORT_FILE
    text = path.read_text(encoding="ascii", errors="replace").strip() if path.is_file() else ""
    return int(text) if text.isdigit() and int(text) < 1 << 16 else 0


def best_first(addresses: Sequence[str]) -> list[str]:
    """Addresses that other machines can dial before those that only this one can, IPv4 before IPv6."""

    def rank(address: str) -> tuple[bool, bool]:
        _, kind, host, *_ = address.split("/")
        return (host.startswith("127.") or host == "::1", kind == "ip6")

    return sorted(addresses, key=rank)
