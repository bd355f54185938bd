"""`hivegrpo evaluate`."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hivegrpo.cli.output import configure_logging
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.text import visible_line

if TYPE_CHECKING:
    from hivegrpo.peer.evaluation.evaluation import Show
    from hivegrpo.peer.evaluation.settings import EvaluateConfig

RESULTS = "results.json"
PLOT = "results.png"
INTERRUPTED = 130


def launch(
    source: str | None,
    revisions: Sequence[str] | None,
    flags: dict[str, Any],
    *,
    config: Path | None,
    to: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure, write results and plot, and print the table. flags: of a single benchmark, None where left out."""
    configure_logging(verbose=False)
    from hivegrpo.peer.inference.origin import is_exported

    revisions = revisions or (["latest"] if is_exported(source) else ["base", "latest"])
    if len(set(revisions)) < len(revisions):
        raise ConfigError("A revision is named twice.", "Name each of them once.")
    settings = PeerConfig.load(device=device)
    benchmarks = _benchmarks(config, flags)
    from hivegrpo.cli.evaluation_plot import plot_scores
    from hivegrpo.cli.evaluation_table import table
    from hivegrpo.peer.evaluation.evaluation import evaluate

    try:
        with _progress() as show:
            folder, results = evaluate(source, revisions, benchmarks, settings, to, show)
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    write_whole(folder / RESULTS, json.dumps(results, indent=1).encode())
    plot_scores(results, folder / PLOT)
    print(json.dumps(results) if as_json else "\n".join(table(results)))
    print(f"Results, samples and plot: {folder}", file=sys.stderr)


def _benchmarks(path: Path | None, flags: dict[str, Any]) -> "EvaluateConfig":
    from hivegrpo.peer.evaluation.settings import EvaluateConfig

    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if path is None:
        return EvaluateConfig.of({"benchmark": [given]}, "The benchmark")
    if given:
        raise ConfigError(
            f"--config says what each benchmark is, and so does {', '.join(sorted(given))}.",
            f"Write it into {path}.",
        )
    return EvaluateConfig.load(path)


@contextmanager
def _progress() -> "Iterator[Show]":
    """On a terminal a bar, elsewhere a line whenever something else is at work; to stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar, last = progress.add_task("", total=None), ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal last
            what = visible_line(what)
            if what != last and not console.is_terminal:
                console.print(what, highlight=False, markup=False, soft_wrap=True)
            last = what
            progress.update(bar, description=what, completed=done, total=total or None)

        yield show
