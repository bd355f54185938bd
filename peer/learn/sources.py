"""Where rows come from: local files, datasets on the hub, and generators."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hivegrpo.protocol.config import Rows
from hivegrpo.protocol.errors import ConfigError, UnreachableError

MAX_BYTES = 1 << 30
"""Of a file of rows."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""owner/name. Names without an owner mean file formats to `datasets`, which it would look for in this folder."""

Row = dict[str, Any]


def title_of(source: Rows) -> str:
    """How messages speak of it."""
    return f"the file {source.path}" if source.path is not None else f"the dataset {source.name}"


def read_source(source: Rows, default_split: str, columns: frozenset[str] | None) -> Iterable[Row]:
    """Its rows. Columns not in `columns`, if that is given, may be left out where this saves reading them.

    ConfigError if they cannot be read; UnreachableError if the hub does not answer.
    """
    if source.task is not None:
        from hivegrpo.peer.rewards.reasoning import generate_rows

        assert source.size is not None
        assert source.seed is not None
        return generate_rows(source.task, source.size, source.seed)
    if source.path is None:
        return _read_hub(source, default_split, columns)
    try:
        size = source.path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{title_of(source)} has {size} bytes.", f"Give a part of it: at most {MAX_BYTES}.")
        if source.path.suffix == ".parquet":
            return _read_parquet(source)
        data = source.path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{title_of(source)} cannot be read: {error}.", "Check that this is the file, and whole."
        ) from None
    return read_lines(data, str(source.path)) if source.path.suffix == ".jsonl" else _read_csv(data, str(source.path))


def read_lines(data: bytes, title: str) -> Iterator[Row]:
    """The JSON objects of a .jsonl file; ConfigError names the line that is none."""
    for number, line in enumerate(io.BytesIO(data), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"Line {number} of {title} is not JSON: {error}.", "One JSON object a line.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"Line {number} of {title} is not a JSON object.", "One JSON object a line.")
        yield row


def _read_csv(data: bytes, title: str) -> Iterator[Row]:
    """RFC 4180 with a header, in UTF-8; every value is a string, of at most `csv.field_size_limit()` characters."""
    try:
        text = data.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{title} is not UTF-8: {error}.", "Save it as CSV UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not header or not all(header) or len(set(header)) < len(header):
            raise ConfigError(
                f"The first line of {title} does not name each column once: {', '.join(header) or 'it is empty'}.",
                "Write a header: the names of the columns.",
            )
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ConfigError(
                    f"Line {reader.line_num} of {title} ends a row of {len(fields)} fields; the header has "
                    f"{len(header)}.",
                    "Put fields that contain commas, quotes or line breaks in quotes.",
                )
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ConfigError(
            f"Line {reader.line_num} of {title} is not CSV: {error}.",
            'Is a quote before it not closed? A quote inside a quoted field is written twice: "".',
        ) from None


def _read_parquet(source: Rows) -> list[Row]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # it ships no types

    try:
        rows: list[Row] = parquet.read_table(source.path).to_pylist()
    except ArrowException as error:
        raise ConfigError(
            f"{title_of(source)} is not Parquet: {error}.", "Check that this is the file, and whole."
        ) from None
    return rows


def _require_own_files(name: str, source: Rows) -> None:
    """ConfigError if a hub dataset's card names files outside it: local paths, which would be read here, and URLs."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name, source.config, revision=source.revision)
    files = [file for files in (builder.config.data_files or {}).values() for file in files]
    if not all(str(file).startswith(f"hf://datasets/{name}@") for file in files):
        raise ConfigError(
            f"The dataset {name} names files outside its own repository, which are never read.",
            "Choose another, or get its rows into a file and give path.",
        )


def _read_hub(source: Rows, default_split: str, columns: frozenset[str] | None) -> Iterable[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split = str(source.name), source.split or default_split
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f'"{name}" is not the name of a dataset on the hub.', 'Write "owner/name", or give path.')
    if Path(name).exists():
        raise ConfigError(
            f"{name} is also a folder here, which would be read in place of the dataset on the hub.",
            "Start from another folder, or give path.",
        )
    try:
        _require_own_files(name, source)
        data = load_dataset(name, source.config, split=split, revision=source.revision)
        if columns is not None and columns <= set(data.column_names):
            data = data.select_columns(sorted(columns))  # images and sound take long to decode, and a decoder
        return list(data)
    except ConnectionError as error:
        raise UnreachableError(f"The hub does not answer for the dataset {name}: {error}.", "Or give path.") from None
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"The dataset {name} (split {split}) cannot be loaded: {reason.rstrip('.')}.",
            "Check name, config, split and revision; name in [dataset] columns those that the rewards need.",
        ) from None
