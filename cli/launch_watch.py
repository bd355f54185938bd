"""`hivegrpo watch`: a run's chain, verified as it grows, without taking part and without torch or hivemind."""

import importlib.util
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from hivegrpo.cli.output import Record, describe_version
from hivegrpo.protocol.address import check_run_id, parse_address
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.errors import ChainError, ConfigError
from hivegrpo.protocol.lightclient import LightClient, planned_versions
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.base import Dials

Show = Callable[[Record], None]


def launch(
    address: str, *, run_id: str | None, home: Path | None, first: int | None, once: bool, as_json: bool
) -> None:
    """Print versions until the run's last one, or until stopped; ConfigError without the extra `watch`."""
    parse_address(address)
    check_run_id(run_id)
    if importlib.util.find_spec("libp2p") is None:
        raise ConfigError("`hivegrpo watch` needs py-libp2p.", "Install it: pip install 'hivegrpo[watch]'.")
    from hivegrpo.protocol.transport.light import LightTransport, run_light

    show = show_json if as_json else show_line

    async def work(transport: LightTransport) -> None:
        await watch(transport, address, show, sleep=transport.sleep, run_id=run_id, home=home, first=first, once=once)

    try:
        run_light(work)
    except BrokenPipeError:
        # The interpreter flushes stdout when it exits, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def watch(
    transport: Dials,
    address: str,
    show: Show,
    *,
    sleep: Callable[[float], Awaitable[None]],
    run_id: str | None = None,
    home: Path | None = None,
    first: int | None = None,
    once: bool = False,
) -> None:
    """`show` the run, then its versions from `first` on (by default the newest), as they are verified.

    ChainError if something does not verify; a record of it is shown first.
    """
    following: int | None = None

    def on_news(chain: Chain) -> None:
        nonlocal following
        if following is None:
            show(_run_record(chain, address))
            following = max(chain.height, 0) if first is None else first
        for version in range(following, chain.height + 1):
            show(_version_record(chain, version))
        following = max(following, chain.height + 1)

    with LightClient(transport, address, run_id=run_id, home=home, sleep=sleep) as client:
        try:
            await client.follow(on_news, once=once)
        except ChainError as error:
            show({"kind": "refused", "error": type(error).__name__, "message": error.message})
            raise


def _run_record(chain: Chain, address: str) -> Record:
    return {
        "kind": "run",
        "run_id": chain.run_id,
        "coordinator": chain.coordinator,
        "address": address,
        "version": chain.height,
        "versions": planned_versions(chain),
    }


def _version_record(chain: Chain, version: int) -> Record:
    """Like a coordinator's, but everything in it is verified, the contributors by the seal."""
    entry = chain.entries[version]
    manifest = entry.manifest.message
    return {
        "kind": "version",
        "version": version,
        "versions": planned_versions(chain),
        "manifest": entry.manifest.digest.hex(),
        "state_root": manifest.state.root.hex(),
        "coordinator": chain.signer_of(version),
        "reference_version": manifest.reference_version,
        "contributors": [sealed.peer for sealed in entry.seal.message.contributors] if entry.seal else [],
        "metrics": dict(manifest.metrics),
    }


def show_json(record: Record) -> None:
    """A line of JSON."""
    print(json.dumps(record, separators=(",", ":")), flush=True)


def show_line(record: Record) -> None:
    """A line for people."""
    match record["kind"]:
        case "run":
            count = record["version"] + 1
            print(f"Run {record['run_id']} of {record['coordinator']}: {count} versions verified.", flush=True)
        case "version":
            peers = " ".join(printable(peer[-6:]) for peer in record["contributors"])
            print("  ".join([describe_version(record), *([f"by {peers}"] if peers else [])]), flush=True)
