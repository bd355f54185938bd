"""The demo's task for the benchmark of quality: its run, and 2,000 problems that the run never trains on.

There are 8,100 problems `a+b=` with a and b in 10..99, and the demo trains on 7,114 of them. The others are its 500
held-out ones and the same the other way round, 986 together. To come to more, whole pairs (a+b and b+a) are taken from
the training problems, drawn once: GRPO never sees them, but the starter has been taught on them, like on all others
that were left to it; mostly wrong answers, where there is a carry.
"""

import random
from importlib import resources
from pathlib import Path

from hivegrpo.peer.learn.data import PROMPT, Prompts, canonical_rows
from hivegrpo.peer.learn.evaluation import Evaluation, evaluate
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.learn.sources import Row
from hivegrpo.protocol.config import PeerConfig, RunConfig

FOLDER = Path(str(resources.files("hivegrpo.cli"))) / "addition"
DRAW_SEED = 0
"""Of the pairs that are taken from the training problems."""

Pair = tuple[int, ...]


def task_config(codec: str, seed: int, versions: int) -> RunConfig:
    """The demo's run with another codec, seed and length; all else as it is."""
    config = RunConfig.load(FOLDER / "run.toml")
    run = config.run.model_copy(update={"seed": seed, "versions": versions})
    return config.model_copy(update={"run": run, "averaging": config.averaging.model_copy(update={"codec": codec})})


def task_problems(config: RunConfig, count: int) -> tuple[Prompts, Prompts]:
    """(to train on, held out): of the latter `count`, the demo's own first; none is trained on, either way round."""
    train = Prompts.from_jsonl(canonical_rows(config.dataset)).rows
    demo = Prompts.from_jsonl(canonical_rows(config.dataset, config.evaluation)).rows
    seen = {row[PROMPT] for row in demo}
    held_out = [*demo, *(row for row in map(_swapped, demo) if row[PROMPT] not in seen)]
    pairs = sorted({_pair(row) for row in train})
    random.Random(DRAW_SEED).shuffle(pairs)
    missing = max(0, count - len(held_out))
    drawn = set(pairs[: -(-missing // 2)])
    while sum(1 if a == b else 2 for a, b in drawn) < missing:
        drawn.add(pairs[len(drawn)])
    held_out += [row for row in train if _pair(row) in drawn]
    return Prompts(tuple(row for row in train if _pair(row) not in drawn)), Prompts(tuple(held_out[:count]))


def open_learner(config: RunConfig, train: Prompts) -> Learner:
    """A peer's learning side on the starter model, on the CPU."""
    return Learner.open(config, PeerConfig(device="cpu", threads=1), FOLDER / "starter", train)


def accuracy_on(learner: Learner, held_out: Prompts) -> Evaluation:
    """How many problems the version that is loaded solves greedily, as the demo measures it."""
    return evaluate(
        learner.policy,
        learner.encoder,
        held_out.rows,
        learner.pool,
        learner.config.grpo.max_completion_length,
        learner.peer.sampling_tokens,
    )


def _operands(row: Row) -> Pair:
    return tuple(map(int, row[PROMPT].removesuffix("=").split("+")))


def _pair(row: Row) -> Pair:
    return tuple(sorted(_operands(row)))


def _swapped(row: Row) -> Row:
    a, b = _operands(row)
    return row | {PROMPT: f"{b}+{a}="}
