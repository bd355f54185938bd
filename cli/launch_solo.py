"""`hivegrpo solo`."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hivegrpo.cli.output import Record, configure_logging, describe_version, json_lines, short_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.cli.threads import fair_threads
from hivegrpo.peer.inference.cost import Cost, describe_cost
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.homes import locked_home


def launch(
    config: Path, flags: dict[str, Any], *, home: Path | None, to: Path | None, as_json: bool, verbose: bool
) -> None:
    """Train the run of a run.toml until it is finished or stopped; then write the model to `to`, if it is finished."""
    signals = StopSignals("the training")
    configure_logging(verbose)
    settings = PeerConfig.load(**flags)
    run = RunConfig.load(config)
    threads = settings.threads or fair_threads()
    # Before torch is imported: its pools take their size from here.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from hivegrpo.cli.training import home_of
    from hivegrpo.peer.inference.export import require_free

    if to is not None:
        require_free(to)
    with locked_home(home or home_of(run)) as root:
        asyncio.run(_run(run, settings.model_copy(update={"threads": threads}), root, to, signals, as_json))


async def _run(
    config: RunConfig, settings: PeerConfig, home: Path, to: Path | None, signals: StopSignals, as_json: bool
) -> None:
    from hivegrpo.cli.training import Training
    from hivegrpo.peer.learn.cancel import Cancelled

    stop, cancelled = asyncio.Event(), threading.Event()
    signals.bind(stop)
    show = json_lines(stop) if as_json else short_lines(_describe)
    watching = asyncio.create_task(_pass_on(stop, cancelled))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="learn") as worker:
        on_worker = partial(asyncio.get_running_loop().run_in_executor, worker)
        training = await on_worker(Training.open, config, settings, home)
        place = {"home": str(home), "versions": config.run.versions}
        try:
            show({"kind": "started", "version": training.version, **place})
            with suppress(Cancelled):
                while not training.finished:
                    for record in await on_worker(training.advance, cancelled):
                        show(record)
                show({**await on_worker(training.conclude, cancelled), "cost": asdict(training.cost), **place})
                if to is not None:
                    await on_worker(training.export, to)
                    show({"kind": "written", "to": str(to)})
            if cancelled.is_set():
                show({"kind": "stopped", "version": training.version, **place})
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await on_worker(training.close)


async def _pass_on(stop: asyncio.Event, cancelled: threading.Event) -> None:
    await stop.wait()
    cancelled.set()


def _describe(record: Record) -> tuple[str, str]:
    match record["kind"]:
        case "started":
            how = f"goes on at version {record['version']}" if record["version"] else "begins"
            return "started", f"Training {how}, in {record['home']}."
        case "version":
            return f"version {record['version']}", describe_version(record)
        case "nothing":
            return f"nothing {record['position']}", f"nothing to learn: {record['note']}"
        case "finished":
            accuracy = record["metrics"].get("eval/accuracy")
            measured = "" if accuracy is None else f", accuracy {accuracy:.3f}"
            cost = describe_cost(Cost(**record["cost"]))
            return "finished", f"Finished at version {record['version']}{measured}. {cost}"
        case "written":
            return "written", f"Wrote the model to {record['to']}."
        case _:
            return "stopped", f"Stopped at version {record['version']} of {record['versions']}; start again to go on."
