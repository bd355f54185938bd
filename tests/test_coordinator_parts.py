"""The coordinator's smaller parts: admission, schedule, metrics, and what people are shown."""

from collections.abc import Iterator

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.admission import check_head, refusal
from hivegrpo.coordinator.planning import merge_metrics
from hivegrpo.coordinator.round import Held
from hivegrpo.coordinator.schedule import learning_rate
from hivegrpo.coordinator.status import Pulse, snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.config import AdmissionSection, OptimizerSection
from hivegrpo.protocol.envelope import PROTOCOL, sign
from hivegrpo.protocol.errors import ChainError, FrameError, SignatureError
from hivegrpo.protocol.identity import Identity


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.check_replay()


def test_joins_are_refused_in_words() -> None:
    run = pb.RunManifest(digests={"known_answer": b"k" * 32})
    peer = Identity.generate().peer_id
    anyone, listed = AdmissionSection(), AdmissionSection(mode="allow_list", peers=(peer,))
    join = pb.Join(protocol=PROTOCOL, known_answer=b"k" * 32, addresses=[f"/ip4/10.0.0.1/tcp/1/p2p/{peer}"])
    assert refusal(join, peer, run, anyone) is None
    assert refusal(join, peer, run, listed) is None
    other = pb.Join(protocol=PROTOCOL, known_answer=b"k" * 32)
    assert str(refusal(other, "12D3KooWsomeone", run, listed)).startswith("admission: 12D3KooWsomeone is not on")
    assert str(refusal(pb.Join(protocol="hivegrpo/9"), peer, run, anyone)).startswith("protocol: ")
    assert str(refusal(pb.Join(protocol=PROTOCOL, known_answer=b"x"), peer, run, anyone)).startswith("numerics: ")
    with pytest.raises(FrameError, match="own id"):
        refusal(join, Identity.generate().peer_id, run, anyone)


def test_a_newer_or_another_head_under_our_signature_stops_everything() -> None:
    machine = Machine()
    chain = Chain(machine.run, machine.coordinator.peer_id)
    payload = pb.VersionManifest(parent=chain.manifest.digest, state=pb.Blob(root=b"r" * 32, size=8))
    ours = sign(machine.coordinator, machine.run_id, payload)
    chain.append(pb.ChainEntry(manifest=ours))
    check_head(chain, ours)
    payload.state.root = b"s" * 32
    with pytest.raises(ChainError, match=r"holds version 0 .* without it"):
        check_head(chain, sign(machine.coordinator, machine.run_id, payload))
    payload.version = 1
    with pytest.raises(ChainError, match=r"holds version 1 .* ends at version 0"):
        check_head(chain, sign(machine.coordinator, machine.run_id, payload))
    with pytest.raises(SignatureError):
        check_head(chain, sign(Identity.generate(), machine.run_id, payload))


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        # Two warm-up steps of ten from 0, then p = 0, 1/8, 2/8, ... of the way: transformers' get_*_schedule.
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.875, 0.75]),
        ("cosine", [0.0, 0.5, 1.0, 0.9619397662556434, 0.8535533905932737]),
    ],
)
def test_the_learning_rate_follows_its_schedule(kind: str, rates: list[float]) -> None:
    optimizer = OptimizerSection.model_validate({"learning_rate": 1.0, "lr_scheduler_type": kind, "warmup_steps": 2})
    assert [learning_rate(step, 10, optimizer) for step in range(1, 6)] == pytest.approx(rates, abs=1e-15)


def test_metrics_are_summed_or_averaged_by_weight() -> None:
    light = pb.Contribution(weight=1, metrics={"reward": 1.0, "num_tokens": 5.0, "kl": 2.0})
    heavy = pb.Contribution(weight=3, metrics={"reward": 3.0, "num_tokens": 7.0, "eval/accuracy": 0.1})
    merged = merge_metrics([Held(pb.Lease(), light, b""), Held(pb.Lease(), heavy, b"")], {"eval/accuracy": 0.9})
    # (1 * 1 + 3 * 3) / 4 and 5 + 7; kl only from the one that has it.
    assert merged == {"reward": 2.5, "num_tokens": 12.0, "kl": 2.0, "eval/accuracy": 0.9}


def test_what_people_are_shown(machine: Machine) -> None:
    a, b, c = machine.peers
    machine.join(a, b, c)
    machine.ready(a, b)
    shown = {peer["peer"]: peer["state"] for peer in snapshot(machine.state, {}, machine.now)["peers"]}
    assert shown == {a: "online", b: "online", c: "joining"}
    machine.ready(c)
    machine.round()
    machine.lose(a)
    machine.happen(ev.PeerLeft(machine.now, b, ""))
    pulse = Pulse(machine.now, 1, "draining", {"tokens_per_second": 12.5})
    view = snapshot(machine.state, {c: pulse, a: pulse}, machine.now + 4.9)
    assert [(peer["state"], peer["contributed"]) for peer in view["peers"]] == [
        ("unreachable", 1),
        ("offline", 1),
        ("draining", 1),
    ]
    assert [peer["tokens_per_second"] for peer in view["peers"]] == [0.0, 0.0, 12.5]
    assert view["state_root"] == (bytes([1]) * 32).hex()
    assert snapshot(machine.state, {}, machine.now + 5)["peers"][0]["state"] == "offline"
