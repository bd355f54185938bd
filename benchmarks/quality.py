"""What do the codecs cost in accuracy? The demo's run once a codec and seed, three peers, against fp32.

The runs of a seed begin with the same weights, see the same prompts in the same leases and draw with the same seeds;
nothing but the codec differs. Accuracy is greedy, on 2,000 problems that no run trains on (`addition.py`). A codec's
figure is the mean over the seeds of its difference to fp32, in points, with the 95 % interval of a paired t-test.

Two figures, because the demo's last versions solve nearly everything: there a codec that slows learning down has been
caught up with. So, beside the accuracy after the last version, its mean over versions in the first half, while the
policy learns fastest. Exits with 0 if, for every codec, both intervals lie above its bar, with 1 if one does not.

    python benchmarks/quality.py --json quality.json     # goes on from what that file has
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Before torch is imported: runs go side by side, and the number of threads decides the bits.
os.environ["OMP_NUM_THREADS"] = "1"

from hivegrpo.protocol.files import write_whole

PEERS = ("peer 1", "peer 2", "peer 3")
BASELINE = "fp32"
BARS = {"mxint8": -2.0, "mxfp8": -2.0, "mxfp4": -4.0}
"""Points below fp32 that a codec's interval has to exclude."""
CONFIDENCE = 0.95
RUN_SECONDS = 3600.0
"""Far more than a run takes."""

Outcome = dict[str, Any]
"""Of a run: accuracy by version, mean reward of each version's rollouts, seconds, and the last state root."""


@dataclass(frozen=True)
class Lengths:
    """How long a run is, and when its accuracy is measured."""

    versions: int
    every: int

    @property
    def measured(self) -> list[int]:
        """Versions whose accuracy is measured: the last is one of them."""
        return sorted({*range(self.every, self.versions, self.every), self.versions})

    @property
    def early(self) -> list[int]:
        """Those in the first half; the first if there are none."""
        return [version for version in self.measured if 2 * version <= self.versions] or self.measured[:1]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, in points, and the half width of its interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, ours: Sequence[float], baseline: Sequence[float]) -> "Difference":
        """Accuracies, one a seed; without a second seed, the interval is everything."""
        from scipy.stats import t

        differences = [100 * (a - b) for a, b in zip(ours, baseline, strict=True)]
        count = len(differences)
        if count < 2:
            return cls(differences[0], math.inf)
        return cls(fmean(differences), t.ppf((1 + CONFIDENCE) / 2, count - 1) * stdev(differences) / math.sqrt(count))

    def excludes(self, bar: float) -> bool:
        """Whether the whole interval is above the bar."""
        return self.mean - self.half > bar

    def __str__(self) -> str:
        return f"{self.mean:+6.2f} [{self.mean - self.half:+6.2f}, {self.mean + self.half:+6.2f}]"


def run_once(codec: str, seed: int, lengths: Lengths, problems: int) -> Outcome:
    """One run, here."""
    from addition import accuracy_on, open_learner, task_config, task_problems
    from direct_swarm import DirectSwarm, even_shares

    began = time.monotonic()
    config = task_config(codec, seed, lengths.versions)
    train, held_out = task_problems(config, problems)
    learner = open_learner(config, train)
    accuracy: dict[str, float] = {}
    rewards: list[float] = []
    with tempfile.TemporaryDirectory(prefix="hivegrpo-quality-") as folder, closing(learner):
        swarm = DirectSwarm(config, learner, Path(folder))
        for version in range(lengths.versions):
            rewards.append(swarm.advance(even_shares(version, config.grpo.prompts_per_round, PEERS)))
            if version + 1 in lengths.measured:
                accuracy[str(version + 1)] = accuracy_on(learner, held_out).accuracy
    return {
        "accuracy": accuracy,
        "reward": rewards,
        "root": swarm.state_root.hex(),
        "seconds": time.monotonic() - began,
    }


