from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import Message

from hivegrpo.protocol import checks
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.scalars import StepScalars, fp32_bits

ROOT = bytes(32)
SCALARS = StepScalars.for_step(1, learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0).to_bits()
INFINITE = float("inf")

LEASE = pb.Lease(id=1, peer="a", version=1, count=3, wanted=2, max_weight=16, seconds=60.0)
CONTRIBUTION = pb.Contribution(lease=1, version=1, used=[0], dropped=[1], returned=[2], weight=8, root=ROOT)
RENEWED = pb.Lease(id=1, peer="a", version=2, count=3, wanted=2, max_weight=16, seconds=60.0, iteration=1)
ROLLOUT = [2, 0]
AGAIN = pb.Contribution(lease=1, version=2, iteration=1, used=ROLLOUT, weight=16, root=ROOT)
LOST = pb.Contribution(lease=1, version=2, iteration=1, root=ROOT)
PLAN = pb.RoundPlan(
    version=2,
    parent=ROOT,
    attempt=1,
    values=2 * CHUNK_VALUES + 1,
    contributors=[pb.Contributor(peer=peer, weight=1, root=ROOT) for peer in "abc"],
    reducers=[pb.Reducer(peer="a", first=0, chunks=2), pb.Reducer(peer="c", first=2, chunks=1)],
    scalars=SCALARS,
    exchange_seconds=1.0,
    step_seconds=1.0,
    audit_seconds=1.0,
)
CROWD = [pb.Contributor(peer=f"{index:05}", weight=1, root=ROOT) for index in range(checks.MAX_ROSTER)]
SENDERS = pb.SenderReport(plan=ROOT, complete=[pb.Complete(peer=peer, norm_squared=b"\x01") for peer in "ab"])
SEAL = pb.Seal(plan=ROOT, contributors=[pb.Sealed(peer=peer, coefficient=fp32_bits(0.5)) for peer in "ac"])
STEP = pb.StepReport(
    version=2,
    plan=ROOT,
    seal=ROOT,
    spans=[pb.Blob(root=ROOT)] * 2,
    state_root=ROOT,
    receipts=[bytes(64)] * 2,
    seconds=[0.0, 0.5],
    dots=[1.0, -2.0, 3.0],
)
MANIFEST = pb.VersionManifest(
    version=2, parent=ROOT, plan=ROOT, seal=ROOT, spans=[pb.Blob(root=ROOT)], state=pb.Blob(root=ROOT)
)
GENESIS = pb.VersionManifest(version=0, parent=ROOT, state=pb.Blob(root=ROOT))

CHECKS: list[tuple[Message, Callable[[Any], None]]] = [
    (LEASE, checks.check_lease),
    (CONTRIBUTION, lambda message: checks.check_contribution(message, LEASE)),
    (AGAIN, lambda message: checks.check_contribution(message, RENEWED, ROLLOUT)),
    (LOST, lambda message: checks.check_contribution(message, RENEWED, ROLLOUT)),
    (PLAN, checks.check_plan),
    (SENDERS, lambda message: checks.check_sender_report(message, {item.peer for item in PLAN.contributors})),
    (SEAL, lambda message: checks.check_seal(message, PLAN)),
    (STEP, lambda message: checks.check_step_report(message, PLAN)),
    (MANIFEST, checks.check_manifest),
    (GENESIS, checks.check_manifest),
]


@pytest.mark.parametrize(("message", "check"), CHECKS, ids=lambda value: type(value).__name__)
def test_what_makes_sense_passes(message: Message, check: Callable[[Any], None]) -> None:
    check(message)


def _set(**fields: Any) -> Callable[[Any], None]:
    """Assign to fields; a repeated one is replaced."""

    def change(message: Any) -> None:
        for name, value in fields.items():
            message.ClearField(name)
            message.MergeFrom(type(message)(**{name: value}))

    return change


def _metrics(metrics: dict[str, float]) -> Callable[[Any], None]:
    return lambda message: message.metrics.update(metrics)


def _each(field: str, index: int = 0, **values: Any) -> Callable[[Any], None]:
    """Assign to fields of one element."""

    def change(message: Any) -> None:
        element = getattr(message, field)[index]
        for name, value in values.items():
            element.ClearField(name)
            element.MergeFrom(type(element)(**{name: value}))

    return change


