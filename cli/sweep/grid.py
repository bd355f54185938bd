"""What a sweep varies: config keys with their values, and the points that these span."""

import difflib
import itertools
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ConfigError

Settings = dict[str, Any]
"""Values by key, as "grpo.beta": what makes one point differ from the others."""
Tables = dict[str, Any]
"""The tables of a run.toml."""

PATH = ".path"
"""Ends the keys whose values name files."""


@dataclass(frozen=True)
class Axis:
    """One key and its values, in the order given, each once."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def of(cls, key: str, values: Sequence[Any], folder: Path) -> "Axis":
        """Relative paths are from `folder`. ConfigError for a key that is none, or no values."""
        _require_key(key)
        if not values:
            raise ConfigError(f"{key} has no values to try.", f"Name some: --grid {key}=A,B.")
        if key.endswith(PATH):
            values = [str((folder / Path(str(value)).expanduser()).resolve()) for value in values]
        once: dict[Any, Any] = {}
        for value in values:
            once.setdefault(_identity(value), value)
        return cls(key, tuple(once.values()))

    @classmethod
    def parse(cls, text: str) -> "Axis":
        """What --grid says: KEY=VALUE,VALUE with values as in TOML; strings need no quotes."""
        key, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--grid {text} names no values.", "Write KEY=VALUE,VALUE: --grid grpo.beta=0,0.04.")
        return cls.of(key.strip(), _parse_values(values), Path.cwd())


def span(axes: Sequence[Axis]) -> list[Settings]:
    """Every combination of the axes' values; the last axis varies fastest. ConfigError if a key comes twice."""
    keys = [axis.key for axis in axes]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} is in the grid twice.", "Write all of its values behind one --grid.")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def with_settings(tables: Tables, settings: Settings) -> Tables:
    """A copy of run.toml's tables with these values in place of theirs."""
    changed: Tables = json.loads(json.dumps(tables))
    for key, value in settings.items():
        table, parts = changed, key.split(".")
        for part in parts[:-1]:
            table = table.setdefault(part, {})
        table[parts[-1]] = value
    return changed


def describe(settings: Settings) -> str:
    """Settings in a line: "grpo.beta=0.04, grpo.temperature=0.7"."""
    return ", ".join(f"{key}={text_of(value)}" for key, value in settings.items()) or "as configured"


def text_of(value: Any) -> str:
    """A value as one types it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _identity(value: Any) -> Any:
    """Equal for values that mean the same: 0 and 0.0, but not 0 and false."""
    return (isinstance(value, bool), value) if isinstance(value, bool | int | float) else json.dumps(value)


def _parse_values(text: str) -> list[Any]:
    try:
        values: list[Any] = tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        return [_parse_value(item.strip()) for item in text.split(",") if item.strip()]
    return values


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _require_key(key: str) -> None:
    """ConfigError unless the key has a section; that it exists is seen when the points are validated."""
    section, dot, name = key.partition(".")
    if dot and section and name:
        return
    known = [f"{section}.{field}" for section, model in _sections().items() for field in model.model_fields]
    close = [full for full in known if full.partition(".")[2] == key] or difflib.get_close_matches(key, known, n=1)
    remedy = f'Did you mean "{close[0]}"?' if close else "Keys are those of run.toml with their section: grpo.beta."
    raise ConfigError(f'The grid\'s key "{key}" names no section.', remedy)


def _sections() -> dict[str, type[BaseModel]]:
    """The tables of run.toml, by name; an optional one is a union with None."""
    return {
        name: kind
        for name, field in RunConfig.model_fields.items()
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }
