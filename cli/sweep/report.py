"""What came of a sweep: JSON for programs, a table for people."""

from collections.abc import Sequence
from typing import Any

from hivegrpo.cli.sweep.figures import FIGURES, Figures, Mean, Result, marginal_means, point_means
from hivegrpo.cli.sweep.grid import describe, text_of
from hivegrpo.cli.sweep.plan import FORMAT, Plan, counted
from hivegrpo.protocol.text import visible_line

COLUMNS = {
    "reward": ("reward", ".3f"),
    "kl": ("KL", ".4f"),
    "reward_std": ("reward std", ".3f"),
    "entropy": ("entropy", ".3f"),
    "length": ("length", ".1f"),
    "accuracy_before": ("before", ".3f"),
    "accuracy_after": ("after", ".3f"),
    "versions": ("versions", ".0f"),
    "tokens": ("tokens", ",.0f"),
    "seconds": ("seconds", ".1f"),
    "exchanged_mb": ("MB", ".1f"),
}
"""Of the table: heading and format by figure."""
MARGINAL_COLUMNS = ("reward", "kl", "reward_std", "entropy", "length", "accuracy_after")


def make_report(plan: Plan, results: Sequence[Result]) -> dict[str, Any]:
    """The content of report.json; the runs of a point follow the order of the seeds."""
    means = point_means(plan, results)
    return {
        "format": FORMAT,
        "name": plan.name,
        "axes": {axis.key: list(axis.values) for axis in plan.axes},
        "seeds": list(plan.seeds),
        "budget": {plan.budget.unit: plan.budget.amount},
        "peers": plan.peers,
        "figures": FIGURES,
        "points": [
            {
                "settings": point,
                **_mean(mean),
                "runs": [_run(result) for result in results if result.trial.settings == point],
            }
            for point, mean in means
        ],
        "marginals": {
            key: [{"value": value, **_mean(mean)} for value, mean in rows]
            for key, rows in marginal_means(plan, means).items()
        },
    }


def table(plan: Plan, results: Sequence[Result]) -> list[str]:
    """Lines: a row a point, then what each key does, and which runs failed or are not finished."""
    means = point_means(plan, results)
    present = [name for name in COLUMNS if any(name in mean.figures for _, mean in means)]
    rows = [["point", *(COLUMNS[name][0] for name in present)]]
    rows += [[describe(point), *_cells(mean, present)] for point, mean in means]
    lines = _aligned(rows)
    if len(plan.seeds) > 1:
        lines.append(f"± is the standard deviation over {len(plan.seeds)} seeds.")
    for key, values in marginal_means(plan, means).items():
        names = [name for name in MARGINAL_COLUMNS if name in present]
        rows = [[f"{key} (mean over {counted(values[0][1].count, 'point')})", *(COLUMNS[name][0] for name in names)]]
        rows += [[text_of(value), *_cells(Mean(mean.count, mean.figures, {}), names)] for value, mean in values]
        lines += ["", *_aligned(rows)]
    troubles = [_trouble(result) for result in results if result.outcome.state != "finished"]
    return list(map(visible_line, [*lines, *([""] if troubles else []), *troubles]))


def _mean(mean: Mean) -> dict[str, Any]:
    return {"count": mean.count, "mean": mean.figures, "spread": mean.spread}


def _run(result: Result) -> dict[str, Any]:
    figures: Figures = result.figures
    return {
        "seed": result.trial.config.run.seed,
        "state": result.outcome.state,
        "error": result.outcome.error,
        "folder": result.folder.name,
        "state_root": result.tally.state_root,
        "figures": figures,
        "curves": {name: [list(point) for point in curve] for name, curve in result.curves.items()},
    }


def _cells(mean: Mean, names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        value, form = mean.figures.get(name), COLUMNS[name][1]
        spread = f" ±{mean.spread[name]:{form}}" if name in mean.spread else ""
        cells.append("-" if value is None else f"{value:{form}}{spread}")
    return cells


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _trouble(result: Result) -> str:
    at = f"at version {result.tally.versions}"
    if result.outcome.state == "failed":
        return f"Failed {at}: {result.trial.title}: {result.outcome.error}"
    return f"Not finished, {at}: {result.trial.title}."
