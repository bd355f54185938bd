"""What a reward function is, what it may return, and what is made of that.

A function has TRL's signature, keyword arguments only: `prompts` and `completions` (strings, or lists of chat messages
where the dataset's prompts are), `completion_ids` (lists of token ids), and each column of the dataset as a list. It
returns one `Score` a completion, and may be `async`.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from hivegrpo.protocol.errors import ConfigError

Score = float | None | Sequence[tuple[int, float]]
"""One number, None to skip the completion, or steps: (index into completion_ids of the step's last token, its reward).

The indices ascend.
"""

Completion = str | list[dict[str, Any]]
"""The text of a completion, or a list of one chat message with the text as its content."""

RewardFunction = Callable[..., Any]
"""As the module says: mypy has no words for a function that names only the keywords it wants."""

BATCH = ("prompts", "completions", "completion_ids")
"""What every function is given, besides columns of the dataset and its options."""

SCALARS = (bool, int, float, str)
"""Types of an option. A parameter with such an annotation is an option, any other is a column of the dataset."""

MAX_SCORE = 1e6
"""Largest magnitude of a score: what is weighted and added up from scores stays finite."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Scored:
    """What one function made of a batch."""

    scores: list[Score]
    """One a completion: a finite number, None, or a tuple of steps that `checked` has let through."""
    failed: int = 0
    """Completions on which the function raised, died, ran over its budget or returned nonsense; their score is None."""
    why: str = ""
    """The first of these failures in a line, empty if there was none."""


@dataclass(frozen=True)
class Reward:
    """A reward function that is installed here, and the options that the run gives it."""

    name: str
    version: int
    """Changes whenever its scores do."""
    function: RewardFunction
    isolated: bool = False
    """Whether it runs in a process that can be killed; if not, in the caller's thread: linear time, bounded memory."""
    batched: bool = False
    """Whether an isolated function is given the whole batch first, and single completions only if that fails."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of every call."""
    answer_of: Callable[[str], str | None] = str.strip
    """The answer in a completion's text, where completions vote: equal strings are the same one; empty or None is none.

    It runs in the caller's thread, in linear time.
    """

    def require_columns(self, columns: Collection[str]) -> None:
        """ConfigError if the function needs a column that the dataset does not give."""
        missing = [
            parameter.name
            for parameter in _parameters(self.function)
            if needs_column(parameter) and parameter.name not in columns and parameter.name not in self.options
        ]
        if missing:
            given = ", ".join(name for name in columns if name not in BATCH) or "none"
            raise ConfigError(
                f'The reward function "{self.name}" needs the column {", ".join(missing)}; the dataset gives {given}.',
                "Name it in [dataset]: answer_column (which functions get as answer), or columns.",
            )

    def arguments(self, lists: Mapping[str, Value]) -> dict[str, Value]:
        """Of the lists that make a batch (BATCH and columns), those that the function takes; ConfigError if one lacks.

        `**_` takes nothing: it says that the rest is ignored. An option hides a column of its name.
        """
        self.require_columns(lists.keys())
        parameters = _parameters(self.function)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD and parameter.name != "_" for parameter in parameters)
        named = {parameter.name for parameter in parameters}
        options = {parameter.name for parameter in parameters if scalar(parameter) is not None} | self.options.keys()
        return {name: value for name, value in lists.items() if (takes_all or name in named) and name not in options}


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def is_argument(parameter: inspect.Parameter) -> bool:
    """Whether it is a column or an option: named, and none of what every function is given."""
    named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return named and parameter.name not in BATCH


def scalar(parameter: inspect.Parameter) -> type | None:
    """The type of an option, by the parameter's annotation; None for a column."""
    return next((kind for kind in SCALARS if parameter.annotation in (kind, kind.__name__)), None)


def needs_column(parameter: inspect.Parameter) -> bool:
    """Whether a call without the column of this name would fail."""
    return is_argument(parameter) and parameter.default is parameter.empty and scalar(parameter) is None


def text_of(completion: Completion) -> str:
    """The text of a completion, in either form."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def checked(score: object, tokens: int) -> Score:
    """A score as it is used from here on, for a completion of so many tokens; ValueError says what is wrong with it.

    No steps at all say nothing: None.
    """
    if score is None:
        return None
    if isinstance(score, (list, tuple)):
        steps = tuple(_step(step, tokens) for step in score)
        if any(first >= second for (first, _), (second, _) in pairwise(steps)):
            raise ValueError("steps that do not ascend")
        return steps or None
    return _finite(score)


def _step(step: object, tokens: int) -> tuple[int, float]:
    if not isinstance(step, (list, tuple)) or len(step) != 2:
        raise ValueError("a step that is no pair of index and reward")
    index, reward = step
    if type(index) is not int or not 0 <= index < tokens:
        raise ValueError(f"a step that does not end at one of the {tokens} tokens")
    return index, _finite(reward)


def _finite(number: object) -> float:
    try:
        if isinstance(number, (int, float)) and abs(float(number)) <= MAX_SCORE:
            return float(number)
    except OverflowError:
        pass  # an integer beyond the floats
    raise ValueError(f"a score that is no number of at most {MAX_SCORE:g}")
