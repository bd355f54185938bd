"""Reward functions by name: the built-in ones, and those that installed packages offer.

A package offers a function by an entry point of the group `hivegrpo.rewards`:

    [project.entry-points."hivegrpo.rewards"]
    my_reward = "my_package.rewards:my_reward"

The function has TRL's signature, keyword arguments only: `prompts`, `completions` (strings), `completion_ids` (lists
of token ids), and each column of the dataset as a list; it returns one float a completion, or None to skip it. An
integer attribute `version` (1 if it has none) changes whenever its scores do: all peers of a run have the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from hivegrpo.peer.rewards.exact import exact_match
from hivegrpo.peer.rewards.gsm8k import gsm8k_answer
from hivegrpo.protocol.errors import ConfigError

GROUP = "hivegrpo.rewards"


RewardFunction = Callable[..., Sequence[float | None]]
"""As the module says; mypy has no words for a function that names only the keywords it wants."""


@dataclass(frozen=True)
class Reward:
    """An installed reward function."""

    name: str
    version: int
    function: RewardFunction

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: Mapping[str, list[Any]],
    ) -> list[float]:
        """One number a completion; NaN where the function returned None, or something that is no finite number.

        ConfigError if it does not return one a completion.
        """
        scores = self.function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        if len(scores) != len(completions):
            raise ConfigError(
                f'The reward function "{self.name}" returned {len(scores)} scores for {len(completions)} completions.',
                "Correct it, or update the package that offers it.",
            )
        return [float(score) if score is not None and math.isfinite(score) else math.nan for score in scores]


BUILT_IN = {
    "exact_match": Reward("exact_match", 1, exact_match),
    "gsm8k_answer": Reward("gsm8k_answer", 1, gsm8k_answer),
}


def find_rewards(names: Sequence[str]) -> list[Reward]:
    """The reward functions of these names, in this order; ConfigError for one that is not installed here."""
    offered = {point.name: point for point in entry_points(group=GROUP)}
    rewards = []
    for name in names:
        if name in BUILT_IN:
            rewards.append(BUILT_IN[name])
        elif name in offered:
            function = offered[name].load()
            rewards.append(Reward(name, int(getattr(function, "version", 1)), function))
        else:
            raise ConfigError(
                f'There is no reward function "{name}" on this machine; there are {", ".join(installed())}.',
                f"Install the package that offers it (entry point group {GROUP}), or choose another.",
            )
    return rewards


def installed() -> list[str]:
    """Names of all reward functions that a run may use on this machine."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def reward_versions(rewards: Sequence[Reward]) -> dict[str, int]:
    """What the run manifest pins about rewards: the version of each."""
    return {reward.name: reward.version for reward in rewards}
