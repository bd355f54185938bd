"""The coordinator's smaller parts: admission, schedule, metrics, and what people are shown."""

from collections.abc import Iterator

import pytest
from support.machine import Machine

from hivegrpo.coordinator import events as ev
from hivegrpo.coordinator.admission import check_head, refusal
from hivegrpo.coordinator.metrics import Aggregation, aggregation_of, merge_metrics, why_empty
from hivegrpo.coordinator.planning import max_weight
from hivegrpo.coordinator.round import Held
from hivegrpo.coordinator.status import Pulse, snapshot
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.config import AdmissionSection, GrpoSection, OptimizerSection
from hivegrpo.protocol.envelope import PROTOCOL, sign
from hivegrpo.protocol.errors import ChainError, FrameError, SignatureError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.schedule import learning_rate


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.check_replay()


def test_joins_are_refused_in_words() -> None:
    run = pb.RunManifest(digests={"known_answer": b"k" * 32})
    peer = Identity.generate().peer_id
    anyone, listed = AdmissionSection(mode="open"), AdmissionSection(mode="allow_list", peers=(peer,))
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


@pytest.mark.parametrize(
    ("aggregation", "names"),
    [
        (Aggregation.SUM, ["num_tokens", "num_prompts", "num_completions", "num_completion_tokens"]),
        (Aggregation.SUM, ["prompts/dropped", "groups/dropped", "rewards/exact_match/failed"]),
        (Aggregation.MINIMUM, ["completions/min_length", "completions/min_terminated_length", "clip_ratio/low_min"]),
        (Aggregation.MINIMUM, ["sampling/importance_sampling_ratio/min"]),
        (
            Aggregation.MAXIMUM,
            ["completions/max_length", "clip_ratio/high_max", "sampling/sampling_logp_difference/max"],
        ),
        (Aggregation.BY_TOKENS, ["entropy", "kl", "clip_ratio/low_mean", "clip_ratio/region_mean", "cispo_clip_ratio"]),
        (Aggregation.BY_TOKENS, ["sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/mean"]),
        (Aggregation.BY_COMPLETIONS, ["reward", "reward_std", "frac_reward_zero_std", "rewards/max_length/mean"]),
        (Aggregation.BY_COMPLETIONS, ["completions/mean_length", "completions/clipped_ratio", "rewards/num_steps/std"]),
        (Aggregation.BY_WEIGHT, ["loss"]),
    ],
)
def test_how_a_metric_adds_up_follows_from_its_name(aggregation: Aggregation, names: list[str]) -> None:
    assert {name: aggregation_of(name) for name in names} == dict.fromkeys(names, aggregation)


GRPO = GrpoSection(num_generations=2, max_completion_length=100)


@pytest.mark.parametrize(
    ("loss_type", "most"), [("dapo", 1000), ("cispo", 1000), ("grpo", 10), ("dr_grpo", 10), ("bnpo", 10)]
)
def test_five_groups_weigh_no_more_than_their_tokens_or_completions(loss_type: str, most: int) -> None:
    assert max_weight(5, GrpoSection.model_validate({**GRPO.model_dump(), "loss_type": loss_type})) == most


def held(weight: int, used: int, **metrics: float) -> Held:
    contribution = pb.Contribution(
        weight=weight, used=range(used), metrics={name.replace("__", "/"): value for name, value in metrics.items()}
    )
    return Held(pb.Lease(count=4, wanted=4), contribution, b"")


def test_long_completions_do_not_count_more_in_the_reward() -> None:
    # Two completions of 90 tokens in all, and six of 10: rewards by completions, entropies by tokens, loss by weight.
    long = held(90, 1, num_completions=2, num_completion_tokens=90, reward=1.0, entropy=1.0, loss=2.0)
    short = held(30, 3, num_completions=6, num_completion_tokens=10, reward=0.0, entropy=0.0, loss=0.0, kl=4.0)
    merged = merge_metrics([long, short], {"eval/accuracy": 0.9}, GRPO)
    assert merged == {
        "num_completions": 8.0,
        "num_completion_tokens": 100.0,
        "reward": 0.25,  # (1 * 2 + 0 * 6) / 8
        "entropy": 0.9,  # (1 * 90 + 0 * 10) / 100
        "loss": 1.5,  # (2 * 90 + 0 * 30) / 120
        "kl": 4.0,  # of the only one that has it
        "eval/accuracy": 0.9,
    }


def test_extremes_stay_extremes() -> None:
    one = held(1, 1, completions__min_length=3.0, completions__max_length=4.0)
    two = held(9, 1, completions__min_length=5.0, completions__max_length=6.0)
    assert merge_metrics([one, two], {}, GRPO) == {"completions/min_length": 3.0, "completions/max_length": 6.0}


@pytest.mark.parametrize("claim", [-1.0, 0.0, 9.0, 1e30])
def test_a_count_that_the_lease_does_not_allow_is_not_believed(claim: float) -> None:
    """Four positions of two completions: 8 at most. Each then counts as the completions that it uses, 2 and 6."""
    liar = held(1, 1, num_completions=claim, num_completion_tokens=claim * 100, reward=1.0, entropy=1.0)
    honest = held(1, 3, reward=0.0, entropy=0.0)
    merged = merge_metrics([liar, honest], {}, GRPO)
    assert (merged["reward"], merged["entropy"]) == (0.25, 0.25)


def test_an_empty_round_says_why_if_the_peers_did() -> None:
    told = [held(0, 0, frac_reward_zero_std=1.0, groups__dropped=4.0), held(0, 0, frac_reward_zero_std=1.0)]
    assert why_empty(told, GRPO) == "no contribution has weight: frac_reward_zero_std = 1, groups/dropped = 4"
    assert why_empty([held(0, 0)], GRPO) == "no contribution has weight: the peers gave no metrics"


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
