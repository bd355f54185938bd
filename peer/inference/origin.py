"""A model's folder, seen from outside: whether a source is one, where its weights come from, which version it holds."""

from pathlib import Path
from typing import Any

from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import read_object
from hivegrpo.protocol.text import visible_line

ORIGIN_FILE = "hivegrpo.json"
"""In an exported folder: where the weights come from, and the settings that they were trained under."""
MODEL_FILE = "config.json"
MOST_CHARACTERS = 64
"""Of a run's name, and of what is said to be its version."""


def is_exported(source: str | None) -> bool:
    """Whether a source is a model's folder, as `export` writes it or from elsewhere, rather than a run."""
    return source is not None and (Path(source).expanduser() / MODEL_FILE).is_file()


def read_origin(folder: Path) -> dict[str, Any]:
    """The content of an exported folder's `hivegrpo.json`; empty if it has none. ConfigError if it is damaged.

    The folder may come from strangers: "run" and "version", which are shown, are one short line each.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return {}
    origin = read_object(path, "Export the model again.")
    for name, kinds in (("run", (str,)), ("version", (str, int))):
        if name in origin and (type(origin[name]) not in kinds or not 0 < len(str(origin[name])) <= MOST_CHARACTERS):
            raise ConfigError(f"{path} has no usable {name}.", "Export the model again.")
    shown = {name: visible_line(origin[name]) for name in ("run", "version") if isinstance(origin.get(name), str)}
    return origin | shown


def held_version(folder: Path, origin: dict[str, Any], revision: str) -> str:
    """The version in a folder, "latest" if it does not say; ConfigError if another one is asked for."""
    held = str(origin.get("version", "latest"))
    if revision not in ("latest", held):
        raise ConfigError(
            f"The folder {folder} holds one version: {held}.", "Leave out --revision, or name a run in place of it."
        )
    return held
