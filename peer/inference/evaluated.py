"""A measurement that somebody made of an export, from the JSON that `hivegrpo evaluate` writes, as tables of a card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hivegrpo.protocol.errors import ConfigError

MAX_BYTES = 1 << 22
MOST_LINES = 50
"""Of one table: a card is read by people."""

Row = dict[str, str | int | float | bool]


def read_evaluation(path: Path) -> list[list[Row]]:
    """Tables of what is in a file: its plain values, by name, and each list of objects, without what is nested in them.

    ConfigError if it cannot be read, or is no JSON object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes.", "Give the summary that `evaluate` writes.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give what `hivegrpo evaluate` wrote.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object.", "Give what `hivegrpo evaluate` wrote.")
    values: list[Row] = [{"what": name, "value": value} for name, value in _plain(content)]
    tables = [values, *(_rows(part) for part in _parts(content) if isinstance(part, list))]
    return [table[:MOST_LINES] for table in tables if table]


def _plain(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Numbers, texts and truth values in nested objects, by the path to them."""
    for name, value in content.items():
        if isinstance(value, str | int | float):
            yield prefix + name, value
        elif isinstance(value, dict):
            yield from _plain(value, f"{prefix}{name}/")


def _parts(content: Mapping[str, Any]) -> Iterator[Any]:
    for value in content.values():
        yield value
        if isinstance(value, dict):
            yield from _parts(value)


def _rows(objects: Sequence[Any]) -> list[Row]:
    plain = [dict(_plain(one)) for one in objects[:MOST_LINES] if isinstance(one, dict)]
    return [row for row in plain if row]
