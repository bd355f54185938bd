"""`hivegrpo peer run`."""

import asyncio
import os
from pathlib import Path
from typing import Any

import uvloop

from hivegrpo.cli.network import Network
from hivegrpo.cli.output import Record, configure_logging, json_lines, short_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.cli.threads import fair_threads
from hivegrpo.protocol.address import check_run_id, parse_address
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport


def launch(address: str, flags: dict[str, Any], *, run_id: str | None, as_json: bool, verbose: bool) -> None:
    """Work in the run at `address` until it is finished, or this peer is stopped."""
    signals = StopSignals("this peer")
    configure_logging(verbose)
    parse_address(address)
    check_run_id(run_id)
    settings = PeerConfig.load(**flags)
    threads = settings.threads or fair_threads()
    # Before torch is imported: its pools take their size from here.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    uvloop.run(_run(address, run_id, settings.model_copy(update={"threads": threads}), signals, as_json))


async def _run(address: str, run_id: str | None, settings: PeerConfig, signals: StopSignals, as_json: bool) -> None:
    from hivegrpo.peer.daemon import run_peer

    async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
        return await network.open(identity, key.parent, settings, [address], settings.upload_mbit)

    stop = asyncio.Event()
    signals.bind(stop)
    show = json_lines(stop) if as_json else short_lines(_describe)
    network = Network()
    await network.run(run_peer(address, settings, stop, show, make_transport=make_transport, run_id=run_id))


def _describe(record: Record) -> tuple[str, str]:
    match record["kind"]:
        case "joining":
            return "joining", f"Joining run {record['run_id'][:16]} as {record['peer']}, in {record['home']}."
        case "status":
            speed = f", {record['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in record else ""
            return f"{record['version']} {record['state']}", f"version {record['version']}, {record['state']}{speed}"
        case _:
            return "left", f"Left at version {record['version']}, state root {record['state_root'][:16]}."
