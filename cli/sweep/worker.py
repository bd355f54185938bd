"""One run of a sweep, in a process of its own: `python -m hivegrpo.cli.sweep.worker FOLDER THREADS PARENT`.

It tells JSON lines on stdout, and goes on from what its folder has. SIGINT ends it after the version it is at; when the
sweep that started it is gone, it gives that version up.
"""

import asyncio
import os
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hivegrpo.cli.output import Record, Show, configure_logging, json_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.cli.sweep.folder import MEASUREMENTS_FILE, SWARM, Outcome, Task
from hivegrpo.cli.sweep.tally import Tally
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import HiveError
from hivegrpo.protocol.history import History, read_history
from hivegrpo.protocol.homes import locked_home
from hivegrpo.protocol.text import visible

if TYPE_CHECKING:
    from hivegrpo.cli.training import Training
    from hivegrpo.peer.learn.learner import Learner

MEASUREMENTS = 4
"""Times that a run on one machine is measured after version 0, if it makes all of its config's versions."""
PARENT_SECONDS = 1.0
"""Between two looks at whether the sweep is still there."""


def main(folder: Path, threads: int, parent: int) -> None:
    """Train the run in a folder, or measure it if a swarm has trained it; HiveErrors end in an exit code.

    parent: process id of the sweep.
    """
    signals = StopSignals("the run")
    configure_logging(verbose=False)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported: its pools take their size from here
    try:
        with locked_home(folder):
            work = Work(folder, Task.read(folder), PeerConfig.load(threads=threads))
            asyncio.run(_run(work, signals, parent))
    except HiveError as error:
        print(f"Error: {visible(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


class Work:
    """What is to be done, on a thread of its own, and how it is stopped."""

    def __init__(self, folder: Path, task: Task, settings: PeerConfig) -> None:
        self.folder, self.task, self.settings = folder, task, settings
        self.stopping, self.cancelled = threading.Event(), threading.Event()
        """To end after this version, and in the middle of it."""

    def train(self, show: Show) -> None:
        """Make versions until the budget is spent, with measurements in between."""
        from hivegrpo.cli.training import Training

        with closing(Training.open(self.task.config, self.settings, self.folder)) as training:
            tally = Tally.read(self.folder)
            every = max(1, self.task.config.run.versions // MEASUREMENTS)
            while not self.stopping.is_set():
                ended = training.finished or self.task.budget.spent(tally.versions, tally.seconds, tally.tokens)
                if ended or training.version % every == 0:
                    self._measure(training)
                if ended:
                    training.conclude(self.cancelled)
                    Outcome("finished").write(self.folder)
                    return
                for record in training.advance(self.cancelled):
                    tally.take(record)
                    show(record)

    def measure_swarm(self, show: Show) -> None:
        """Probe the first and the last version of the run that a swarm has left, and write its metrics, as signed."""
        from hivegrpo.cli.sweep.swarm_record import SwarmRecord

        with closing(SwarmRecord(self.folder / SWARM, self.task.config, self.settings)) as record:
            for version in (0, record.last):
                if version not in self._measured():
                    record.load(version)
                    self._note(version, record.learner)
            record.load(record.last)
            record.write_metrics(self.folder, self.cancelled)
        Outcome("finished").write(self.folder)

    def _measure(self, training: "Training") -> None:
        """Probe the newest version, once."""
        if training.version not in self._measured():
            learner = training.solo.learner
            self._note(training.version, learner)
            learner.load_reference(training.solo.reference)

    def _measured(self) -> set[int]:
        return {record["version"] for record in read_history(self.folder / MEASUREMENTS_FILE)}

    def _note(self, version: int, learner: "Learner") -> None:
        from hivegrpo.peer.learn.probe import probe

        figures = probe(learner, self.cancelled)
        with closing(History(self.folder / MEASUREMENTS_FILE)) as history:
            history.record("measured", version=version, figures=figures)


async def _run(work: Work, signals: StopSignals, parent: int) -> None:
    from hivegrpo.peer.learn.cancel import Cancelled

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    signals.bind(stop)
    lines = json_lines(stop)

    def show(record: Record) -> None:
        loop.call_soon_threadsafe(lines, record)

    watching = [asyncio.create_task(_pass_on(stop, work.stopping)), asyncio.create_task(end_with(parent, work))]
    do = work.measure_swarm if work.task.peers else work.train
    try:
        with suppress(Cancelled):
            await asyncio.to_thread(do, show)
    except HiveError as error:
        lines({"kind": "failed", "error": str(error)})
        raise
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _pass_on(stop: asyncio.Event, stopping: threading.Event) -> None:
    await stop.wait()
    stopping.set()


async def end_with(parent: int, work: Work) -> None:
    """Give the work up once another process has adopted this one: nobody waits for it any more."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells of an adoption
        await asyncio.sleep(PARENT_SECONDS)
    work.stopping.set()
    work.cancelled.set()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
