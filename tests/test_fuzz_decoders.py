"""Whatever is decoded or checked fails with a typed error or not at all; `make fuzz` looks for longer."""

import contextlib
import json
import tracemalloc
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from google.protobuf.message import Message
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.chains import ChainMaker
from support.evidence import Evidence
from support.machine import Machine
from support.mutation import EXAMPLES, damaged, mutated

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.state import State
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.registry import CODECS
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.peer.swarm.faults import judge
from hivegrpo.peer.swarm.reducer import SpanLayout
from hivegrpo.protocol import checks
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.address import EXAMPLE, parse_address
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import open_run, open_signed, parse, sign
from hivegrpo.protocol.errors import ChainError, CommitmentError, ConfigError, FrameError, HiveError, WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.merkle import check_range, leaf_hash, merkle_root, range_proof
from hivegrpo.protocol.scalars import StepScalars

RUN = "ab" * 32
MEMORY_BOUND = 8 << 20
"""Bytes that looking at one small message may take."""

fuzzed = settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.explicit, Phase.generate])
randoms = st.randoms(use_true_random=False)


@contextlib.contextmanager
def only(*errors: type[HiveError]):  # type: ignore[no-untyped-def]
    """Nothing but these errors may come out."""
    with contextlib.suppress(*errors):
        yield


def made(peers: int = 3) -> Machine:
    """A machine that has made a version, and is in the middle of the next one's exchange."""
    machine = Machine(peers)
    machine.start()
    machine.round()
    machine.ready(*machine.peers, version=1, root=bytes([1]) * 32)
    machine.contribute(*machine.peers)
    return machine


MACHINE = made()
PLAN, LEASE = MACHINE.plan, pb.Lease(id=1, peer="x", count=4, wanted=3, max_weight=9, seconds=1.0)
MESSAGES = [kind for name in pb.DESCRIPTOR.message_types_by_name if (kind := getattr(pb, name, None))]


def seal() -> pb.Seal:
    weight = sum(item.weight for item in PLAN.contributors)
    return pb.Seal(
        plan=bytes(32),
        contributors=[
            pb.Sealed(peer=item.peer, coefficient=checks.coefficients(PLAN.rule, [weight], [1])[0], norm_squared=b"\1")
            for item in PLAN.contributors
        ],
    )


def vote() -> pb.StepReport:
    spans = [pb.Blob(root=bytes(32), size=9) for _ in PLAN.reducers]
    return pb.StepReport(
        version=1,
        plan=bytes(32),
        seal=bytes(32),
        spans=spans,
        state_root=bytes(32),
        receipts=[bytes(64)] * len(spans),
        seconds=[1.0] * len(spans),
        metrics={"seconds/exchange": 1.0},
    )


CHECKS: dict[str, tuple[Message, Callable[[Any], None]]] = {
    "lease": (LEASE, checks.check_lease),
    "contribution": (
        pb.Contribution(lease=1, used=[0, 1], dropped=[2], returned=[3], weight=6, root=bytes(32), metrics={"kl": 1.0}),
        lambda message: checks.check_contribution(message, LEASE),
    ),
    "contribution of a later iteration": (
        pb.Contribution(lease=1, used=[0, 1], weight=6, root=bytes(32)),
        lambda message: checks.check_contribution(message, LEASE, [0, 1]),
    ),
    "plan": (PLAN, checks.check_plan),
    "sender report": (
        pb.SenderReport(
            plan=bytes(32),
            complete=[pb.Complete(peer=item.peer, norm_squared=b"\1", seconds=1.0) for item in PLAN.contributors[1:]],
            refused=[pb.Refused(peer=PLAN.contributors[0].peer, reason="late")],
        ),
        lambda message: checks.check_sender_report(message, {item.peer for item in PLAN.contributors}),
    ),
    "seal": (seal(), lambda message: checks.check_seal(message, PLAN)),
    "vote": (vote(), lambda message: checks.check_step_report(message, PLAN)),
    "manifest": (MACHINE.manifest, checks.check_manifest),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@fuzzed
@given(st.integers(1, 200), randoms, st.booleans())
def test_codecs(codec: Codec, values: int, random: Random, whole: bool) -> None:
    """Random bytes, and an encoder's with some changed; what is decoded is finite, and has an exact norm."""
    encoded = codec.encode(
        torch.tensor([random.uniform(-1, 1) * 10.0 ** random.randint(-40, 30) for _ in range(values)])
    )
    size = len(encoded) if whole else random.randint(0, 300)
    for data in (random.randbytes(size), damaged(encoded, random)):
        with only(CommitmentError):
            decoded = codec.decode(data, values)
            assert decoded.shape == (values,)
            assert bool(torch.isfinite(decoded).all())
            assert codec.norm_squared(data, values) >= 0
        with only(CommitmentError):
            decode_vector(codec, data, values)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.DESCRIPTOR.name)
