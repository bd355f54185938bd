"""Running the reward functions of a run over batches of completions."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Self

from hivegrpo.peer.learn.cancel import check
from hivegrpo.peer.rewards.base import Completion, Reward, Score, Scored, checked
from hivegrpo.peer.rewards.crew import Crew
from hivegrpo.peer.rewards.frames import encode
from hivegrpo.peer.rewards.process import Call
from hivegrpo.protocol.config import PeerConfig

BATCH_SECONDS = 30.0
"""The most that a whole batch in one call may take, unless a single completion may take more."""

Lists = Mapping[str, Sequence[Any]]
"""Arguments of a function by name: one value a completion."""

_MAX_WHY = 200
_ANSWER_BYTES = 4096
"""For what is around the scores."""
_SCORE_BYTES = 64
"""For a score, or a step."""


class RewardPool:
    """The reward functions of a run, and the processes of those that are isolated.

    The processes start with the first batch that needs them and stay for the next. Leaving the context, or `close`,
    ends them, and so does the end of this process, however it comes.
    """

    def __init__(self, rewards: Sequence[Reward], *, seconds: float, memory_mib: int, workers: int) -> None:
        """seconds, memory_mib: what an isolated function may take for one completion; workers: how many processes."""
        self.rewards = list(rewards)
        self._seconds = seconds
        isolated = [reward.name for reward in rewards if reward.isolated]
        self._numbers = {name: number for number, name in enumerate(isolated)}
        self._crew = Crew(isolated, memory_mib << 20, workers)

    @classmethod
    def of(cls, rewards: Sequence[Reward], settings: PeerConfig) -> Self:
        """With what a volunteer lets functions take on this machine."""
        return cls(
            rewards,
            seconds=settings.reward_seconds,
            memory_mib=settings.reward_memory_mib,
            workers=settings.reward_workers,
        )

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        columns: Lists,
        cancelled: threading.Event | None = None,
    ) -> list[Scored]:
        """What each function gives the completions, in the order of the functions.

        A completion on which a function fails, whatever it does, gets None from it, and is counted. ConfigError if a
        function cannot be loaded, or needs a column that is not there; Cancelled if the event is set or the pool
        closed.
        """
        lists: dict[str, Sequence[Any]] = dict(columns)
        lists |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        assert all(len(values) == len(completions) for values in lists.values())
        arguments = [reward.arguments(lists) for reward in self.rewards]
        lengths = [len(ids) for ids in completion_ids]
        outcomes = [_Outcome(lengths) for _ in self.rewards]
        calls: deque[Call] = deque()
        for place, reward in enumerate(self.rewards):
            check(cancelled)
            if reward.isolated:
                calls += self._plan(place, range(len(completions)), lengths)
            else:
                _call_here(reward, arguments[place], outcomes[place])
        if calls:
            self._call_there(calls, arguments, outcomes, cancelled)
        return [outcome.scored() for outcome in outcomes]

    def close(self) -> None:
        """End all processes; a batch that is being scored in another thread ends in Cancelled."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self, place: int, indices: Sequence[int], lengths: Sequence[int]) -> list[Call]:
        """One call for all of them where the function takes batches, else one a completion."""
        if self.rewards[place].batched and len(indices) > 1:
            seconds = max(self._seconds, min(len(indices) * self._seconds, BATCH_SECONDS))
            return [_call(place, indices, seconds, lengths)]
        return [_call(place, [index], self._seconds, lengths) for index in indices]

    def _call_there(
        self,
        calls: deque[Call],
        arguments: Sequence[Lists],
        outcomes: Sequence["_Outcome"],
        cancelled: threading.Event | None,
    ) -> None:
        """In other processes. A call for several completions that fails is made again for each of them."""

        def frame(call: Call) -> bytes:
            reward = self.rewards[call.place]
            lists = {name: [values[index] for index in call.indices] for name, values in arguments[call.place].items()}
            function = {"function": self._numbers[reward.name], "arguments": {**lists, **reward.options}}
            return encode({"key": call.key, "seconds": call.seconds, **function})

        with closing(self._crew.run(calls, frame, cancelled)) as answers:
            for call, answer in answers:
                outcome, scores = outcomes[call.place], answer.get("scores")
                if isinstance(scores, list) and len(scores) == len(call.indices):
                    outcome.give(call.indices, scores)
                elif len(call.indices) > 1:
                    calls += [_call(call.place, [index], self._seconds, outcome.lengths) for index in call.indices]
                elif isinstance(scores, list):
                    outcome.fail(call.indices, f"it returned {len(scores)} scores for 1 completion")
                else:
                    outcome.fail(call.indices, str(answer.get("error")))


class _Outcome:
    """What is known so far of the scores that one function gives a batch."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """lengths: tokens of each completion."""
        self.lengths = lengths
        self._scores: list[Score] = [None] * len(lengths)
        self._failed = 0
        self._why = ""

    def give(self, indices: Sequence[int], scores: Sequence[object]) -> None:
        for index, score in zip(indices, scores, strict=True):
            try:
                self._scores[index] = checked(score, self.lengths[index])
            except ValueError as error:
                self.fail([index], f"it returned {error}")

    def fail(self, indices: Sequence[int], why: str) -> None:
        self._failed += len(indices)
        self._why = self._why or _one_line(why)

    def scored(self) -> Scored:
        return Scored(self._scores, self._failed, self._why)


def _call(place: int, indices: Sequence[int], seconds: float, lengths: Sequence[int]) -> Call:
    scores = sum(1 + lengths[index] for index in indices)
    return Call(place, indices, seconds, _ANSWER_BYTES + _SCORE_BYTES * scores)


def _call_here(reward: Reward, arguments: Lists, outcome: _Outcome) -> None:
    """In this thread."""
    everything = range(len(outcome.lengths))
    try:
        scores = list(reward.function(**arguments, **reward.options))
        assert len(scores) == len(everything)
    except Exception as error:  # noqa: BLE001 - a function that raises must not end the round
        outcome.fail(everything, f"{type(error).__name__}: {error}")
    else:
        outcome.give(everything, scores)


def _one_line(text: str) -> str:
    """Words that came from elsewhere, safe to show on a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_WHY])
