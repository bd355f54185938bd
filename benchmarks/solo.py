"""How long a step takes that one machine makes alone: hivegrpo's `Solo.step` against TRL's GRPOTrainer.

Both make their steps in this process, in turn, on the same task, with the same batch and torch's own number of
threads; so does a plain loop of `generate`, one forward and backward pass, and torch's AdamW. Compared are the medians.
Exits with 0 if hivegrpo's is at most 0.8 of TRL's on the small model, and at most 1.0 on the large one, with 1 if not.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from task import GENERATIONS, LARGE, LARGE_ENDING, LEARNING_RATE, SMALL, Shape, Task, first_token
from transformers import TrainerCallback

from hivegrpo.peer.learn.genesis import version_zero
from hivegrpo.peer.learn.solo import Solo

WARM_UP = 3
"""Steps before those that count."""


@dataclass(frozen=True)
class Comparison:
    """One model, how often it is measured, and what is asked of it."""

    shape: Shape
    steps: int
    bar: float | None


COMPARISONS = {
    "small": Comparison(SMALL, 60, 0.8),
    "large": Comparison(LARGE, 12, 1.0),
    "ending": Comparison(LARGE_ENDING, 12, None),
}


class PlainLoop:
    """What one writes down first: `generate`, a forward and a backward pass, a step of AdamW."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.prompts = torch.tensor(task.prompts).repeat_interleave(GENERATIONS, dim=0)
        self.answers = [row["answer"] for row in task.rows for _ in range(GENERATIONS)]

    def step(self) -> None:
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.task.shape.completion_tokens,
            )
        taken = ids[:, self.prompts.shape[1] :]
        rewards = torch.tensor(first_token(completion_ids=taken.tolist(), answer=self.answers)).view(-1, GENERATIONS)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, self.prompts.shape[1] - 1 : -1]
        logps = logits.log_softmax(dim=-1).gather(-1, taken.unsqueeze(-1)).squeeze(-1)
        (-(advantages.view(-1, 1) * (logps - logps.detach()).exp()).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Times:
    """Seconds of each step, and of the parts of hivegrpo's."""

    trl: list[float] = field(default_factory=list)
    hivegrpo: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {"rollout": [], "gradient": [], "step": []})
    constant: list[float] = field(default_factory=list)
    """Share of the groups whose rewards were equal: hivegrpo takes no gradient of them."""


class InTurn(TrainerCallback):
    """After each of TRL's steps, one of the others'. Of TRL's, everything counts from there to its next step's end."""

    def __init__(self, solo: Solo, plain: PlainLoop) -> None:
        self.solo, self.plain, self.times = solo, plain, Times()
        self._began = 0.0
        self._left_out = WARM_UP

    def on_step_end(self, *_: Any, **__: Any) -> None:
        trl = time.perf_counter() - self._began
        hivegrpo, made = _timed(self.solo.step)
        plain, _ = _timed(self.plain.step)
        if self._left_out > 0:
            self._left_out -= 1
        else:
            self.times.trl.append(trl)
            self.times.hivegrpo.append(hivegrpo)
            self.times.plain.append(plain)
            self.times.constant.append(made.metrics["frac_reward_zero_std"])
            for name, seconds in self.times.parts.items():
                seconds.append(made.metrics.get(f"seconds/{name}", 0.0))
        self._began = time.perf_counter()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def measure(comparison: Comparison) -> Times:
    """Steps in turn, without the first few."""
    steps = WARM_UP + comparison.steps
    with Task(0, comparison.shape) as task, tempfile.TemporaryDirectory(prefix="hivegrpo-trl-") as folder:
        config = task.config(steps)
        learner = task.learner(config)
        solo = Solo(config, learner, version_zero(learner.layout, config, task.folder))
        in_turn = InTurn(solo, PlainLoop(task))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            task.trl_trainer(steps, [], Path(folder), [in_turn]).train()
        learner.close()
    return in_turn.times


def show(comparison: Comparison, times: Times) -> bool:
    """A table of one model; whether its bar is met."""
    trl, hivegrpo, plain = (1e3 * median(seconds) for seconds in (times.trl, times.hivegrpo, times.plain))
    ratios = [ours / theirs for ours, theirs in zip(times.hivegrpo, times.trl, strict=True)]
    parts = {name: 1e3 * median(seconds) for name, seconds in times.parts.items()}
    parts["rest"] = hivegrpo - sum(parts.values())
    print(f"\n{comparison.shape}: {len(ratios)} steps of each; milliseconds, medians")
    print(f"  TRL {trl:10.1f}    hivegrpo {hivegrpo:10.1f}    plain loop {plain:10.1f}")
    print("  hivegrpo: " + "  ".join(f"{name} {part:.1f}" for name, part in parts.items()), end="")
    print(f"  (groups with equal rewards, which need no gradient: {mean(times.constant):.0%})")
    ratio = hivegrpo / trl
    met = comparison.bar is None or ratio <= comparison.bar
    bar = "no bar" if comparison.bar is None else f"the bar is {comparison.bar}: {'met' if met else 'NOT met'}"
    print(f"  hivegrpo / TRL {ratio:.3f} (of single steps {min(ratios):.2f} to {max(ratios):.2f}); {bar}", flush=True)
    return met


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=COMPARISONS, help="this one alone")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of steps")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} CPUs, load {load:.2f}, torch {torch.__version__} with {torch.get_num_threads()} threads")
    met = True
    for name, comparison in COMPARISONS.items():
        if options.only in (None, name):
            scaled = replace(comparison, steps=max(1, round(options.scale * comparison.steps)))
            met = show(scaled, measure(scaled)) and met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