@settings(fuzzed, max_examples=max(10, EXAMPLES // 4))
@given(st.binary(max_size=200))
def test_parsing(kind: type[Message], data: bytes) -> None:
    with only(FrameError):
        parse(kind, data)


@pytest.mark.parametrize("name", CHECKS)
@fuzzed
@given(randoms)
def test_checks(name: str, random: Random) -> None:
    message, check = CHECKS[name]
    changed = mutated(message, random)
    tracemalloc.start()
    try:
        with only(FrameError):
            check(changed)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND
    finally:
        tracemalloc.stop()


@fuzzed
@given(randoms)
def test_a_plan_that_passes_its_check_has_a_layout(random: Random) -> None:
    plan = mutated(PLAN, random)
    with only(FrameError, ConfigError):
        checks.check_plan(plan)
        for span in range(len(plan.reducers)):
            if plan.reducers[span].chunks < 10_000:
                assert len(SpanLayout.of(plan, span).sizes) == plan.reducers[span].chunks


@fuzzed
@given(st.lists(st.integers(-1, 1 << 33), max_size=12))
def test_scalars(bits: list[int]) -> None:
    with only(FrameError):
        StepScalars.from_bits(bits)


@fuzzed
@given(randoms)
def test_merkle_proofs(random: Random) -> None:
    size = random.randint(1, 40)
    leaves = [leaf_hash(bytes([index])) for index in range(size)]
    start = random.randrange(size)
    run = range(start, random.randint(start + 1, size))
    proof = range_proof(leaves, run)
    shown = leaves[run.start : run.stop]
    check_range(merkle_root(leaves), size, run, shown, proof)
    changed = [damaged(each, random) if random.random() < 0.3 else each for each in proof]
    if random.random() < 0.5:
        changed.insert(random.randint(0, len(changed)), random.randbytes(32))
    with only(CommitmentError):
        check_range(merkle_root(leaves), random.randint(run.stop, 80), run, shown, changed)
    with only(CommitmentError):
        check_range(
            random.randbytes(random.randint(0, 40)), size, run, [damaged(each, random) for each in shown], proof
        )


@fuzzed
@given(randoms)
def test_envelopes(random: Random) -> None:
    signed = sign(MACHINE.coordinator, RUN, LEASE)
    for kind in (pb.Lease, pb.Seal):
        with only(WireError):
            open_signed(mutated(signed, random), RUN, kind)
        with only(WireError):
            open_signed(damaged(signed.SerializeToString(), random), RUN, kind, signer=MACHINE.coordinator.peer_id)
    with only(WireError):
        open_run(mutated(MACHINE.run, random), MACHINE.coordinator.peer_id)


@fuzzed
@given(st.text(max_size=60))
def test_signers(signer: str) -> None:
    signed = sign(MACHINE.coordinator, RUN, LEASE)
    with only(WireError):
        signed.signer = signer
        open_signed(signed, RUN, pb.Lease)


def entries() -> list[pb.ChainEntry]:
    """Versions 0 and 1 as the machine has them."""
    machine, run_id, key = made(), MACHINE.run_id, MACHINE.coordinator
    payloads = [event.payload for event in machine.events if isinstance(event, ev.VersionCommitted)]
    plan = next(event.payload for event in machine.events if isinstance(event, ev.PlanMade))
    sealed = next(event.payload for event in machine.events if isinstance(event, ev.SealMade))
    first = parse(pb.VersionManifest, payloads[0])
    first.parent = bytes.fromhex(run_id)
    second = parse(pb.VersionManifest, payloads[1])
    return [
        pb.ChainEntry(manifest=sign(key, run_id, first)),
        pb.ChainEntry(
            manifest=sign(key, run_id, second),
            plan=sign(key, run_id, parse(pb.RoundPlan, plan)),
            seal=sign(key, run_id, parse(pb.Seal, sealed)),
        ),
    ]


ENTRIES = entries()


@fuzzed
@given(randoms)
def test_chain_entries(random: Random) -> None:
    """Changed in the envelope, and changed within by a coordinator that signs anything."""
    chain = Chain(MACHINE.run, MACHINE.coordinator.peer_id)
    with only(ChainError):
        chain.append(mutated(ENTRIES[0], random))
    chain = Chain(MACHINE.run, MACHINE.coordinator.peer_id)
    for entry in ENTRIES:
        changed = pb.ChainEntry()
        for name, kind in (("manifest", pb.VersionManifest), ("plan", pb.RoundPlan), ("seal", pb.Seal)):
            if entry.HasField(name):
                inner = mutated(parse(kind, getattr(entry, name).payload), random)
                getattr(changed, name).CopyFrom(sign(MACHINE.coordinator, MACHINE.run_id, inner))
        with only(ChainError):
            chain.append(changed)
    with only(ChainError):
        Chain(mutated(MACHINE.run, random), MACHINE.coordinator.peer_id)


@fuzzed
@given(randoms)
def test_successions(random: Random) -> None:
    """Changed in the envelope, and whatever the run key may sign: refused whole, or taken whole."""
    key = Identity.generate()
    maker = ChainMaker(run_key=key)
    maker.entries(2)
    good = pb.Succession(number=1, coordinator=maker.peers[0], first=2, parent=maker.head)
    for signed in (
        mutated(sign(key, maker.run_id, good), random),
        sign(key, maker.run_id, mutated(good, random)),
    ):
        chain = maker.chain()
        with only(ChainError):
            chain.succeed([signed])
        assert chain.successions in ([], [signed])


@fuzzed
@given(st.one_of(st.text(max_size=120), randoms.map(lambda random: damaged(EXAMPLE.encode(), random).decode("latin1"))))
def test_addresses(text: str) -> None:
    with only(ConfigError):
        parse_address(text)


def _shaken(value: Any, random: Random) -> Any:
    """JSON with something in it replaced."""
    odd = [None, True, -1, 1 << 70, 0.5, 1e308, "", "x" * 500, [], {}, {"a": {}}, [[[]]]]
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(sorted(value))
        return value | {random.choice([name, name, name, "unknown"]): _shaken(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.5:
        return [*value[1:], _shaken(value[0], random)]
    return random.choice(odd)


@fuzzed
@given(randoms)
def test_configs(random: Random) -> None:
    plain = MACHINE.config.canonical_json()
    for text in (json.dumps(_shaken(json.loads(plain), random)), damaged(plain.encode(), random).decode("latin1")):
        with only(HiveError):
            RunConfig.from_json(text)


@fuzzed
@given(randoms)
def test_logged_events(random: Random) -> None:
    """What the log decodes is what `EventLog.replay` can turn into a ChainError: ValueError, or an event."""
    name, body = ev.encode_event(random.choice(MACHINE.events))
    with contextlib.suppress(ValueError):
        ev.decode_event(random.choice([name, "Nothing", "PlanMade"]), damaged(body, random))
    with contextlib.suppress(ValueError):
        ev.decode_event(name, json.dumps(_shaken(json.loads(body), random)).encode())


CASE = Evidence()
PROOFS = {
    "wrong span": (CASE.wrong_span(), {CASE.peer(0)}),
    "covered span": (CASE.covered_span(), {CASE.peer(0), CASE.peer(3)}),
    "two receipts": (CASE.two_receipts(), {CASE.peer(0)}),
    "wrong push": (CASE.wrong_push(), {CASE.peer(3)}),
}
"""With who may be found guilty by them; the others have signed nothing wrong."""


@pytest.mark.parametrize("name", PROOFS)
@settings(fuzzed, max_examples=max(10, EXAMPLES // 2))
@given(randoms)
def test_proofs_of_fault(name: str, random: Random) -> None:
    """Changed anywhere, by a coordinator that signs anything: a WireError, or a verdict on none but the guilty."""
    proof, guilty = PROOFS[name]
    changed = mutated(proof, random)
    with only(WireError):
        assert {peer for peer, _ in judge(changed.SerializeToString(), CASE.run_id)} <= guilty
    for field, kind in (("plan", pb.RoundPlan), ("seal", pb.Seal)):
        if proof.HasField(field) and random.random() < 0.7:
            inner = mutated(parse(kind, getattr(proof, field).payload), random)
            getattr(changed, field).CopyFrom(sign(CASE.coordinator, CASE.run_id, inner))
    with only(WireError):
        assert {peer for peer, _ in judge(changed.SerializeToString())} <= guilty


REPORTS = [
    pb.Ready(version=1, state_root=bytes([1]) * 32),
    CHECKS["contribution"][0],
    CHECKS["sender report"][0],
    vote(),
    pb.AuditReport(plan=bytes(32), seal=bytes(32), span=0, content=bytes(32)),
    pb.Leave(reason="x"),
]


@settings(fuzzed, max_examples=max(10, EXAMPLES // 4))
@given(randoms)
def test_reports_from_members(random: Random) -> None:
    """A machine judges what its members sign, takes what it accepts, and can be replayed from its log afterwards."""
    machine = made()
    for _ in range(10):
        peer = random.choice(machine.peers)
        message = random.choice(REPORTS)
        if isinstance(message, pb.SenderReport | pb.StepReport | pb.AuditReport) and random.random() < 0.8:
            message.plan = machine.state.round.attempt.digest if machine.state.round.attempt else bytes(32)
        with only(WireError):
            machine.report(peer, mutated(message, random))
    machine.wait(200.0)
    again = State(machine.terms)
    for event in machine.events:
        apply(again, event)
    machine.check_replay()
