"""Prompts and answers: canonical rows, the same bytes wherever they come from."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hivegrpo.protocol.config import DatasetSection, Rows
from hivegrpo.protocol.errors import ConfigError, UnreachableError

PROMPT = "prompt"
ANSWER = "answer"


@dataclass(frozen=True)
class Prompts:
    """Rows that a peer trains on or evaluates with; all share the same columns."""

    rows: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def from_jsonl(cls, source: Path | bytes) -> Self:
        """Parse canonical rows; ConfigError names the first line that is none."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        rows = tuple(_parse_lines(data, "the canonical rows"))
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(PROMPT), str) or row.keys() != rows[0].keys():
                raise ConfigError(
                    f"Line {number} of the canonical rows has no prompt, or other columns than the first.",
                    "Let the coordinator write them again.",
                )
        return cls(rows)


def canonical_rows(dataset: DatasetSection, held_out: Rows | None = None) -> bytes:
    """The dataset as JSON lines {"answer": ..., "prompt": ...}: keys sorted, no spaces, UTF-8, one "\\n" a row.

    `held_out` names other rows with the same columns, as [evaluation] does. ConfigError if there are none, a column is
    missing or a prompt is not a string; UnreachableError if the hub does not answer.
    """
    source = held_out or dataset
    lines = []
    for number, row in enumerate(_read(source, default_split="test" if held_out else "train"), 1):
        for column in (dataset.prompt_column, dataset.answer_column):
            if column not in row:
                raise ConfigError(
                    f'{_title(source)} has no column "{column}"; it has {", ".join(sorted(row))}.',
                    "Set prompt_column and answer_column in [dataset].",
                )
        prompt, answer = row[dataset.prompt_column], row[dataset.answer_column]
        if not isinstance(prompt, str):
            raise ConfigError(
                f'Row {number} of {_title(source)} has a prompt of type {type(prompt).__name__} in "'
                f'{dataset.prompt_column}".',
                "Prompts are strings.",
            )
        lines.append(_canonical({ANSWER: answer, PROMPT: prompt}, number, source))
    if not lines:
        raise ConfigError(f"{_title(source)} has no rows.", "Check path or split.")
    return b"".join(lines)


def _canonical(row: dict[str, Any], number: int, source: Rows) -> bytes:
    try:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return f"{line}\n".encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Row {number} of {_title(source)} has a value that JSON and UTF-8 cannot hold: {error}.",
            "Answers are strings, numbers, or lists of them.",
        ) from None


def _title(source: Rows) -> str:
    return f"the file {source.path}" if source.path is not None else f"the dataset {source.name}"


def _read(source: Rows, default_split: str) -> Iterable[dict[str, Any]]:
    if source.path is None:
        return _read_hub(source, default_split)
    try:
        if source.path.suffix == ".jsonl":
            return _parse_lines(source.path.read_bytes(), str(source.path))
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # it ships no types

        try:
            rows: list[dict[str, Any]] = parquet.read_table(source.path).to_pylist()
        except ArrowException as error:
            raise ConfigError(f"{_title(source)} is not Parquet: {error}.", "Check path in run.toml.") from None
        return rows
    except OSError as error:
        raise ConfigError(f"{_title(source)} cannot be read: {error}.", "Check path in run.toml.") from None


def _read_hub(source: Rows, default_split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    name, split = str(source.name), source.split or default_split
    try:
        return list(load_dataset(name, source.config, split=split, revision=source.revision))
    except ConnectionError as error:
        raise UnreachableError(f"The hub does not answer for the dataset {name}: {error}.", "Or give path.") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"The dataset {name} (split {split}) cannot be loaded: {reason}", "Check name, config, split and revision."
        ) from None


def _parse_lines(data: bytes, title: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Line {number} of {title} is not JSON: {error}.", "One JSON object a line.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"Line {number} of {title} is not a JSON object.", "One JSON object a line.")
        yield row
