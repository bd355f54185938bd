"""`hivegrpo coordinator run`."""

import asyncio
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from hivegrpo.cli.coordinator_home import KEY_FILE, open_home
from hivegrpo.cli.judge import judge_apart
from hivegrpo.cli.network import Network, best_first
from hivegrpo.cli.output import Record, Show, configure_logging, describe_version, json_lines, short_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.coordinator.control import serve_control
from hivegrpo.coordinator.events import Event, PeerReady, StepReported, VersionCommitted
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.coordinator.state import State
from hivegrpo.peer.inference.cost import Cost, cost_of, describe_cost
from hivegrpo.peer.inference.locate import BLOBS
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import read_run
from hivegrpo.protocol.config import CoordinatorConfig, RunConfig
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity

STATUS_SECONDS = 1.0
REPEAT_SECONDS = 5.0


def launch(config: Path, flags: dict[str, Any], *, new: bool, as_json: bool, verbose: bool) -> None:
    """Serve the run of a run.toml until it is stopped, or finished if it is to end then."""
    signals = StopSignals("the coordinator")
    configure_logging(verbose)
    settings = CoordinatorConfig.load(**flags)
    run = RunConfig.load(config)
    with open_home(run, settings.home, new=new) as home:
        uvloop.run(_run(home, settings, signals, as_json))


async def _run(home: Path, settings: CoordinatorConfig, signals: StopSignals, as_json: bool) -> None:
    stop = asyncio.Event()
    signals.bind(stop)
    show = json_lines(stop) if as_json else short_lines(_describe)
    network = Network()
    await network.run(_serve(home, settings, network, stop, show, as_json))


async def _serve(
    home: Path, settings: CoordinatorConfig, network: Network, stop: asyncio.Event, show: Show, as_json: bool
) -> None:
    identity = Identity.load_or_create(home / KEY_FILE)
    chain = read_run(home, identity.peer_id)
    transport = await network.open(identity, home, settings)
    try:
        config = RunConfig.from_json(chain.manifest.message.config)
        with closing(EventLog(home / LOG_FILE, chain.run_id)) as log:
            coordinator = Coordinator(
                identity=identity,
                transport=transport,
                log=log,
                run=chain.run,
                config=config,
                home=home,
                blobs=BlobStore(home / BLOBS),
                on_event=lambda event, state: _show_event(event, state, show),
                exit_when_finished=settings.exit_when_finished,
                judge_proof=partial(judge_apart, chain.run_id),
            )
            addresses = best_first(transport.addresses())
            show(
                {
                    "kind": "started",
                    "run_id": chain.run_id,
                    "home": str(home),
                    "version": coordinator.chain.chain.height,
                    "address": addresses[0],
                    "addresses": addresses,
                    "admission": config.admission.mode,
                }
            )
            if not as_json:
                token = " --invite TOKEN" if config.admission.mode == "invite" else ""
                print(f"hivegrpo peer run {addresses[0]}{token}", flush=True)
            watching = asyncio.create_task(_show_status(coordinator, show))
            try:
                async with serve_control(home, coordinator.operator.execute):
                    await coordinator.run(stop)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                cost = asdict(cost_of(coordinator.chain.chain.entries))
                show({"kind": "stopped", **coordinator.snapshot(), "cost": cost})
    finally:
        await transport.close()


async def _show_status(coordinator: Coordinator, show: Show) -> None:
    """At once when something has changed, else now and then, so that a reader who has gone away is noticed."""
    shown: Record = {}
    repeat = 0.0
    while True:
        record = {"kind": "status", **coordinator.snapshot()}
        now = time.monotonic()
        if record != shown or now >= repeat:
            show(record)
            shown, repeat = record, now + REPEAT_SECONDS
        await asyncio.sleep(STATUS_SECONDS)


def _show_event(event: Event, state: State, show: Show) -> None:
    """Versions, and the state root that each peer has for them, as its vote or when it said what it holds."""
    match event:
        case VersionCommitted():
            assert state.head is not None
            manifest = state.head.manifest
            show(
                {
                    "kind": "version",
                    "version": manifest.version,
                    "versions": state.terms.config.run.versions,
                    "state_root": manifest.state.root.hex(),
                    "contributors": [contributor.peer for contributor in manifest.contributors],
                    "metrics": dict(manifest.metrics),
                }
            )
        case PeerReady(peer=peer, version=version, state_root=root):
            show({"kind": "root", "peer": peer, "version": version, "state_root": root.hex(), "metrics": {}})
        case StepReported(signed=envelope):
            signed = parse(pb.Signed, envelope)
            vote = parse(pb.StepReport, signed.payload)
            show(
                {
                    "kind": "root",
                    "peer": signed.signer,
                    "version": vote.version,
                    "state_root": vote.state_root.hex(),
                    "metrics": dict(vote.metrics),
                }
            )


def _describe(record: Record) -> tuple[str, str]:
    match record["kind"]:
        case "started":
            how = "goes on" if record["version"] >= 0 else "begins"
            invited = " (tokens: hivegrpo coordinator invite)" if record["admission"] == "invite" else ""
            return "started", f"Run {record['run_id'][:16]} {how}, in {record['home']}. Peers join with{invited}:"
        case "version":
            return f"version {record['version']}", describe_version(record)
        case "status":
            peers = "  ".join(f"{peer['peer'][-6:]} {peer['state']}" for peer in record["peers"])
            paused = "paused" if record["paused"] else ""
            line = "; ".join(part for part in (record["trouble"], paused, f"peers: {peers or 'none yet'}") if part)
            return line, line
        case "root":
            return "", ""
        case _:
            cost = describe_cost(Cost(**record["cost"]))
            return "stopped", f"Stopped at version {record['version']} of {record['versions']}. {cost}"
