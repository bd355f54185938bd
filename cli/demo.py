"""`hivegrpo demo`: the ordinary commands as separate processes on this machine, and a look at what came of it."""

import asyncio
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import typer
from rich.console import Console

from hivegrpo.cli.children import Children
from hivegrpo.cli.display import display
from hivegrpo.cli.output import Record
from hivegrpo.cli.progress import Progress
from hivegrpo.cli.signals import StopSignals
from hivegrpo.cli.threads import usable_cores
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ConfigError, HiveError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.homes import state_folder

PLOT = "reward.png"
HIVEGRPO = (sys.executable, "-m", "hivegrpo.cli.main")
LOOPBACK = ("--host", "127.0.0.1", "--json")
INTERRUPTED = 130


def run_demo(*, peers: int, config: Path | None, report: Path | None) -> None:
    """Train, measure, and say what to try next. ConfigError for a config that so few peers cannot start."""
    began = time.monotonic()
    path = config or Path(str(resources.files("hivegrpo.cli") / "addition" / "run.toml"))
    needed = RunConfig.load(path).run.start_peers
    if peers < needed:
        raise ConfigError(f"The run begins with {needed} peers, not with {peers}.", f"Use --peers {needed} or more.")
    console = Console(stderr=True)
    progress = Progress()
    run = asyncio.run(_train(path, peers, progress, console))
    if run is None:
        raise typer.Exit(INTERRUPTED)
    _conclude(run, progress, report, began, console)


async def _train(config: Path, peers: int, progress: Progress, console: Console) -> Path | None:
    """Run the swarm to the last version; the run's folder, or None if it was interrupted."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    started: asyncio.Future[Record] = loop.create_future()
    finished: asyncio.Future[Record] = loop.create_future()
    state_folder().mkdir(parents=True, exist_ok=True)
    logs = Path(tempfile.mkdtemp(dir=state_folder(), prefix=".demo-logs-"))
    children = Children(logs)
    StopSignals("the demo", last=children.kill).bind(stop)
    with display(progress, console) as show:

        def take(record: Record) -> None:
            progress.take(record)
            show(record)
            if record["kind"] == "started":
                started.set_result(record)
            if progress.finished and not finished.done():
                finished.set_result(record)

        async with children:
            stopping = asyncio.create_task(stop.wait())
            coordinator = await children.start("coordinator", coordinator_command(config), take)
            if await reached(started, [coordinator], stopping):
                address, run = started.result()["address"], Path(started.result()["home"]).parent
                children.move_logs(run / "logs")
                ends = [coordinator]
                for name in (f"peer-{number}" for number in range(1, peers + 1)):
                    command = peer_command(address, run / name, max(1, usable_cores() // peers))
                    ends.append(await children.start(name, command, _ignore))
                if await reached(finished, ends, stopping) and await reached(coordinator, [], stopping):
                    return run
    shutil.rmtree(logs, ignore_errors=True)
    return None


async def reached(
    goal: asyncio.Future[Record] | asyncio.Task[None],
    needed: Sequence[asyncio.Task[None]],
    stopping: asyncio.Task[bool],
) -> bool:
    """Wait for `goal`; False if the demo is to stop first, HiveError if a child that is needed ends first."""
    await asyncio.wait({goal, stopping, *needed}, return_when=asyncio.FIRST_COMPLETED)
    if goal.done():
        goal.result()
        return True
    for task in [task for task in needed if task.done()]:
        task.result()
        raise HiveError(f"{task.get_name()} left before the run was finished.", "Somebody must have stopped it.")
    return False


def coordinator_command(config: Path) -> list[str]:
    """The ordinary `hivegrpo coordinator run`, on loopback."""
    return [*HIVEGRPO, "coordinator", "run", "--config", str(config), "--new", "--exit-when-finished", *LOOPBACK]


def peer_command(address: str, home: Path, threads: int) -> list[str]:
    """The ordinary `hivegrpo peer run`, on loopback, with a home and an identity of its own."""
    return [*HIVEGRPO, "peer", "run", address, "--home", str(home), "--threads", str(threads), *LOOPBACK]


def _ignore(record: Record) -> None:
    """What a peer tells, the coordinator tells too."""


def _conclude(run: Path, progress: Progress, report_file: Path | None, began: float, console: Console) -> None:
    """Measure, draw, write and say; HiveError if the peers did not agree on a version."""
    from hivegrpo.cli.accuracy import measure_accuracy
    from hivegrpo.cli.plot import plot_rewards
    from hivegrpo.cli.report import differing_versions, report, summary
    from hivegrpo.peer.inference.cost import cost_of
    from hivegrpo.peer.inference.locate import open_run

    with console.status("measuring accuracy on the held-out problems ..."):
        accuracy = measure_accuracy(run)
    cost = cost_of(open_run(run).chain.entries)
    plot_rewards(progress, run / PLOT)
    seconds = time.monotonic() - began
    if report_file is not None:
        write_whole(report_file, json.dumps(report(progress, accuracy, cost, seconds), indent=1).encode())
    places = [f"Reward curve: {run / PLOT}", f"Run folder:   {run}", f"Talk to it:   {chat_command(run)}"]
    print("\n".join([*summary(progress, accuracy, cost, seconds), *places]))
    if differing_versions(progress):
        raise HiveError("The peers do not agree.", f"The evidence is in {run}; please report it.")


def chat_command(run: Path) -> str:
    """What to type to talk to a run's model; the command as it can be found from here."""
    command = "hivegrpo" if shutil.which("hivegrpo") else str(Path(sys.executable).with_name("hivegrpo"))
    return shlex.join([command, "chat", str(run)])
