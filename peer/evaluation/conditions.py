"""Everything that a completion and its score depend on, beside the model and the problem."""

from dataclasses import dataclass, replace
from typing import Any

from hivegrpo.peer.evaluation.settings import BenchmarkSection, required_reward
from hivegrpo.peer.inference.answering import Answering
from hivegrpo.peer.learn.encoding import PromptEncoder
from hivegrpo.peer.learn.sampler import Sampling
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.rewards.registry import find_rewards
from hivegrpo.protocol.config import RewardsSection
from hivegrpo.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Conditions:
    """Of one benchmark's samples, or of its greedy completions."""

    system_prompt: str | None
    prompt_template: str | None
    max_completion_length: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    seed: int
    reward: str
    reward_version: int
    options: dict[str, Any]

    @property
    def sampling(self) -> Sampling:
        """As the sampler takes it."""
        return Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k)

    def greedily(self) -> "Conditions":
        """The same for greedy completions, which depend on no seed."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=0, seed=0)


def conditions_of(section: BenchmarkSection, answering: Answering, reward: Reward, seed: int) -> Conditions:
    """What a benchmark says, and for what it does not say the settings that the model was trained under."""
    encoder, grpo = encoder_of(section, answering), answering.grpo
    return Conditions(
        system_prompt=encoder.system_prompt,
        prompt_template=encoder.prompt_template,
        max_completion_length=section.max_completion_length or grpo.max_completion_length,
        temperature=section.temperature or grpo.temperature,
        top_p=section.top_p or grpo.top_p,
        top_k=grpo.top_k if section.top_k is None else section.top_k,
        seed=seed,
        reward=reward.name,
        reward_version=reward.version,
        options=dict(reward.options),
    )


def encoder_of(section: BenchmarkSection, answering: Answering) -> PromptEncoder:
    """Of a benchmark's prompts: in the form that it says, or that of the training."""
    if section.system_prompt is None and section.prompt_template is None:
        return answering.encoder
    return answering.encoder.of(section.dataset)


def reward_of(section: BenchmarkSection, training: RewardsSection | None) -> Reward:
    """The function that says which completions are right; ConfigError if none is named, or it is not installed."""
    name, options = required_reward(section), section.options
    if name is None:
        if training is None:
            raise ConfigError(
                f"Nothing says how {section.title} is scored.", "Name a reward function: --reward exact_match."
            )
        name = training.functions[0]
        options = training.options.get(name, {}) if options is None else options
    [reward] = find_rewards([name], {name: options or {}})
    return reward
