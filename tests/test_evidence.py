"""What the status says of each contribution: norms, clip factors, cosines, and whose pushes were cut off."""

import asyncio
import math
from pathlib import Path

import pytest
import torch
from support.machine import Machine
from support.runs import IntegerLearner, signed_run, small_config, vector_of
from support.scripted import run
from support.streams import on_stream
from support.swarm import Swarm

from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.events import SendersReported, VersionCommitted
from hivegrpo.coordinator.evidence import contribution_evidence, norm_of
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.state import State, Terms
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector, encode_vector
from hivegrpo.peer.swarm.evidence import SpanDots
from hivegrpo.peer.swarm.reducer import reduce_span
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.coefficients import norm_bytes
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import fp32_bits
from hivegrpo.protocol.transport.base import Stream

VALUES = 40_000


@pytest.mark.parametrize("rule", ["mean", "centered_clip"])
def test_inner_products_are_those_of_the_decoded_vectors(rule: str) -> None:
    codec = get_codec("mxint8")
    generator = torch.Generator().manual_seed(3)
    encoded = {peer: encode_vector(codec, torch.randn(VALUES, generator=generator)) for peer in "ab"}
    decoded = {peer: decode_vector(codec, b"".join(chunks), VALUES).double() for peer, chunks in encoded.items()}
    plan = pb.RoundPlan(codec="mxint8", rule=rule, values=VALUES, reducers=[pb.Reducer(first=0, chunks=3)])
    seal = pb.Seal(
        contributors=[
            pb.Sealed(peer="a", coefficient=fp32_bits(0.25)),
            pb.Sealed(peer="b", coefficient=fp32_bits(0.75)),
        ]
    )
    evidence = SpanDots(2)
    data = reduce_span(plan, 0, seal, encoded, lambda decoded, reduced, _: evidence.add(decoded, reduced))
    assert data == reduce_span(plan, 0, seal, encoded)
    result = decode_vector(codec, data, VALUES).double()
    expected = [float(decoded[peer] @ result) for peer in "ab"] + [float(result @ result)]
    # The evidence is of the result before its encoding, which rounds to 2^-7 of a block's largest value at worst.
    assert evidence.dots == pytest.approx(expected, rel=2**-7)


@pytest.mark.parametrize("values", [1, 255, 256, 257, 5000])
def test_every_value_is_in_an_inner_product(values: int) -> None:
    """Small integers: every product and every sum is exact."""
    one, two = (torch.arange(values) % modulus - 3.0 for modulus in (7, 11))
    evidence = SpanDots(2)
    evidence.add([one, two], two)
    evidence.add([two, one], two)
    both = float((one + two) @ two)
    assert evidence.dots == [both, both, float(2 * two @ two)]


def test_evidence_by_hand() -> None:
    """Two spans. x_a = (3, 0 | 0), x_b = (0, 4 | 3): norms 3 and 5. The result (1.5, 2 | 1.5) is their mean."""
    machine = Machine(peers=2, run={"start_peers": 2})
    a, b = machine.peers
    machine.start()
    machine.contribute(a, b)
    attempt = machine.state.round.attempt
    assert attempt is not None
    for reducer, norms in ((a, (9, 16)), (b, (0, 9))):
        complete = [
            pb.Complete(peer=peer, norm_squared=norm_bytes(norm << 298))
            for peer, norm in zip((a, b), norms, strict=True)
        ]
        machine.report(reducer, pb.SenderReport(plan=attempt.digest, complete=complete))
    report = machine.step_report()
    assert [record["cosine"] for record in contribution_evidence(attempt)] == [None, None], "nobody has told yet"
    for reducer, dots in ((a, (4.5, 8.0, 6.25)), (b, (0.0, 4.5, 2.25))):
        report.dots[:] = dots
        assert machine.report(reducer, report).accepted
    assert machine.state.last is not None
    first, second = contribution_evidence(machine.state.last)
    result = math.sqrt(1.5**2 + 2**2 + 1.5**2)
    assert (first["norm"], second["norm"]) == (3.0, 5.0)
    assert first["cosine"] == pytest.approx(4.5 / (3 * result))
    assert second["cosine"] == pytest.approx(12.5 / (5 * result))
    assert first["clip_factor"] == pytest.approx(1.0, rel=1e-7)
    machine.check_replay()


