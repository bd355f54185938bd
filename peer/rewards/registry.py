"""Reward functions by name: the built-in ones, and those that installed packages offer.

A package offers a function (`hivegrpo.peer.rewards.base` says of which form) by an entry point of the group
`hivegrpo.rewards`:

    [project.entry-points."hivegrpo.rewards"]
    my_reward = "my_package.rewards:my_reward"

An integer attribute `version` (1 if it has none) changes whenever its scores do: all peers of a run have the same. A
run may give it options, keyword arguments of every call: parameters that it names, of type bool, int, float or str.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hivegrpo.peer.rewards.answers import boxed_answer, number_answer
from hivegrpo.peer.rewards.base import Completion, Reward, RewardFunction, is_argument, needs_column, scalar
from hivegrpo.peer.rewards.exact import exact_match
from hivegrpo.peer.rewards.formats import format_tags
from hivegrpo.peer.rewards.gsm8k import gsm8k_answer
from hivegrpo.peer.rewards.lengths import length_penalty, soft_overlong_punishment
from hivegrpo.peer.rewards.repetition import repetition_penalty
from hivegrpo.protocol.errors import ConfigError

GROUP = "hivegrpo.rewards"

REASONING = "reasoning_gym:"
"""Before the name of a task of reasoning-gym."""

CHAT_TEMPLATE = "chat template"
"""To a worker, the name of `peer.learn.templates.render`, which is no reward: `find_rewards` does not know it."""

Options = Mapping[str, Mapping[str, Any]]
"""Keyword arguments by name of function."""


def math_verify(*, completions: list[Completion], answer: list[Any], **_: Any) -> list[float | None]:
    """`mathematics.math_verify`, imported by those who call it: sympy takes seconds, and the peer only names it."""
    return list(load_function("math_verify")(completions=completions, answer=answer))


BUILT_IN = {
    "exact_match": Reward("exact_match", 1, exact_match),
    "format_tags": Reward("format_tags", 1, format_tags),
    "gsm8k_answer": Reward("gsm8k_answer", 2, gsm8k_answer, answer_of=number_answer),
    "length_penalty": Reward("length_penalty", 1, length_penalty),
    "math_verify": Reward("math_verify", 1, math_verify, isolated=True, answer_of=boxed_answer),
    "repetition_penalty": Reward("repetition_penalty", 1, repetition_penalty),
    "soft_overlong_punishment": Reward("soft_overlong_punishment", 1, soft_overlong_punishment),
}


def find_rewards(names: Sequence[str], options: Options | None = None) -> list[Reward]:
    """The reward functions of these names, in this order, each with its options.

    ConfigError for one that is not installed here, or that does not take its options.
    """
    return [_with_options(_find(name), (options or {}).get(name, {})) for name in names]


def load_function(name: str) -> RewardFunction:
    """The function of this name, with everything that it imports: what a worker calls."""
    if name == CHAT_TEMPLATE:
        from hivegrpo.peer.learn.templates import load_render

        return load_render()
    if name == "math_verify":
        from hivegrpo.peer.rewards.mathematics import math_verify

        return math_verify
    if name.startswith(REASONING):
        from hivegrpo.peer.rewards.reasoning import load_reward

        return load_reward(name.removeprefix(REASONING))
    return _find(name).function


def installed() -> list[str]:
    """Names of all reward functions that a run may use on this machine."""
    return sorted({*BUILT_IN, f"{REASONING}TASK", *_offered()})


def reward_versions(rewards: Sequence[Reward]) -> dict[str, int]:
    """What the run manifest pins about rewards: the version of each."""
    return {reward.name: reward.version for reward in rewards}


def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _find(name: str) -> Reward:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith(REASONING):
        from hivegrpo.peer.rewards.reasoning import reasoning_gym_reward

        return reasoning_gym_reward(name.removeprefix(REASONING))
    offered = _offered()
    if name not in offered:
        raise ConfigError(
            f'There is no reward function "{name}" on this machine; there are {", ".join(installed())}.',
            f"Install the package that offers it (entry point group {GROUP}), or choose another.",
        )
    try:
        function = offered[name].load()
        version = int(getattr(function, "version", 1))
        inspect.signature(function)
    except Exception as error:
        raise ConfigError(
            f'The reward function "{name}" cannot be loaded: {type(error).__name__}: {error}.',
            "Correct it, or update the package that offers it.",
        ) from error
    return Reward(name, version, function, isolated=True, batched=True)


def _with_options(reward: Reward, options: Mapping[str, Any]) -> Reward:
    parameters = inspect.signature(reward.function).parameters.values()
    taken = {parameter.name: parameter for parameter in parameters if is_argument(parameter)}
    takes = ", ".join(map(str, taken.values())) or "nothing"
    for name, value in options.items():
        if name not in taken or not _fits(value, taken[name]):
            raise _refused(reward, f"does not take {name} = {value!r}", takes)
    missing = [name for name in taken if _is_required(taken[name]) and name not in options]
    if missing:
        raise _refused(reward, f"needs {', '.join(missing)}", takes)
    chosen = replace(reward, options=dict(options))
    if reward.name in BUILT_IN and not reward.isolated:
        columns: dict[str, list[Any]] = {name: [] for name in taken if needs_column(taken[name])}
        chosen.function(prompts=[], completions=[], completion_ids=[], **columns, **options)  # looks at the values
    return chosen


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and scalar(parameter) is not None


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether the value is of the type that the parameter is annotated with, if that is an option's."""
    kind = scalar(parameter)
    return kind is None or type(value) is kind or (kind is float and type(value) is int)


def _refused(reward: Reward, what: str, takes: str) -> ConfigError:
    return ConfigError(
        f'The reward function "{reward.name}" {what}. It takes {takes}.', f"Correct [rewards.options.{reward.name}]."
    )
