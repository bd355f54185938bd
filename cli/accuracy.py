"""How well a run's policy solves its held-out problems, before training and after."""

from dataclasses import dataclass
from pathlib import Path

from hivegrpo.peer.inference.load import load
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.evaluation import evaluate
from hivegrpo.peer.materials import read_rows
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.config import PeerConfig


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of the held-out problems that are solved greedily."""

    before: float
    after: float
    problems: int


def measure_accuracy(run: Path) -> Accuracy | None:
    """Of the base model and of the newest version in a run's folder; None if the run has no held-out problems."""
    trained = load(str(run), "latest", device="cpu")
    config, manifest = trained.run.config, trained.run.chain.manifest.message
    if config.evaluation is None:
        return None
    data = read_rows(
        manifest.evaluation, manifest.digests["evaluation"], config.dataset, config.evaluation, trained.run.stores[0]
    )
    rows = Prompts.from_jsonl(data).rows[: config.evaluation.limit]
    encoder = PromptEncoder(trained.tokenizer, config.dataset)
    first = config.rewards.functions[:1]
    options = {name: config.rewards.options.get(name, {}) for name in first}
    settings = PeerConfig()
    with RewardPool.of(find_rewards(first, options), settings) as pool:

        def accuracy() -> float:
            length = config.grpo.max_completion_length
            return evaluate(trained.policy, encoder, rows, pool, length, settings.sampling_tokens).accuracy

        after = accuracy()
        with trained.policy.reference():
            before = accuracy()
    return Accuracy(before, after, len(rows))
