"""The demo's display: a live picture on a terminal, a line a version elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hivegrpo.cli.output import Record, Show, describe_version
from hivegrpo.cli.progress import Progress

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60
COLORS = {
    "online": "green",
    "joining": "yellow",
    "draining": "yellow",
    "unreachable": "red",
    "offline": "dim",
    "banned": "red",
}


@contextmanager
def display(progress: Progress, console: Console) -> Iterator[Show]:
    """Inside, the yielded function shows that there is news."""
    if not console.is_terminal:
        yield lambda record: _print_version(record, console)
        return
    with Live(console=console, get_renderable=lambda: picture(progress), refresh_per_second=4):
        yield lambda record: None


def picture(progress: Progress) -> RenderableType:
    """The run as it stands."""
    status = progress.status
    if not status:
        return Text("waiting for the coordinator ...", style="dim")
    done, total = max(status["version"], 0), status["versions"]
    facts = Table("", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row(Text("versions", style="dim"), ProgressBar(total=total, completed=done, width=CURVE_WIDTH))
    for name, value in _facts(progress):
        facts.add_row(Text(name, style="dim"), value)
    parts: list[RenderableType] = [facts, _peers(status["peers"])]
    if status["trouble"]:
        parts.append(Text(status["trouble"], style="yellow"))
    title = f"{status['name']}  run {status['run_id'][:16]}  version {done} of {total}  {status['phase']}"
    return Panel(Group(*parts), title=title, title_align="left")


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """A curve from 0 to 1 in one line: means over equal parts when there are more values than columns."""
    columns = min(width, len(values))
    bounds = [index * len(values) // columns for index in range(columns + 1)] if columns else []
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(bounds)]
    return "".join(BARS[min(int(max(mean, 0.0) * len(BARS)), len(BARS) - 1)] for mean in means)


def _facts(progress: Progress) -> list[tuple[str, str]]:
    rewards = [value for _, value in progress.curve("reward")]
    reward, accuracy = progress.latest("reward"), progress.latest("eval/accuracy")
    return [
        ("reward", "-" if reward is None else f"{reward:.3f}  {sparkline(rewards)}"),
        ("held-out accuracy", "-" if accuracy is None else f"{accuracy:.3f}"),
        ("tokens/s", f"{progress.tokens_per_second:.0f}"),
        ("exchanged", f"{progress.bytes_exchanged / 1e6:.1f} MB"),
        ("state root", progress.status["state_root"] or "-"),
    ]


def _peers(peers: Sequence[Record]) -> Table:
    table = Table(
        "peer", "state", "version", "tokens/s", "contributed", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for peer in peers:
        state = Text(peer["state"], style=COLORS.get(peer["state"], ""))
        version = "-" if peer["version"] is None else str(peer["version"])
        table.add_row(peer["peer"], state, version, f"{peer['tokens_per_second']:.0f}", str(peer["contributed"]))
    return table


def _print_version(record: Record, console: Console) -> None:
    if record["kind"] == "version":
        console.print(describe_version(record), highlight=False, soft_wrap=True)
