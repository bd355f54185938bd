"""Tasks of reasoning-gym: generated rows to train on, and a reward for each.

Some scorers of reasoning-gym evaluate the text of a completion as code, and others can be kept busy by it. So a task
can be used if its scorer was read and only compares or parses (`tasks.ALLOWED`), or if there is an own one
(`puzzles.OWN`); the others are refused by name, each for a reason (`tasks.REFUSED`). That holds for the one version
that was read, and no other is used.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hivegrpo.peer.rewards.base import Completion, Reward, RewardFunction, text_of
from hivegrpo.peer.rewards.puzzles import OWN, Scorer
from hivegrpo.peer.rewards.tasks import ALLOWED, FORBIDDEN, READS, REFUSED, UNANSWERED
from hivegrpo.protocol.errors import ConfigError

AUDITED = "0.1.25"
"""The version of reasoning-gym whose scorers were read."""
REVISION = 1
"""Of what this module and the own scorers make of an answer."""

GENERATION_SECONDS = 600.0
"""For all rows of a dataset; looked at between two of them."""

MAX_ANSWER = 16_384
"""Characters of an answer; a longer one scores 0. The longest gold answers have 7,000."""


def generate_rows(task: str, size: int, seed: int, clock: Callable[[], float] = time.monotonic) -> list[dict[str, Any]]:
    """The rows {"prompt", "answer", "metadata"} that reasoning-gym generates for a task; the same on every machine.

    prompt: its question; answer: its gold answer, None where many are right; metadata: what the scorer reads beside
    that, as a JSON object in a string. ConfigError if the task cannot be used, reasoning-gym is not installed, or the
    rows take longer than GENERATION_SECONDS: who launches a run chooses how many there are.
    """
    _require(task)
    deadline = clock() + GENERATION_SECONDS
    from reasoning_gym import create_dataset  # type: ignore[import-untyped]  # it ships no types

    rows = []
    with contextlib.redirect_stdout(sys.stderr):  # some generators print
        dataset = create_dataset(task, size=size, seed=seed)
        for index in range(size):
            if clock() > deadline:
                raise ConfigError(
                    f"{size} rows of {task} are too many: after {GENERATION_SECONDS:.0f} s there were {index}.",
                    "Set a smaller size in run.toml, or take part on a faster machine.",
                )
            entry = dataset[index]
            kept = _kept(task, entry["metadata"])
            metadata = json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
            rows.append({"prompt": entry["question"], "answer": entry["answer"], "metadata": metadata})
    return rows


def reasoning_gym_reward(task: str) -> Reward:
    """The reward for a task; its function needs the columns answer and metadata, as `generate_rows` gives them.

    ConfigError if the task cannot be used, or reasoning-gym is not installed.
    """
    _require(task)

    def score(*, completions: list[Completion], answer: list[Any], metadata: list[Any], **_: Any) -> list[float | None]:
        """What the task's scorer gives each completion's answer, 0 to 1; None where a row is not of this task."""
        rows = zip(completions, answer, metadata, strict=True)
        return [_score(task, text_of(completion), gold, facts) for completion, gold, facts in rows]

    return Reward(f"reasoning_gym:{task}", _version_number(), score, isolated=True, answer_of=extract_answer)


def load_reward(task: str) -> RewardFunction:
    """The function of `reasoning_gym_reward`, with all that it imports, so that its first call takes no longer."""
    function: RewardFunction = reasoning_gym_reward(task).function
    _scorer(task)
    return function


def extract_answer(text: str) -> str:
    """The answer in a completion, without white space around it.

    Thoughts are left out: what counts follows the last "</think>", if there is one. Of that it is what stands in the
    last <answer>...</answer> (in an unclosed one, all that follows), or all of it if there is none.
    """
    _, _, said = text.rpartition("</think>")
    _, _, answer = said.rpartition("<answer>")
    return answer.partition("</answer>")[0].strip()


def _require(task: str) -> None:
    usable = sorted(ALLOWED | OWN.keys())
    if task not in usable:
        reason = f"cannot be used: {REFUSED[task]}" if task in REFUSED else "does not exist"
        raise ConfigError(f'The task "{task}" of reasoning-gym {reason}.', f"Choose one of these: {', '.join(usable)}.")
    try:
        installed = version("reasoning-gym")
    except PackageNotFoundError:
        raise ConfigError("reasoning-gym is not installed.", "Install it: pip install 'hivegrpo[reasoning]'.") from None
    if installed != AUDITED:
        raise ConfigError(
            f"reasoning-gym {installed} is installed, and only the scorers of {AUDITED} are known to be safe.",
            f"Install that one: pip install reasoning-gym=={AUDITED}.",
        )


def _version_number() -> int:
    """0.1.25 at revision 1 is 102501: the same on two peers only if reasoning-gym and this module are."""
    major, minor, patch = map(int, AUDITED.split("."))
    return ((major * 1000 + minor) * 1000 + patch) * 100 + REVISION


def _score(task: str, completion: str, gold: Any, metadata: Any) -> float | None:
    try:
        facts = _kept(task, json.loads(metadata))
    except (TypeError, ValueError):
        return None
    if (task in READS and not facts) or (gold is None and task not in UNANSWERED):
        return None
    answer = extract_answer(completion)
    forbidden = FORBIDDEN.get(task)
    if len(answer) > MAX_ANSWER or (forbidden is not None and forbidden.search(answer)):
        return 0.0
    try:
        score = float(_scorer(task)(answer, str(gold), facts))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - scorers raise all kinds of things on what is no answer
        return 0.0
    # Above 1 by a rounding error, or by as much as one likes: calendar_arithmetic, where the gold number is negative.
    return min(score, 1.0) if 0.0 <= score < 1.000001 else 0.0


def _kept(task: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in READS.get(task, ()) if key in metadata}


@cache
def _scorer(task: str) -> Scorer:
    if task in OWN:
        return OWN[task]
    from reasoning_gym import get_score_answer_fn

    upstream = get_score_answer_fn(task)
    return lambda answer, gold, facts: upstream(answer=answer, entry={"answer": gold, "metadata": dict(facts)})
