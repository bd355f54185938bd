"""Values: dataclasses that nobody changes, and that are cheap to make."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(kind: type[T]) -> type[T]:
    """A dataclass with slots, equality and a hash, whose fields type checkers let nobody assign.

    Nothing at run time stops who does it all the same, and then the hash is wrong: to be frozen there, too, it would
    have to set each field by `object.__setattr__`, and to make one would take several times as long.
    """
    return dataclass(slots=True, unsafe_hash=True)(kind)
