"""The reward curve as a PNG."""

import io
from pathlib import Path

import matplotlib

from hivegrpo.cli.progress import Progress
from hivegrpo.protocol.files import write_whole


def plot_rewards(progress: Progress, path: Path) -> None:
    """Reward of every version, and held-out accuracy where it was measured."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    rewards, accuracies = progress.curve("reward"), progress.curve("eval/accuracy")
    if rewards:
        axes.plot(*zip(*rewards, strict=True), "-", label="reward (sampled)")
    if accuracies:
        axes.errorbar(
            *zip(*accuracies, strict=True),
            yerr=list(zip(*progress.accuracy_errors(), strict=True)),
            fmt="o--",
            label="held-out accuracy",
            markersize=4,
            capsize=2,
        )
    axes.set_xlabel("policy version that was sampled")
    axes.set_ylim(0.0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title(f"{progress.status['name']}, run {progress.status['run_id'][:16]}", loc="left", fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    pyplot.close(figure)
    write_whole(path, image.getvalue())
