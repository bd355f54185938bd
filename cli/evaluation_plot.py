"""The results of an evaluation as a PNG: a bar for each model and metric, with its interval."""

import io
from pathlib import Path
from typing import Any

import matplotlib

from hivegrpo.protocol.files import write_whole

WIDTH = 0.8
"""Of a group of bars, of the space that it has."""


def plot_scores(results: dict[str, Any], path: Path) -> None:
    """One plot below the other for each benchmark; bars of a metric stand together, one for each model."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    benchmarks, models = results["benchmarks"], [model["revision"] for model in results["models"]]
    figure, rows = pyplot.subplots(len(benchmarks), figsize=(8, 3.2 * len(benchmarks)), dpi=120, squeeze=False)
    for axes, benchmark in zip(rows[:, 0], benchmarks, strict=True):
        metrics = list(dict.fromkeys(score["metric"] for score in benchmark["scores"]))
        for place, model in enumerate(models):
            scores = [score for score in benchmark["scores"] if score["revision"] == model]
            at = [number + WIDTH * ((place + 0.5) / len(models) - 0.5) for number in range(len(metrics))]
            values = [score["value"] for score in scores]
            # Where a limit is the value itself, they may differ by a rounding error.
            below = [max(0.0, score["value"] - score["low"]) for score in scores]
            above = [max(0.0, score["high"] - score["value"]) for score in scores]
            axes.bar(at, values, WIDTH / len(models), yerr=[below, above], capsize=3, label=model)
        axes.set_xticks(range(len(metrics)), metrics)
        axes.set_ylim(0.0, 1.02)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(f"{benchmark['name']}, {benchmark['problems']} problems", loc="left", fontsize=10)
    rows[0, 0].legend(title="revision", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    image = io.BytesIO()
    figure.tight_layout()
    figure.savefig(image, format="png", bbox_inches="tight")
    pyplot.close(figure)
    write_whole(path, image.getvalue())