BAD_METRICS = [
    _metrics({f"metric {index}": 1.0 for index in range(checks.MAX_METRICS + 1)}),
    _metrics({"m" * (checks.MAX_METRIC_NAME + 1): 1.0}),
    _metrics({"loss": float("nan")}),
    _metrics({"loss": INFINITE}),
]
CHANGES: dict[str, tuple[Message, list[Callable[[Any], None]]]] = {
    "lease": (
        LEASE,
        [
            _set(count=0),
            _set(count=checks.MAX_LEASE_POSITIONS + 1),
            _set(wanted=0),
            _set(wanted=4),
            _set(max_weight=0),
            _set(seconds=0.0),
            _set(seconds=-1.0),
            _set(seconds=INFINITE),
            _set(seconds=float("nan")),
        ],
    ),
    "contribution": (
        CONTRIBUTION,
        [
            _set(root=b"short"),
            _set(returned=[]),
            _set(used=[0, 1]),
            _set(used=[0, 0]),
            _set(used=[3]),
            _set(used=[2], returned=[0]),
            _set(used=[2], dropped=[0], returned=[1]),
            _set(used=[0, 1, 2], dropped=[], returned=[]),
            _set(weight=9),
            _set(weight=0),
            _set(used=[], dropped=[0, 1]),
            _set(iteration=1),
            *BAD_METRICS,
        ],
    ),
    "contribution of a later iteration": (
        AGAIN,
        [
            _set(used=[0, 2]),
            _set(used=[2]),
            _set(used=[2, 1]),
            _set(used=[2], dropped=[0], weight=8),
            _set(used=[], dropped=[2, 0], weight=0),
            _set(used=[], returned=[2, 0], weight=0),
            _set(dropped=[1]),
            _set(returned=[1]),
            _set(weight=17),
            _set(iteration=0),
        ],
    ),
    "contribution without its rollout": (LOST, [_set(weight=1), _set(dropped=[0]), _set(returned=[0, 1, 2])]),
    "plan": (
        PLAN,
        [
            _set(parent=b""),
            _set(version=0),
            _set(attempt=0),
            _set(values=0),
            _set(values=checks.MAX_VALUES + 1),
            _set(values=4 * CHUNK_VALUES),
            _set(values=2 * CHUNK_VALUES),
            _set(contributors=[]),
            _set(contributors=PLAN.contributors[::-1]),
            _set(contributors=[*PLAN.contributors, PLAN.contributors[-1]]),
            _set(contributors=[*CROWD, *PLAN.contributors]),
            _each("contributors", root=b"short"),
            _each("contributors", weight=0),
            _each("contributors", 1, iteration=1),
            _set(reducers=[]),
            _set(
                values=65 * CHUNK_VALUES,
                reducers=[pb.Reducer(peer="a", first=index, chunks=1) for index in range(65)],
            ),
            _each("reducers", first=1),
            _each("reducers", chunks=0),
            _each("reducers", chunks=3),
            _each("reducers", peer="d"),
            _each("reducers", addresses=["/ip4/127.0.0.1/tcp/1"] * (checks.MAX_ADDRESSES + 1)),
            _each("reducers", addresses=["/" * 257]),
            _set(scalars=SCALARS[:-1]),
            _set(scalars=[*SCALARS[:-1], fp32_bits(INFINITE)]),
            _set(exchange_seconds=0.0),
            _set(exchange_seconds=checks.MAX_SECONDS + 1.0),
            _set(step_seconds=float("nan")),
            _set(audit_seconds=0.0),
        ],
    ),
    "sender report": (
        SENDERS,
        [
            _each("complete", peer="b"),
            _each("complete", peer="d"),
            _each("complete", norm_squared=bytes(checks.MAX_NORM_BYTES + 1)),
            _each("complete", seconds=-1.0),
            _each("complete", seconds=float("nan")),
            _set(refused=[pb.Refused(peer="a")]),
            _set(refused=[pb.Refused(peer="d")]),
            _set(refused=[pb.Refused(peer="c")] * 2),
            _set(refused=[pb.Refused(peer="c", reason="x" * (checks.MAX_REFUSED_REASON + 1))]),
        ],
    ),
    "seal": (
        SEAL,
        [
            _set(plan=b""),
            _set(contributors=[]),
            _set(contributors=SEAL.contributors[::-1]),
            _each("contributors", 1, peer="a"),
            _each("contributors", 1, peer="d"),
            _each("contributors", norm_squared=bytes(checks.MAX_NORM_BYTES + 1)),
            _each("contributors", coefficient=fp32_bits(0.25)),
            _each("contributors", coefficient=fp32_bits(INFINITE)),
            _each("contributors", coefficient=0x7FC00000),
        ],
    ),
    "step report": (
        STEP,
        [
            _set(state_root=b""),
            _set(seal=bytes(33)),
            _set(spans=[pb.Blob(root=ROOT)]),
            _set(spans=[pb.Blob(root=ROOT)] * 3),
            _each("spans", 1, root=b""),
            _set(receipts=[bytes(64)]),
            _set(receipts=[bytes(64), bytes(63)]),
            _set(seconds=[1.0]),
            _set(seconds=[1.0, -1.0]),
            _set(dots=[1.0] * 5),
            _set(dots=[INFINITE]),
            *BAD_METRICS,
        ],
    ),
    "manifest": (
        MANIFEST,
        [
            _set(parent=b""),
            lambda manifest: manifest.state.ClearField("root"),
            _set(reference_version=3),
            _set(plan=b""),
            _set(seal=b""),
            _each("spans", root=b""),
            *BAD_METRICS,
        ],
    ),
    "genesis": (GENESIS, [_set(plan=ROOT), _set(seal=ROOT)]),
}


@pytest.mark.parametrize(
    ("message", "change"),
    [(message, change) for message, changes in CHANGES.values() for change in changes],
    ids=[f"{name} {index}" for name, (_, changes) in CHANGES.items() for index in range(len(changes))],
)
def test_what_makes_no_sense_is_refused(message: Message, change: Callable[[Any], None]) -> None:
    check = next(check for original, check in CHECKS if original is message)
    changed = type(message)()
    changed.CopyFrom(message)
    change(changed)
    with pytest.raises(FrameError):
        check(changed)


def test_every_check_has_a_case_that_fails() -> None:
    assert {type(message) for message, _ in CHECKS} == {type(message) for message, _ in CHANGES.values()}
