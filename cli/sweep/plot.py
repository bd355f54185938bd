"""A sweep's report as a PNG: curves over the versions, and what each key does."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from hivegrpo.cli.sweep.figures import Result, marginal_means, point_means
from hivegrpo.cli.sweep.grid import describe, text_of
from hivegrpo.cli.sweep.plan import Plan
from hivegrpo.protocol.files import write_whole

CURVES = {
    "reward": "reward (sampled)",
    "measured/kl": "KL to the base (k3, temperature 1)",
    "measured/reward_std": "reward std within groups",
}
FIGURES = ("reward", "kl", "reward_std")
"""Those whose means over the points are drawn, below the curve of the same quantity."""
MAX_LEGEND = 12


def plot_report(plan: Plan, results: Sequence[Result], path: Path) -> None:
    """First the curves, a colour a point; then a row for each key with several values, with the spread over points."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    marginals = marginal_means(plan, point_means(plan, results))
    rows, columns = 1 + len(marginals), len(CURVES)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), dpi=110, squeeze=False)
    for place, (curve, label) in zip(axes[0], CURVES.items(), strict=True):
        _draw_curves(place, plan, results, curve)
        place.set(xlabel="policy version", ylabel=label)
        place.grid(alpha=0.3)
    if 1 < len(plan.points) <= MAX_LEGEND:
        axes[0][0].legend(fontsize=6)
    for row, (key, values) in zip(axes[1:], marginals.items(), strict=True):
        for place, name in zip(row, FIGURES, strict=True):
            found = [(text_of(value), mean) for value, mean in values if name in mean.figures]
            heights = [mean.figures[name] for _, mean in found]
            errors = [mean.spread.get(name, 0.0) for _, mean in found]
            place.errorbar(range(len(found)), heights, yerr=errors, fmt="o-", capsize=3)
            place.set_xticks(range(len(found)), [text for text, _ in found])
            place.set(xlabel=key, ylabel=name)
            place.grid(alpha=0.3)
    figure.suptitle(f"{plan.name}: {plan}", fontsize=10)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png")
    pyplot.close(figure)
    write_whole(path, image.getvalue())


def _draw_curves(place: Any, plan: Plan, results: Sequence[Result], name: str) -> None:
    for number, point in enumerate(plan.points):
        label: str | None = describe(point)
        for result in results:
            if result.trial.settings == point and (curve := result.curves.get(name)):
                place.plot(*zip(*curve, strict=True), color=f"C{number % 10}", alpha=0.8, label=label)
                label = None
