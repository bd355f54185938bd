"""What was sampled, on disk: a JSON object a line, so that an evaluation goes on where it stopped, and repeats nothing.

The first line says what the file is of (model, problems, conditions), and names the file by its digest: another model
or setting has another file. Lines are only ever appended, and synced once a batch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import sync_folder, write_whole

FORMAT = 1
MAX_KEY = 64
"""Characters of an answer that is kept in memory as it is; of a longer one, the digest is."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One completion of one problem."""

    problem: int
    """The row's place in its source."""
    sample: int
    """From 0, among those of the problem."""
    text: str
    tokens: int
    """With the end token."""
    terminated: bool
    """Whether it ended by itself, and was not cut."""
    score: float | None
    """None if the reward gave none, or failed."""

    @property
    def record(self) -> dict[str, Any]:
        """Its fields, as they are written."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept in memory of an attempt."""

    solved: bool
    scored: bool
    terminated: bool
    answer: str | None
    """For the majority vote; None if it has none."""


AnswerOf = Callable[[str], str | None]


class Ledger:
    """One file. Its owner alone writes to it: the folder is locked."""

    def __init__(self, path: Path, outcomes: dict[tuple[int, int], Outcome], answer_of: AnswerOf) -> None:
        self.path = path
        self.outcomes = outcomes
        """By problem and sample."""
        self._answer_of = answer_of
        self._file = path.open("ab")

    @classmethod
    def open(cls, folder: Path, header: Mapping[str, Any], answer_of: AnswerOf) -> Self:
        """The file of this header in `folder`, begun if there is none; a last line that a crash tore is cut off.

        ConfigError if the file is damaged elsewhere.
        """
        first = {"format": FORMAT, **header}
        path = folder / f"{digest_of(first)}.jsonl"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, _line(first))
            sync_folder(folder)
        _cut_torn_line(path)
        outcomes: dict[tuple[int, int], Outcome] = {}
        lines = _read_lines(path)
        if next(lines, None) != first:
            raise _damaged(path, 1)
        for number, record in enumerate(lines, 2):
            try:
                attempt = Attempt(**record)
                outcomes[int(attempt.problem), int(attempt.sample)] = _outcome(attempt, answer_of)
            except (AttributeError, TypeError, ValueError):
                raise _damaged(path, number) from None
        return cls(path, outcomes, answer_of)

    def append(self, attempts: Iterable[Attempt]) -> None:
        """Add a batch; it is on disk when this returns."""
        batch = list(attempts)
        self._file.write(b"".join(_line(attempt.record) for attempt in batch))
        self._file.flush()
        os.fsync(self._file.fileno())
        for attempt in batch:
            self.outcomes[attempt.problem, attempt.sample] = _outcome(attempt, self._answer_of)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def digest_of(values: Mapping[str, Any]) -> str:
    """The first 32 hex digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def _outcome(attempt: Attempt, answer_of: AnswerOf) -> Outcome:
    answer = answer_of(attempt.text) or None
    if answer is not None and len(answer) > MAX_KEY:
        answer = hashlib.sha256(answer.encode(errors="surrogatepass")).hexdigest()
    score = attempt.score
    return Outcome(score is not None and score >= 1.0, score is not None, bool(attempt.terminated), answer)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise _damaged(path, number) from None


def _cut_torn_line(path: Path) -> None:
    """Cut what follows the last line break, found from the end: the file may be large."""
    step = 1 << 16
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - step)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                file.truncate(start + place + 1)
                return
            end = start


def _damaged(path: Path, line: int) -> ConfigError:
    return ConfigError(f"Line {line} of {path} is not what was written there.", "Move that file away, and start again.")
