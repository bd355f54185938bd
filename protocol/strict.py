"""TOML files and pydantic's complaints, turned into a ConfigError that says what to write instead."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hivegrpo.protocol.errors import ConfigError

MAX_COMPLAINTS = 5


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError if it cannot be read or parsed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file {path} cannot be read: {error}.", "Check the path, and that it is text.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.", "Strings need quotes; see https://toml.io.") from None


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """What is wrong with `source`, key by key, with the closest known name for each unknown one."""
    # A default that is made from a wrong setting cannot be made: only the cause is worth telling.
    causes = [item for item in error.errors() if item["type"] != "default_factory_not_called"]
    unknown_first = sorted(causes or error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    complaints = [_complaint(model, item["loc"], item["type"], item["msg"]) for item in unknown_first]
    shown = "; ".join(complaints[:MAX_COMPLAINTS])
    more = f"; and {len(complaints) - MAX_COMPLAINTS} more" if len(complaints) > MAX_COMPLAINTS else ""
    return ConfigError(f"{source}: {shown}{more}.", "Correct it and try again.")


def _complaint(model: type[BaseModel], location: Sequence[str | int], kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return _unknown(model, location)
    path = [str(part) for part in location]
    if path and _has_sections(model):
        path[0] = f"[{path[0]}]"
    place = " ".join((*path[:1], ".".join(path[1:]))).strip()
    return f"{place or 'together'}: {message.removeprefix('Value error, ')}"


def _unknown(model: type[BaseModel], location: Sequence[str | int]) -> str:
    names = _names(model, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    remedy = f'did you mean "{close[0]}"?' if close else f"known are {', '.join(names)}"
    where = f"[{location[0]}] has" if len(location) > 1 else "there is"
    thing = "section" if len(location) == 1 and _has_sections(model) else "key"
    return f'{where} no {thing} "{location[-1]}" ({remedy})'


def _names(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Field names of the (possibly optional) section that `location` leads to."""
    for part in location:
        if isinstance(part, int):
            continue  # a table among several
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)


def _has_sections(model: type[BaseModel]) -> bool:
    """Whether the model's fields are themselves models, as in run.toml."""
    first = next(iter(model.model_fields.values())).annotation
    return isinstance(first, type) and issubclass(first, BaseModel)
