"""Prompts, answers and what else rewards look at: canonical rows, the same bytes wherever they come from."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hivegrpo.peer.learn.messages import FORMS, prompt_complaint
from hivegrpo.peer.learn.sources import MAX_BYTES, Row, read_lines, read_source, title_of
from hivegrpo.peer.rewards.base import BATCH
from hivegrpo.protocol.config import DatasetSection, EvaluationSection, Rows
from hivegrpo.protocol.errors import ConfigError

PROMPT = "prompt"
ANSWER = "answer"

MAX_ROWS = 1 << 22
MAX_ROW_BYTES = 4 << 20
"""Of a line: its columns are repeated for each completion that a reward looks at."""

JSON_ERRORS = (TypeError, ValueError, RecursionError)
"""Of values that it cannot hold: other types, NaN and lone surrogates, deep nesting."""

LEAVE_OUT = "Leave it out: name in [dataset] columns those that the rewards need."


@dataclass(frozen=True)
class Prompts:
    """Rows that a peer trains on or evaluates with: at least one, all with the same columns."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> frozenset[str]:
        """What each row has."""
        return frozenset(self.rows[0])

    @classmethod
    def from_jsonl(cls, source: Path | bytes) -> Self:
        """Parse canonical rows, which may come from the network; ConfigError names the first line that is none."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise ConfigError(f"The canonical rows have {size} bytes.", f"There have to be 1 to {MAX_BYTES}.")
        data = source if isinstance(source, bytes) else source.read_bytes()
        rows: list[Row] = []
        for line, row in zip(io.BytesIO(data), read_lines(data, "the canonical rows"), strict=True):
            complaint = _complaint(row, line, rows)
            if complaint is not None:
                raise ConfigError(
                    f"Line {len(rows) + 1} of the canonical rows {complaint}.", "Let the coordinator write them again."
                )
            rows.append(row)
        return cls(tuple(rows))


def canonical_rows(dataset: DatasetSection, held_out: Rows | None = None) -> bytes:
    """The dataset as JSON lines {"answer": ..., "prompt": ..., ...}: keys sorted, no spaces, UTF-8, one "\\n" a row.

    Every further column, or those that `dataset.columns` names, keeps its name. `held_out` names other rows with the
    same columns, as [evaluation] does. ConfigError if there are no rows, they cannot be read, or one has no usable
    prompt, other columns than the first, or a value that JSON cannot hold; UnreachableError if the hub does not answer.
    """
    source = held_out or dataset
    title = title_of(source)
    if isinstance(held_out, EvaluationSection):
        own = {"prompt_column": held_out.prompt_column, "answer_column": held_out.answer_column}
        dataset = dataset.model_copy(update={name: column for name, column in own.items() if column is not None})
    needed = frozenset((*_renamed(dataset).values(), *(dataset.columns or ())))
    only = needed if dataset.columns is not None else None
    lines: list[bytes] = []
    size = 0
    for number, row in enumerate(read_source(source, "test" if held_out else "train", only), 1):
        where = f"Row {number} of {title}"
        if not needed <= row.keys():
            raise ConfigError(
                f'{where} has no column "{min(needed - row.keys())}"; it has {", ".join(sorted(row))}.',
                'Set prompt_column, answer_column ("" if there is none) and columns in [dataset].',
            )
        if not lines:
            first, columns = row, _columns(dataset, row, title)
        _require_like(first, row, columns[PROMPT], only, where)
        lines.append(_canonical(row, columns, where))
        size += len(lines[-1])
        if len(lines[-1]) > MAX_ROW_BYTES:
            raise ConfigError(f"{where} has {len(lines[-1])} bytes; a row may have {MAX_ROW_BYTES}.", LEAVE_OUT)
        if number > MAX_ROWS or size > MAX_BYTES:
            raise ConfigError(
                f"The rows of {title} are more than {MAX_ROWS}, or have more than {MAX_BYTES} bytes.",
                "Take a part of them, or name in [dataset] columns those that the rewards need.",
            )
    if not lines:
        raise ConfigError(f"There are no rows in {title}.", "Check path or split.")
    return b"".join(lines)


def require_same_columns(prompts: Prompts, held_out: Prompts) -> None:
    """ConfigError unless rewards get the same of both."""
    differing = prompts.columns ^ held_out.columns
    if differing:
        raise ConfigError(
            f"The rows of [dataset] and [evaluation] differ in their columns: {', '.join(sorted(differing))}.",
            "Name in [dataset] columns those that the rewards need; both have to have them.",
        )


def _renamed(dataset: DatasetSection) -> dict[str, str]:
    """The columns that get another name: theirs in the source by that name."""
    renamed = {PROMPT: dataset.prompt_column}
    if dataset.answer_column:
        renamed[ANSWER] = dataset.answer_column
    return renamed


def _columns(dataset: DatasetSection, row: Row, title: str) -> dict[str, str]:
    """All columns of rows like this one: their name in the source by their canonical name."""
    columns = _renamed(dataset)
    further = dataset.columns if dataset.columns is not None else row.keys() - columns.values()
    for name in sorted(further):
        if name in BATCH:
            raise ConfigError(f'Rewards get something else as {name} than the "{name}" of {title}.', LEAVE_OUT)
        if columns.setdefault(name, name) != name:
            raise ConfigError(f'Rewards get "{columns[name]}" as {name}, not the "{name}" of {title}.', LEAVE_OUT)
    return columns


def _require_like(first: Row, row: Row, prompt: str, only: frozenset[str] | None, where: str) -> None:
    """ConfigError unless a row has the columns of the first, and the same form of prompt."""
    if only is None and row.keys() != first.keys():
        raise ConfigError(
            f"{where} has not the columns of the first: they differ in {', '.join(sorted(row.keys() ^ first))}.",
            "Give all rows the same, or name in [dataset] columns those that the rewards need.",
        )
    complaint = prompt_complaint(row[prompt])
    if complaint is None and type(row[prompt]) is not type(first[prompt]):
        complaint = "another form of prompt than the first row"
    if complaint is not None:
        raise ConfigError(f'{where} has in "{prompt}" {complaint}.', FORMS)


def _canonical(row: Row, columns: dict[str, str], where: str) -> bytes:
    """One line."""
    try:
        return _line({name: row[column] for name, column in columns.items()})
    except JSON_ERRORS as error:
        guilty = [name for name, column in columns.items() if not _is_json({name: row[column]})]
        raise ConfigError(
            f"{where} has in {', '.join(columns[name] for name in guilty)} what JSON and UTF-8 cannot hold: {error}.",
            "Answers are strings, numbers, or lists of them." if {PROMPT, ANSWER} & {*guilty} else LEAVE_OUT,
        ) from None


def _line(row: Row) -> bytes:
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"{text}\n".encode()


def _is_json(row: Row) -> bool:
    try:
        _line(row)
    except JSON_ERRORS:
        return False
    return True


def _complaint(row: Row, line: bytes, before: list[Row]) -> str | None:
    """What keeps a line, parsed as `row`, from being the next canonical row; None if nothing does."""
    if len(line) > MAX_ROW_BYTES:
        return f"has {len(line)} bytes; a row may have {MAX_ROW_BYTES}"
    try:
        written = _line(row)
    except JSON_ERRORS as error:
        return f"has a value that it cannot have: {error}"
    if written.rstrip(b"\n") != line.rstrip(b"\n"):
        return "is not written as canonical rows are"
    first = before[0] if before else row
    if PROMPT not in row or row.keys() != first.keys() or not row.keys().isdisjoint(BATCH):
        return "has no prompt, other columns than the first, or one with the name of something else that rewards get"
    if type(row[PROMPT]) is not type(first[PROMPT]):
        return "has another form of prompt than the first"
    if len(before) == MAX_ROWS:
        return f"is one too many; there are at most {MAX_ROWS}"
    complaint = prompt_complaint(row[PROMPT])
    return None if complaint is None else f"has for a prompt {complaint}"
