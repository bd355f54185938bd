"""Byzantine peers in a real swarm, several at once; `make bench-attacks` runs each fault by itself, at full size."""

import inspect
from pathlib import Path

import pytest
from support.byzantine import Fault
from support.wire_attacks import CONTROL_SECONDS, DEFENCES, MEMORY_BOUND, attack, defence_off

HONEST = 3

AT_THE_COORDINATOR = (
    Fault.HEAVY_WEIGHT,
    Fault.NEGATIVE_WEIGHT,
    Fault.ZERO_WEIGHT,
    Fault.NAN_METRIC,
    Fault.OTHER_TYPE,
    Fault.OTHER_RUN,
)
AT_THE_REDUCERS = (
    Fault.WRONG_CHUNK,
    Fault.REPEATED_CHUNK,
    Fault.FEW_CHUNKS,
    Fault.ENDLESS_STREAM,
    Fault.ONE_BYTE_A_SECOND,
)
IN_FP32 = (Fault.NAN_VALUE, Fault.INFINITE_VALUE, Fault.SHORT_CHUNK, Fault.LONG_CHUNK)
AGAIN = (Fault.REPLAYED_CONTRIBUTION, Fault.REPLAYED_PUSH, Fault.REPLAYED_REPORT, Fault.BANDWIDTH_LIE)
BESIDE_THE_ROUND = (Fault.FORGED_PLANS, Fault.GARBAGE)


def test_every_fault_is_tried() -> None:
    assert {*AT_THE_COORDINATOR, *AT_THE_REDUCERS, *IN_FP32, *AGAIN, *BESIDE_THE_ROUND} == {*Fault}


@pytest.mark.parametrize(
    "faults",
    [AT_THE_COORDINATOR, AT_THE_REDUCERS, IN_FP32, pytest.param(AGAIN, marks=pytest.mark.slow), BESIDE_THE_ROUND],
    ids=["coordinator", "reducers", "fp32", "again", "beside"],
)
def test_the_version_is_the_rule_over_the_honest_and_the_culprits_are_named(
    tmp_path: Path, faults: tuple[Fault, ...]
) -> None:
    seen = attack(tmp_path, HONEST + len(faults), faults)
    assert seen.wrong == []
    assert seen.versions >= 1
    assert all(seen.named.values()), seen.named
    assert seen.memory < MEMORY_BOUND


@pytest.mark.parametrize("fault", DEFENCES)
def test_what_stands_in_for_a_defence_takes_what_it_is_given(fault: Fault) -> None:
    for target, name, replacement in DEFENCES[fault]:
        real, control = (inspect.signature(each).parameters for each in (getattr(target, name), replacement))
        given = [
            each for each in real if each not in control or control[each].kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        inspect.signature(replacement).bind(*given)


@pytest.mark.parametrize("fault", [Fault.HEAVY_WEIGHT, Fault.NAN_METRIC, Fault.WRONG_CHUNK, Fault.OTHER_RUN])
def test_without_the_defence_the_run_is_ruined(tmp_path: Path, fault: Fault) -> None:
    defence = defence_off(fault)
    assert defence is not None
    with defence:
        wrong = attack(tmp_path, 4, [fault], seconds=CONTROL_SECONDS).wrong
    assert any("the attacker's contribution" in each for each in wrong), wrong
