"""A RunConfig as a run.toml, for the commands that take nothing else."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.files import write_whole


def write_run_toml(path: Path, config: RunConfig) -> None:
    """Write a file from which `RunConfig.load` reads an equal config."""
    lines: list[str] = []
    for name in type(config).model_fields:
        section = getattr(config, name)
        if section is not None:
            lines += [f"[{name}]", *_lines(section), ""]
    write_whole(path, "\n".join(lines).encode())
    assert RunConfig.load(path) == config


def _lines(section: BaseModel) -> list[str]:
    values, lines = section.model_dump(mode="json"), []
    for key, value in values.items():
        if value is None:
            # TOML has no null. Where leaving the key out would mean something else, 0 stands for "none".
            value = 0 if type(section).model_fields[key].default is not None else None
        if value is not None:
            lines.append(f"{key} = {_value(value)}")
    return lines


def _value(value: Any) -> str:
    """JSON's numbers, strings, booleans and lists are TOML's; tables are not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
