"""`hivegrpo sweep`."""

import asyncio
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from hivegrpo.cli.output import Record, Show, configure_logging, describe_version, json_lines
from hivegrpo.cli.signals import StopSignals
from hivegrpo.cli.sweep.figures import Result
from hivegrpo.cli.sweep.folder import OUTCOME_FILE, Outcome, open_sweep, run_folder
from hivegrpo.cli.sweep.grid import Axis
from hivegrpo.cli.sweep.plan import Budget, Plan, SweepFile, Trial, Unit
from hivegrpo.cli.sweep.report import make_report, table
from hivegrpo.cli.sweep.running import Runner
from hivegrpo.cli.threads import count_peers, usable_cores
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError, HiveError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.text import visible

REPORT_FILE = "report.json"
PLOT_FILE = "report.png"
UNITS: tuple[Unit, ...] = ("versions", "seconds", "tokens")


def launch(
    file: Path | None,
    config: Path | None,
    grid: Sequence[str],
    flags: dict[str, Any],
    *,
    parallel: int,
    to: Path | None,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Run every point that is not finished yet, and report; exit with 1 if a run has failed.

    flags: seeds, peers and the budget by unit; None where the sweep.toml counts.
    """
    plan = read_plan(file, config, grid, flags)
    if plan.peers and parallel > 1:
        raise ConfigError("Swarms are run one after the other.", "Leave out --parallel, or --peers.")
    folder = (to or plan.folder).expanduser().resolve()
    _tell(f"{plan}\nFolder: {folder}")
    sweep = Sweep(plan, folder, parallel, as_json)
    # From here on: before, there is nothing to be finished.
    signals = StopSignals("the sweep after the versions that its runs are at", last=sweep.kill)
    configure_logging(verbose=False)
    with open_sweep(folder, plan):
        asyncio.run(sweep.run(signals, retry_failed=retry_failed))
        results = sweep.conclude()
    unfinished = sum(result.outcome.state == "unfinished" for result in results)
    if unfinished:
        _tell(f"Stopped: {len(results) - unfinished} of {len(results)} runs have ended. Start again to go on.")
    if any(result.outcome.state == "failed" for result in results):
        raise typer.Exit(1)


def read_plan(file: Path | None, config: Path | None, grid: Sequence[str], flags: dict[str, Any]) -> Plan:
    """What flags say, and below them a sweep.toml; the demo's task if neither names a run.toml.

    ConfigError if something is wrong with it.
    """
    told = SweepFile.load(file) if file is not None else None
    given = [Axis.parse(text) for text in grid]
    keys = {axis.key for axis in given}
    axes = [axis for axis in (told.axes(file.parent) if told and file else []) if axis.key not in keys] + given
    if not axes:
        raise ConfigError("There is nothing to sweep.", "Name a key and its values: --grid grpo.beta=0,0.04,0.2.")
    if config is None and told and file:
        config = file.parent / told.config.expanduser()
    if config is None:
        config = Path(str(resources.files("hivegrpo.cli") / "addition" / "run.toml"))
        _tell("No --config: the demo's task is taken.")
    base = RunConfig.load(config)
    amounts: dict[Unit, float | None] = {unit: flags[unit] for unit in UNITS}
    if told and not any(amount is not None for amount in amounts.values()):
        amounts = {"versions": told.versions, "seconds": told.seconds, "tokens": told.tokens}
    seeds, peers = (getattr(told, name, None) if flags[name] is None else flags[name] for name in ("seeds", "peers"))
    return Plan.make(base, axes, seeds or 1, Budget.of(amounts, base), peers or 0)


class Sweep:
    """A plan that is carried out in a folder."""

    def __init__(self, plan: Plan, folder: Path, parallel: int, as_json: bool) -> None:
        self._plan, self._folder = plan, folder
        self._parallel, self._as_json = parallel, as_json
        self._stop = asyncio.Event()
        self._show: Show = json_lines(self._stop) if as_json else _show_line
        self._runner: Runner | None = None
        self._ended = 0

    def kill(self) -> None:
        """End all processes at once, and do not wait."""
        if self._runner is not None:
            self._runner.kill()

    async def run(self, signals: StopSignals, *, retry_failed: bool) -> None:
        """Bring every run to its end that is not there yet, `parallel` at a time, until a signal asks to stop."""
        signals.bind(self._stop)
        threads = PeerConfig.load().threads or max(1, usable_cores() // (count_peers() + self._parallel))
        self._runner = runner = Runner(threads, self._stop)
        waiting = [trial for trial in self._plan.trials if not self._has_ended(trial, retry_failed)]
        total = len(self._plan.trials)
        self._ended = total - len(waiting)
        self._show({"kind": "started", "runs": total, "ended": self._ended, "folder": str(self._folder)})
        if waiting:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._parallel, len(waiting))):
                    group.create_task(self._work(runner, waiting))

    async def _work(self, runner: Runner, waiting: list[Trial]) -> None:
        while waiting and not self._stop.is_set():
            await self._run_one(runner, waiting.pop(0))

    async def _run_one(self, runner: Runner, trial: Trial) -> None:
        folder = run_folder(self._folder, trial)
        about = {"run": trial.title, "folder": folder.name}
        self._show({"kind": "run", **about})
        try:
            await runner.run(folder, lambda record: self._show({**record, **about}))
        except HiveError as error:
            Outcome("failed", str(error)).write(folder)
        outcome = Outcome.read(folder)
        if outcome.state != "unfinished":
            self._ended += 1
            place = f"{self._ended} of {len(self._plan.trials)}"
            self._show({"kind": outcome.state, "error": outcome.error, "place": place, **about})

    def _has_ended(self, trial: Trial, retry_failed: bool) -> bool:
        """Whether there is nothing to do; a failure that is to be tried again is forgotten."""
        folder = run_folder(self._folder, trial)
        outcome = Outcome.read(folder)
        if outcome.state == "failed" and retry_failed:
            (folder / OUTCOME_FILE).unlink()
            return False
        return outcome.state != "unfinished"

    def conclude(self) -> list[Result]:
        """Write the report of what is there, and print it."""
        from hivegrpo.cli.sweep.plot import plot_report

        results = [Result.read(self._folder, trial) for trial in self._plan.trials]
        report = make_report(self._plan, results)
        write_whole(self._folder / REPORT_FILE, (json.dumps(report, indent=1) + "\n").encode())
        plot_report(self._plan, results, self._folder / PLOT_FILE)
        if self._as_json:
            self._show({"kind": "report", **report})
        else:
            print("\n".join(table(self._plan, results)), flush=True)
        _tell(f"Report: {self._folder / REPORT_FILE} and {PLOT_FILE}")
        return results


def _show_line(record: Record) -> None:
    match record["kind"]:
        case "started":
            if record["ended"]:
                _tell(f"{record['ended']} of {record['runs']} runs have ended before.")
        case "version":
            _tell(f"{record['run']}: {describe_version(record)}")
        case "nothing":
            _tell(f"{record['run']}: nothing to learn: {record['note']}")
        case "finished":
            _tell(f"Finished {record['place']}: {record['run']}")
        case "failed":
            _tell(f"Failed, {record['place']}: {record['run']}: {record['error']}")


def _tell(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
