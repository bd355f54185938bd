"""A benchmark, ready to be put to models: its problems, what scores them, and what it shares with the training rows."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hivegrpo.peer.evaluation.conditions import Conditions, conditions_of, reward_of
from hivegrpo.peer.evaluation.contamination import Contamination, find_contamination
from hivegrpo.peer.evaluation.problems import Problems, load_problems
from hivegrpo.peer.evaluation.settings import BenchmarkSection, EvaluateConfig
from hivegrpo.peer.evaluation.training import training_prompts
from hivegrpo.peer.inference.answering import Answering
from hivegrpo.peer.learn.data import PROMPT
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.rewards.pool import RewardPool
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import HiveError

if TYPE_CHECKING:
    from hivegrpo.peer.learn.messages import Prompt

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Part:
    """Completions under the same conditions."""

    name: str
    """GREEDY or SAMPLED."""
    copies: int
    """Completions of each problem."""
    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Exam:
    """Prepared once, for all models."""

    section: BenchmarkSection
    problems: Problems
    reward: Reward
    pool: RewardPool
    parts: tuple[Part, ...]
    contamination: Contamination | str
    """What was found, or why nothing could be looked for."""

    @property
    def completions(self) -> int:
        """That one model gives."""
        return len(self.problems.rows) * sum(part.copies for part in self.parts)


def prepare_exams(
    config: EvaluateConfig, answering: Answering, training: RunConfig | None, settings: PeerConfig
) -> list[Exam]:
    """In the order of the configuration. Whoever gets them closes their pools.

    ConfigError for problems that cannot be read, or a reward that is not installed or does not fit them;
    UnreachableError if a hub does not answer.
    """
    run = answering.trained.run if answering.trained is not None else None
    exams: list[Exam] = []
    for section in config.benchmark:
        problems = load_problems(section, run)
        reward = reward_of(section, training.rewards if training is not None else None)
        reward.require_columns(problems.rows[0].keys())
        conditions = conditions_of(section, answering, reward, config.seed)
        parts = [Part(GREEDY, 1, conditions.greedily())] if section.greedy else []
        if section.n:
            parts.append(Part(SAMPLED, section.n, conditions))
        pool = RewardPool.of([reward], settings)
        prompts: list[Prompt] = [row[PROMPT] for row in problems.rows]
        contamination = _look_for(prompts, training_prompts(run, training, config.training))
        exams.append(Exam(section, problems, reward, pool, tuple(parts), contamination))
    return exams


def _look_for(prompts: "list[Prompt]", training: "Iterable[Prompt]") -> Contamination | str:
    try:
        return find_contamination(prompts, training)
    except HiveError as error:
        return str(error)
