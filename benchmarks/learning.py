"""Does a swarm learn as fast as one machine? Three peers against TRL's GRPOTrainer, on the same task and total batch.

The peers, their coordinator and the exchange are the product's own, on the in-memory network, in this process. The
figure is the step at which the mean reward over the last five steps first reaches the goal. Exits with 0 if the swarm's
median over the seeds comes no later than TRL's slowest, with 1 if it does. Both curves go into a PNG.
"""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median

# Before torch is imported: three peers share this machine, and TRL gets the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import structlog
from memory_swarm import train
from task import SMALL, Task

PEERS = 3
WINDOW = 5
"""Steps that the mean is taken over."""
STEP_SECONDS = 30.0
"""Far more than a version takes."""

SWARM, TRL = "swarm of three", "TRL"
Curves = dict[str, list[list[float]]]
"""Of each side, by seed: the mean reward of each step's rollouts."""


def swarm_curve(task: Task, versions: int) -> list[float]:
    """Mean reward of the rollouts that each version came of."""
    config = task.config(versions, start_peers=PEERS)
    learners = [task.learner(config) for _ in range(PEERS)]
    try:
        return [metrics["reward"] for metrics in train(config, learners, task.folder, versions * STEP_SECONDS)]
    finally:
        for learner in learners:
            learner.close()


def trl_curve(task: Task, steps: int) -> list[float]:
    """Mean reward of each step's rollouts."""
    curve: list[float] = []
    with tempfile.TemporaryDirectory(prefix="hivegrpo-trl-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task.trl_trainer(steps, curve, Path(folder)).train()
    return curve


def reached(curve: list[float], goal: float) -> float:
    """The first step at which the mean over the last WINDOW steps is the goal; infinity if there is none."""
    means = (sum(curve[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(curve) + 1))
    return next((end for end, mean in enumerate(means, WINDOW) if mean >= goal), math.inf)


def plot(curves: Curves, goal: float, path: Path) -> None:
    """All curves of both sides."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for (name, seeds), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
        for number, curve in enumerate(seeds):
            axes.plot(range(1, len(curve) + 1), curve, color=color, alpha=0.7, label=None if number else name)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="optimizer step", ylabel="mean reward", ylim=(0, 1.02), title="emit the prompt's first token")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of weights, prompts and sampling: 0 and on")
    parser.add_argument("--versions", type=int, default=120, help="steps of each side")
    parser.add_argument("--goal", type=float, default=0.9, help="mean reward to be reached")
    parser.add_argument("--plot", type=Path, default=Path("learning.png"), metavar="FILE", help="where the PNG goes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curves there")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    curves: Curves = {SWARM: [], TRL: []}
    steps: dict[str, list[float]] = {SWARM: [], TRL: []}
    print(f"step at which the mean reward over {WINDOW} steps reaches {options.goal}, of {options.versions}")
    print(f"{'seed':>6}" + "".join(f"{name:>18}" for name in curves), flush=True)
    for seed in range(options.seeds):
        with Task(seed, SMALL) as task:
            curves[SWARM].append(swarm_curve(task, options.versions))
            curves[TRL].append(trl_curve(task, options.versions))
        for name, seeds in curves.items():
            steps[name].append(reached(seeds[-1], options.goal))
        print(f"{seed:>6}" + "".join(f"{of[-1]:>18}" for of in steps.values()), flush=True)
    plot(curves, options.goal, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(curves) + "\n")
    ours, slowest = median(steps[SWARM]), max(steps[TRL])
    met = ours <= slowest and ours < math.inf
    print(f"the swarm's median is {ours}, TRL's slowest {slowest}: the bar is {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
