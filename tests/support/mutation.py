"""Messages that are almost valid: some fields of a valid one changed, repeated, dropped or made extreme."""

import os
from random import Random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

EXAMPLES = int(os.environ.get("HIVEGRPO_FUZZ_EXAMPLES", "40"))
"""Of each fuzz test; `make fuzz` asks for many more."""

_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e30, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "x", "\0", "é" * 30, "12D3KooW", "a" * 300, "../../etc/passwd", "/ip4/1.2.3.4/tcp/1/p2p/x", "\ud7ff" * 52)


def mutated(message: M, random: Random) -> M:
    """A copy with one to four changes, at any depth."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(random.randint(1, 4)):
        _change(copy, random)
    return copy


def damaged(data: bytes, random: Random) -> bytes:
    """Bytes with a few of them flipped, dropped, doubled or added."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(result))
        match random.randrange(5):
            case 0 if at < len(result):
                result[at] ^= 1 << random.randrange(8)
            case 1:
                del result[at : at + random.randint(1, 9)]
            case 2:
                result[at:at] = result[at : at + random.randint(1, 9)]
            case 3:
                result[at:at] = random.randbytes(random.randint(1, 9))
            case _:
                del result[at:]
    return bytes(result)


def _change(message: Message, random: Random) -> None:
    field = random.choice(message.DESCRIPTOR.fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(getattr(message, field.name), field, random)
    elif field.is_repeated:
        _change_list(getattr(message, field.name), field, random)
    elif random.random() < 0.15:
        message.ClearField(field.name)
    elif field.message_type is not None:
        _change(getattr(message, field.name), random)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), random))


def _change_list(items: Any, field: FieldDescriptor, random: Random) -> None:
    at = random.randrange(len(items)) if len(items) else 0
    match random.randrange(5):
        case 0 if len(items):
            del items[at]
        case 1 if len(items):
            items.extend([items[at]])
        case 2 if len(items) > 1:
            kept = list(items)
            random.shuffle(kept)
            del items[:]
            items.extend(kept)
        case 3 if len(items):
            if field.message_type is not None:
                _change(items[at], random)
            else:
                items[at] = _value(field, items[at], random)
        case _:
            if field.message_type is not None:
                _change(items.add(), random)
            else:
                items.extend([_value(field, None, random)] * random.choice([1, 2, 70]))


def _change_map(entries: Any, field: FieldDescriptor, random: Random) -> None:
    value = field.message_type.fields_by_name["value"]
    for _ in range(random.choice([1, 1, 1, 70])):
        name = random.choice([*entries, *_TEXTS, f"name {random.randrange(1000)}"])
        entries[name] = _value(value, None, random)


def _value(field: FieldDescriptor, present: Any, random: Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        data = present or bytes(32)
        odd = [b"", bytes(32), data[:-1], data + b"\0", random.randbytes(32), bytes(5000), damaged(data, random)]
        return random.choice(odd)
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return random.choice([*_TEXTS, (present or "")[:-1], (present or "") + "x"])
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return random.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_UINT32:
            return random.choice(
                [0, 1, 2, 3, 64, 1 << 18, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, random.getrandbits(32)]
            )
        case FieldDescriptor.CPPTYPE_UINT64:
            return random.choice([0, 1, 2, 3, 1 << 34, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, random.getrandbits(64)])
    raise AssertionError(f"no value for {field.full_name}")
