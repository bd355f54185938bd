"""Snapshots of the coordinator's state: whole, strict, and read by nothing but the software that has the same state."""

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machine import Machine, canonical

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.plain import fields_form, form_of
from hivegrpo.coordinator.snapshots import Snapshot, read_snapshot, take_snapshot
from hivegrpo.coordinator.state import State
from hivegrpo.protocol import hivegrpo_pb2 as pb

OVERLAP: dict[str, Any] = {"averaging": {"overlap": True}}
ITERATIONS: dict[str, Any] = {"grpo": {"num_iterations": 2, "num_generations": 4, "prompts_per_round": 10}}
AUDITS: dict[str, Any] = {"averaging": {"audit_rate": 1.0}}


def quiet(machine: Machine) -> None:
    machine.start()
    machine.round()
    machine.round()


def troubled(machine: Machine) -> None:
    """An attempt that fails, a ban, a peer that leaves, positions that come back, and a restart."""
    machine.start()
    first, second, third = machine.peers
    machine.contribute(first, second)
    last = machine.lease(third).count - 1
    assert machine.report(third, machine.contribution(third, dropped=[0], returned=[last])).accepted
    machine.senders(first, first, second, third)
    machine.lose(second)
    machine.wait(6.0)
    machine.exchange()
    machine.vote(first, root=b"1" * 32)
    machine.happen(ev.PeerBanned(machine.now, third, "a proof", b"p" * 32, 9))
    machine.happen(ev.CoordinatorStarted(machine.now))
    machine.join(first, second)
    machine.happen(ev.PeerLeft(machine.now, second, "bye"))
    machine.wait(20.0)


def audited(machine: Machine) -> None:
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    machine.vote(*machine.peers)
    attempt = machine.state.round.attempt
    assert attempt is not None
    for drawn in attempt.drawn:
        for peer in drawn.order:
            content = bytes([drawn.span]) * 32
            audit = pb.AuditReport(plan=attempt.digest, seal=attempt.seal_digest, span=drawn.span, content=content)
            assert machine.report(peer, audit).accepted
    assert machine.state.version == 1


@pytest.mark.parametrize(
    ("history", "sections"),
    [(quiet, {}), (troubled, {}), (quiet, OVERLAP), (troubled, OVERLAP), (quiet, ITERATIONS), (audited, AUDITS)],
)
def test_a_snapshot_after_any_event_is_the_state_and_goes_on_as_it_would(
    history: Callable[[Machine], None], sections: dict[str, Any]
) -> None:
    machine = Machine(**sections)
    history(machine)
    state = State(machine.terms)
    for sequence, event in enumerate(machine.events):
        copy = read_snapshot(take_snapshot(state, sequence), machine.terms)
        assert canonical(copy) == canonical(state)
        apply(copy, event)
        apply(state, event)
        assert canonical(copy) == canonical(state)
    assert canonical(machine.replayed(len(machine.events) // 2)) == canonical(machine.state)


def test_a_snapshot_of_another_shape_is_refused() -> None:
    machine = Machine()
    quiet(machine)
    taken = take_snapshot(machine.state, len(machine.events))
    with pytest.raises(ValueError, match="another version of hivegrpo"):
        read_snapshot(replace(taken, shape="0" * 64), machine.terms)


@dataclass
class Before:
    number: int
    names: dict[str, bytes]


class Mood(StrEnum):
    GOOD = "good"


class OtherMood(StrEnum):
    GOOD = "fine"


def shapes(annotations: dict[str, Any]) -> str:
    return fields_form(dataclass(type("Before", (), {"__annotations__": annotations}))).shape


def test_every_change_of_a_type_is_a_change_of_the_shape() -> None:
    """Of a field's name, type, place, of an item's or key's type, of an enum's members, of what a class is called."""
    variants: list[dict[str, Any]] = [
        {"number": int, "names": dict[str, bytes]},
        {"amount": int, "names": dict[str, bytes]},
        {"number": float, "names": dict[str, bytes]},
        {"number": int | None, "names": dict[str, bytes]},
        {"names": dict[str, bytes], "number": int},
        {"number": int, "names": dict[str, str]},
        {"number": int, "names": dict[int, bytes]},
        {"number": int, "names": OrderedDict[str, bytes]},
        {"number": int, "names": dict[str, bytes], "more": int},
        {"number": int, "names": tuple[int, ...]},
        {"number": int, "names": tuple[int, int]},
        {"number": int, "names": list[int]},
        {"number": int, "names": frozenset[int]},
        {"number": int, "names": Mood},
        {"number": int, "names": OtherMood},
        {"number": int, "names": pb.Lease},
        {"number": int, "names": pb.Blob},
        {"number": int, "names": Before},
    ]
    found = [shapes(annotations) for annotations in variants]
    assert found[0] == fields_form(Before).shape
    assert len(set(found)) == len(found)


def test_a_message_is_described_to_the_fields_of_the_messages_in_it() -> None:
    assert "peer=1:9" in form_of(pb.RoundPlan).shape, "a contributor's"


@pytest.mark.parametrize("hint", [object, Any, int | str, bytearray, complex])
def test_a_type_without_a_form_is_our_own_mistake(hint: Any) -> None:
    with pytest.raises(TypeError, match="no form"):
        form_of(hint)


@pytest.mark.parametrize(
    ("hint", "plain"),
    [
        (int, True),
        (int, 1.0),
        (bool, 1),
        (float, 1),
        (str, None),
        (bytes, "not base64!"),
        (bytes, 3),
        (range, [1]),
        (tuple[int, ...], "12"),
        (tuple[int, int], [1]),
        (dict[str, int], [["a", 1], ["a", 2]]),
        (dict[str, int], {"a": 1}),
        (dict[str, int], [["a"]]),
        (Mood, "bad"),
        (pb.Lease, "AAAA"),
        (Before, [1]),
        (dict[str, None], [["a", 0]]),
    ],
)
def test_what_was_never_written_is_not_read(hint: Any, plain: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - by kind of damage, in words of Python's own
        form_of(hint).from_plain(plain)


@given(seed=st.integers(min_value=0, max_value=2**32))
@settings(max_examples=150, deadline=None)
def test_a_damaged_body_is_a_value_error_or_a_state(seed: int) -> None:
    """Whatever the damage: nothing else is raised, and nothing else comes out."""
    chance = random.Random(seed)
    plain = json.loads(BODY.body)
    at: Any = plain
    while isinstance(at[index := chance.randrange(len(at))], list) and at[index] and chance.random() < 0.8:
        at = at[index]
    at[index] = chance.choice([None, True, -1, 0.5, "", "AAAA", [], [[]], {}, [1, 2, 3]])
    damaged = replace(BODY, body=json.dumps(plain).encode())
    try:
        state = read_snapshot(damaged, MACHINE.terms)
    except ValueError:
        return
    assert isinstance(take_snapshot(state, 1), Snapshot)


MACHINE = Machine()
troubled(MACHINE)
BODY = take_snapshot(MACHINE.state, 1)
