"""Whether a libp2p node answers at an address: a TCP connection and the greeting of multistream-select 1.0.0."""

import asyncio

from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.errors import ConfigError

GREETING = b"\x13/multistream/1.0.0\n"
"""Its length as a varint, and the line. Either side says it first, without waiting for the other."""


async def greets(address: str, timeout: float) -> bool:
    """Whether somebody greets back within `timeout` seconds; False also if the address cannot be dialled at all."""
    try:
        _, where = parse_address(address)
        _, _, host, _, port = where.split("/")
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(host, int(port), limit=len(GREETING))
            try:
                writer.write(GREETING)
                return await reader.readexactly(len(GREETING)) == GREETING
            finally:
                writer.transport.abort()
    except (ConfigError, OSError, EOFError, TimeoutError):
        return False
