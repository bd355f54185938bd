"""Typed values as plain JSON data, and back: by their type hints, strictly, and without running what is read.

A form is made of a type once. What is written has no names in it, so it may only be read by a form of the same `shape`:
a text that has every field and every type that was looked at, and differs where any of them does.
"""

from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, Message


@dataclass(frozen=True, slots=True)
class Form:
    """How the values of one type are written."""

    shape: str
    to_plain: Callable[[Any], Any]
    from_plain: Callable[[Any], Any]
    """ValueError for what `to_plain` never returns."""


@cache
def form_of(hint: Any) -> Form:
    """The form of a type: scalars, bytes, enums of strings, protobuf messages, ranges, dataclasses, and of these
    optionals, tuples, lists, sets and dicts, which keep their order. TypeError for any other.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if origin in (Union, UnionType):
        return _optional(arguments)
    if origin in (dict, OrderedDict):
        return _mapping(origin, *map(form_of, arguments))
    if origin is tuple:
        return _sequence(tuple, arguments[0]) if arguments[-1] is ... else _record("tuple", tuple, arguments, list)
    if origin is list:
        return _sequence(list, arguments[0])
    if origin in (set, frozenset):
        return _set(origin, form_of(arguments[0]))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        members = ",".join(f"{member.name}={member.value}" for member in hint)
        return Form(f"{hint.__name__}[{members}]", lambda value: value.value, hint)
    if isinstance(hint, type) and issubclass(hint, Message):
        return _message(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        inner = fields_form(hint)
        return Form(inner.shape, inner.to_plain, lambda value: hint(**inner.from_plain(value)))
    raise TypeError(f"no form for {hint!r}")


def fields_form(kind: type, without: frozenset[str] = frozenset()) -> Form:
    """The form of a dataclass's fields, but for those `without`: `from_plain` gives them by name, to make one of."""
    hints = get_type_hints(kind)
    names = tuple(field.name for field in fields(kind) if field.name not in without)
    return _record(
        f"{kind.__name__}:{','.join(names)}",
        lambda values: dict(zip(names, values, strict=True)),
        tuple(hints[name] for name in names),
        lambda value: [getattr(value, name) for name in names],
    )


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{type(value).__name__} where {kind.__name__} was due")
        return value

    return check


_list, _text, _number, _none = _exactly(list), _exactly(str), _exactly(int), _exactly(NoneType)


def _bytes(value: Any) -> bytes:
    return b64decode(_text(value), validate=True)


def _range(value: Any) -> range:
    start, stop = map(_number, _list(value))
    return range(start, stop)


_SCALARS: dict[Any, Form] = {
    int: Form("int", _number, _number),
    bool: Form("bool", _exactly(bool), _exactly(bool)),
    str: Form("str", _text, _text),
    float: Form("float", float, _exactly(float)),
    bytes: Form("bytes", lambda value: b64encode(value).decode(), _bytes),
    None: Form("none", _none, _none),
    range: Form("range", lambda value: [value.start, value.stop], _range),
}


def _optional(arguments: tuple[Any, ...]) -> Form:
    kinds = [kind for kind in arguments if kind is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"no form for a choice of {arguments!r}")
    inner = form_of(kinds[0])
    return Form(
        f"{inner.shape}?",
        lambda value: None if value is None else inner.to_plain(value),
        lambda value: None if value is None else inner.from_plain(value),
    )


def _message(kind: type[Message]) -> Form:
    def read(value: Any) -> Message:
        message = kind()
        try:
            message.ParseFromString(_bytes(value))
        except DecodeError as error:
            raise ValueError(f"not a {kind.DESCRIPTOR.name}: {error}") from None
        return message

    return Form(
        _describe(kind.DESCRIPTOR),
        lambda value: b64encode(value.SerializeToString(deterministic=True)).decode(),
        read,
    )


def _describe(message: Any) -> str:
    """A message's fields, to those of the messages in it: of the same name, it may mean something else one day."""
    described = []
    for field in message.fields:
        kind = _describe(field.message_type) if field.message_type else str(field.type)
        described.append(f"{field.name}={field.number}:{kind}{'*' if field.is_repeated else ''}")
    return f"{message.name}{{{','.join(described)}}}"


def _record(
    name: str, make: Callable[[list[Any]], Any], hints: tuple[Any, ...], values_of: Callable[[Any], list[Any]]
) -> Form:
    """Values of different types, in a fixed order: `values_of` takes them apart, `make` puts them together."""
    forms = [form_of(hint) for hint in hints]
    writers, readers = [form.to_plain for form in forms], [form.from_plain for form in forms]
    return Form(
        f"{name}({','.join(form.shape for form in forms)})",
        lambda value: [write(part) for write, part in zip(writers, values_of(value), strict=True)],
        lambda value: make([read(part) for read, part in zip(readers, _list(value), strict=True)]),
    )


def _sequence(kind: type, item: Any) -> Form:
    inner = form_of(item)
    write, read = inner.to_plain, inner.from_plain
    return Form(
        f"{kind.__name__}[{inner.shape}]",
        lambda value: [write(part) for part in value],
        lambda value: kind([read(part) for part in _list(value)]),
    )


def _set(kind: type, inner: Form) -> Form:
    write, read = inner.to_plain, inner.from_plain
    return Form(
        f"{kind.__name__}[{inner.shape}]",
        lambda value: sorted(write(part) for part in value),
        lambda value: kind([read(part) for part in _list(value)]),
    )


def _mapping(kind: type, key: Form, item: Form) -> Form:
    def read(value: Any) -> Any:
        pairs = [(key.from_plain(name), item.from_plain(part)) for name, part in map(_list, _list(value))]
        found = kind(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key that is there twice")
        return found

    return Form(
        f"{kind.__name__}[{key.shape},{item.shape}]",
        lambda value: [[key.to_plain(name), item.to_plain(part)] for name, part in value.items()],
        read,
    )
