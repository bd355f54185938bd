"""The coordinator's state as bytes, so that a start need not replay a run's whole log.

A snapshot is a shortcut and never the truth: that is the log. Whatever cannot be read as exactly this software's
`State` is passed over, and the log is replayed.
"""

import json
from dataclasses import dataclass
from hashlib import sha256

from hivegrpo.coordinator.plain import fields_form
from hivegrpo.coordinator.state import State, Terms

FORMAT = 2
"""Of the encoding, and of what the values mean: to be raised if `apply` comes to another state by the same events."""

_FORM = fields_form(State, without=frozenset({"terms"}))

SHAPE = sha256(f"{FORMAT} {_FORM.shape}".encode()).hexdigest()
"""Names format and types: equal only between versions of the software that have the same `State`, to every field."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the events up to one of them come to."""

    sequence: int
    """Of the last event that is in it; events are counted from 1."""
    shape: str
    body: bytes


def take_snapshot(state: State, sequence: int) -> Snapshot:
    """Encode what the first `sequence` events have led to, without the terms, which the run manifest has."""
    return Snapshot(sequence, SHAPE, json.dumps(_FORM.to_plain(state), separators=(",", ":")).encode())


def read_snapshot(snapshot: Snapshot, terms: Terms) -> State:
    """The state; ValueError if it is of another shape, or damaged."""
    if snapshot.shape != SHAPE:
        raise ValueError("it was written by another version of hivegrpo")
    return State(terms, **_FORM.from_plain(json.loads(snapshot.body)))