def run_all(runs: Iterable[tuple[str, int]], options: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    """Each in a process of its own, some side by side; every outcome is kept as soon as it is there."""

    def measure(codec: str, seed: int) -> Outcome:
        arguments = [f"--{name}={getattr(options, name)}" for name in ("versions", "every", "problems")]
        command = [sys.executable, __file__, *arguments, f"--one={codec}", f"--seed={seed}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"{codec}, seed {seed}: {done.stderr}")
        outcome: Outcome = json.loads(done.stdout)
        return outcome

    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {pool.submit(measure, codec, seed): (codec, seed) for codec, seed in runs}
        try:
            for future in as_completed(pending):
                codec, seed = pending[future]
                outcome = outcomes[name_of(codec, seed)] = future.result()
                save(options, outcomes)
                figures = "  ".join(f"{version}: {share:.4f}" for version, share in outcome["accuracy"].items())
                print(f"{codec:>8} seed {seed}: {figures}   {outcome['seconds']:.0f} s", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def name_of(codec: str, seed: int) -> str:
    """Of a run, in the file."""
    return f"{codec}/{seed}"


def settings(options: argparse.Namespace) -> dict[str, int]:
    """What outcomes depend on, beside codec and seed."""
    return {name: getattr(options, name) for name in ("versions", "every", "problems")}


def restore(options: argparse.Namespace) -> dict[str, Outcome]:
    """What the file has; ValueError if it is of other settings."""
    if options.json is None or not options.json.exists():
        return {}
    kept = json.loads(options.json.read_text())
    if kept["settings"] != settings(options):
        raise ValueError(f"{options.json} is of {kept['settings']}: name another file, or ask for the same")
    runs: dict[str, Outcome] = kept["runs"]
    return runs


def save(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    """Whole, or not at all."""
    if options.json is not None:
        content = {"settings": settings(options), "runs": dict(sorted(outcomes.items()))}
        write_whole(options.json, (json.dumps(content, indent=1) + "\n").encode())


def report(codecs: Sequence[str], seeds: Sequence[int], lengths: Lengths, outcomes: dict[str, Outcome]) -> bool:
    """Print the table; whether all bars are met."""
    places = {f"after {lengths.versions}": [lengths.versions], f"mean of {lengths.early}": lengths.early}

    def accuracies(codec: str, versions: Sequence[int]) -> list[float]:
        runs = [outcomes[name_of(codec, seed)]["accuracy"] for seed in seeds]
        return [fmean(run[str(version)] for version in versions) for run in runs]

    print(f"accuracy in %, and points to {BASELINE} with the 95 % interval over {len(seeds)} paired seeds")
    print(" " * 8 + "".join(f"{place:^36}" for place in places) + f"{'bar':>8}")
    met = True
    for codec in codecs:
        line, fits = f"{codec:8}", True
        for versions in places.values():
            ours, baseline = accuracies(codec, versions), accuracies(BASELINE, versions)
            line += f"{100 * fmean(ours):10.2f}"
            if codec == BASELINE:
                line += " " * 26
                continue
            difference = Difference.of(ours, baseline)
            line += f"{difference!s:>26}"
            fits = fits and difference.excludes(BARS[codec])
        if codec != BASELINE:
            line += f"{BARS[codec]:8.1f}  {'met' if fits else 'NOT met'}"
            met = met and fits
        print(line)
    return met


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="paired runs of each codec: seeds 0 and on")
    parser.add_argument("--versions", type=int, default=60, help="length of a run; the demo's by default")
    parser.add_argument("--every", type=int, default=10, help="versions between two measurements of accuracy")
    parser.add_argument("--problems", type=int, default=2000, help="held-out problems")
    parser.add_argument("--codecs", nargs="+", choices=BARS, default=list(BARS), help="beside fp32")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep outcomes there, and make only those it lacks")
    parser.add_argument("--one", choices=[BASELINE, *BARS], help="make only this run, here, and print its outcome")
    parser.add_argument("--seed", type=int, default=0, help="of that run")
    options = parser.parse_args()
    lengths = Lengths(options.versions, options.every)
    if options.one is not None:
        print(json.dumps(run_once(options.one, options.seed, lengths, options.problems)))
        return 0
    outcomes, codecs, seeds = restore(options), [BASELINE, *options.codecs], range(options.seeds)
    wanted = [(codec, seed) for seed in seeds for codec in codecs]
    run_all([run for run in wanted if name_of(*run) not in outcomes], options, outcomes)
    return 0 if report(codecs, seeds, lengths, outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