def test_what_is_missing_or_makes_no_sense_is_left_out() -> None:
    machine = Machine()
    machine.start()
    machine.contribute(*machine.peers)
    machine.exchange()
    report = machine.step_report()
    for peer in machine.peers:
        report.dots[:] = [1.0, 1.0] if peer == machine.peers[0] else [1e300, 1.0, 1.0, -5.0]
        assert machine.report(peer, report).accepted
    assert machine.state.last is not None
    records = contribution_evidence(machine.state.last)
    assert [record["cosine"] for record in records] == [None, None, None], "one span is not told of"
    assert [record["norm"] for record in records] == [0.0, 0.0, 0.0]


def test_a_norm_comes_from_its_exact_square() -> None:
    assert norm_of(25 << 298) == 5.0
    assert norm_of(1) == 2.0**-149
    assert norm_of((1 << 425) - 1) == pytest.approx(2.0**63.5)


def flip_a_bit(stream: Stream) -> None:
    send, frames = stream.send, 0

    async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        nonlocal frames
        frames += 1
        data = bytearray(frame)
        data[-1] ^= frames == 2
        await send(bytes(data), timeout)

    stream.send = sending  # type: ignore[method-assign]  # the fault


def test_the_reports_of_real_peers_make_the_evidence_and_name_who_was_cut_off(tmp_path: Path) -> None:
    config = small_config(run={"start_peers": 3, "versions": 1}, averaging={"codec": "fp32"}, timing={"exchange": 1.0})
    coordinator = Identity.generate()
    signed = signed_run(coordinator, config, VALUES)
    swarm = Swarm(tmp_path, config, signed, coordinator)

    async def scenario() -> None:
        node = await swarm.start_coordinator()
        await swarm.start_peer("liar", IntegerLearner(VALUES), wrap=on_stream("push", flip_a_bit))
        for name in ("b", "c"):
            await swarm.start_peer(name, IntegerLearner(VALUES))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await node.leave()

    run(scenario())
    state = State(Terms.of(signed, config))
    for event in swarm.events:
        apply(state, event)
    assert state.last is not None
    records = {record["peer"]: record for record in contribution_evidence(state.last)}
    liar = swarm.identities["liar"].peer_id
    refused = records[liar]["refused"]
    assert refused.keys() == {reducer.peer for reducer in state.last.plan.reducers} - {liar}
    assert all("not those that the push's header announces" in reason for reason in refused.values())
    assert not records[liar]["sealed"]
    sealed = [contributor for contributor in state.last.plan.contributors if records[contributor.peer]["sealed"]]
    assert len(sealed) == 2
    vectors = {item.peer: vector_of(item.lease, VALUES).double() for item in sealed}
    total = sum(item.weight for item in sealed)
    mean = sum(vectors[item.peer] * (item.weight / total) for item in sealed)
    for item in sealed:
        vector, record = vectors[item.peer], records[item.peer]
        assert record["refused"] == {}
        assert record["norm"] == pytest.approx(float(vector.norm()), rel=1e-12)
        cosine = float(vector @ mean / (vector.norm() * mean.norm()))
        assert record["cosine"] == pytest.approx(cosine, abs=1e-6)  # the result is rounded to fp32
    assert any(isinstance(event, VersionCommitted) for event in swarm.events)
    reports = [event for event in swarm.events if isinstance(event, SendersReported)]
    log = EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)
    told = [record for record in read_records(log) if record["kind"] == "senders"]
    log.close()
    assert len(told) == len(reports)
    assert any(liar in record["refused"] for record in told)
    times = [seconds for record in told for peer, seconds in record["seconds"].items() if peer != record["peer"]]
    assert min(times) > 0.0, "of what came from others"
    assert all(record["seconds"].get(record["peer"], 0.0) == 0.0 for record in told), "nothing of the own"
