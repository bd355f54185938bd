"""One run of a sweep over a coordinator and peers on this machine: the ordinary commands, in homes that stay."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from hivegrpo.cli.children import Children
from hivegrpo.cli.demo import HIVEGRPO, LOOPBACK, peer_command, reached
from hivegrpo.cli.output import Record
from hivegrpo.cli.progress import Progress
from hivegrpo.cli.sweep.folder import EXCHANGE_FILE, SWARM, Task
from hivegrpo.protocol.chainfile import RUN_FILE, ChainFile
from hivegrpo.protocol.history import History

COORDINATOR = "coordinator"
CONFIG_FILE = "run.toml"


def is_trained(folder: Path, task: Task) -> bool:
    """Whether the chain in a run's folder has its last version."""
    home = folder / SWARM / COORDINATOR
    return (home / RUN_FILE).is_file() and ChainFile.open(home).chain.height >= task.config.run.versions


async def train_swarm(
    folder: Path, task: Task, threads: int, take: Callable[[Record], None], stopping: asyncio.Task[bool], own: Children
) -> bool:
    """Go on until the last version is archived; False if `stopping` ended first, HiveError if a process left early.

    threads: of torch, for each peer. `own`: the children, whose context ends them. The swarm's folder has its run.toml.
    """
    swarm, progress = folder / SWARM, Progress()
    loop = asyncio.get_running_loop()
    started: asyncio.Future[Record] = loop.create_future()
    finished: asyncio.Future[Record] = loop.create_future()
    with closing(History(folder / EXCHANGE_FILE)) as exchange:

        def listen(record: Record) -> None:
            progress.take(record)
            match record["kind"]:
                case "started":
                    started.set_result(record)
                case "root" if record["metrics"]:
                    exchange.record(**record)
                case "version" if record["version"] > 0:
                    take(record)
            if progress.finished and not finished.done():
                finished.set_result(record)

        coordinator = await own.start(COORDINATOR, coordinator_command(swarm), listen)
        if not await reached(started, [coordinator], stopping):
            return False
        ends = [coordinator]
        for name in (f"peer-{number}" for number in range(1, task.peers + 1)):
            command = peer_command(started.result()["address"], swarm / name, threads)
            ends.append(await own.start(name, command, lambda record: None))
        return await reached(finished, ends, stopping) and await reached(coordinator, [], stopping)


def coordinator_command(swarm: Path) -> list[str]:
    """As the demo's, with a home whose run goes on when it is started again."""
    place = ["--config", str(swarm / CONFIG_FILE), "--home", str(swarm / COORDINATOR)]
    return [*HIVEGRPO, "coordinator", "run", *place, "--exit-when-finished", *LOOPBACK]
