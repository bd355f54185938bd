"""What a run has cost: from numbers, from a chain, and from where they are told."""

import asyncio
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LORA, load_policy, save_model, spread
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm
from support.trained_run import MadeRun, write_base, write_run

from hivegrpo.cli.cost import show_cost
from hivegrpo.peer.desk import LeaseDesk
from hivegrpo.peer.inference.cost import Cost, Prices, cost_of, describe_cost, energy, exchanged, money, total_cost
from hivegrpo.peer.inference.remote import mirror_run
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.device_time import DeviceTime
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.peer.rewards.base import Reward
from hivegrpo.peer.rewards.registry import BUILT_IN
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.checks import MAX_METRICS
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

METRICS = {
    1: {"num_device_seconds": 5400.0, "num_gpu_seconds": 3600.0, "num_tokens": 1000.0, "num_completion_tokens": 400.0},
    2: {"num_device_seconds": 1800.0, "num_completion_tokens": 400.0},
    3: {"num_tokens": 500.0, "num_completion_tokens": 100.0},
}
"""Version 2 is of the rollout that 1 sampled, and 3 does not say how long it took."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    folder = tmp_path_factory.mktemp("cost")
    write_base(folder / "base")
    return write_run(folder / "run", folder / "base", METRICS)


def test_a_chain_tells_what_its_versions_have_cost(made: MadeRun) -> None:
    # Two peers, each a reducer: 2 (n - 1) = 2 times the vector, which both spans together have once.
    vector = sum(span.size for span in made.manifest(1).spans)
    expected = Cost(
        versions=3,
        device_seconds=7200.0,
        gpu_seconds=3600.0,
        untimed=1,
        tokens=1500,
        completion_tokens=500,  # those of version 2 were sampled once
        bytes_exchanged=3 * 2 * vector,
    )
    assert cost_of(made.chain.entries) == expected
    assert cost_of(made.chain.entries[:1]) == Cost(0, 0.0, 0.0, 0, 0, 0, 0)


def test_a_reducer_that_contributes_nothing_is_sent_all_and_gets_nothing(made: MadeRun) -> None:
    """Three contributors and two reducers, one of which is none of them: it is sent its span by 3, the other by 2."""
    entry = made.chain.entries[1]
    manifest = pb.VersionManifest.FromString(entry.manifest.message.SerializeToString())
    own = entry.plan.message.reducers[0].peer
    del manifest.contributors[:]
    manifest.contributors.extend(pb.Contributor(peer=peer) for peer in (own, "a", "b"))
    sizes = [span.size for span in manifest.spans]
    changed = replace(entry, manifest=replace(entry.manifest, message=manifest))
    assert exchanged(changed) == 2 * (2 * sizes[0] + 3 * sizes[1])


COST = Cost(3, 7200.0, 3600.0, 0, 1500, 500, 2_500_000)


def test_prices_are_reckoned_with() -> None:
    prices = Prices(per_hour=0.5, watts=250.0, per_kwh=0.4)
    assert energy(COST, prices) == 0.5  # two hours of 250 W
    assert money(COST, prices) == pytest.approx(2 * 0.5 + 0.5 * 0.4)
    assert money(COST, Prices(watts=250.0)) is None
    assert energy(COST, Prices(per_hour=1.0)) is None
    with pytest.raises(ConfigError, match="--watts"):
        Prices(per_kwh=0.4)
    untimed = replace(COST, untimed=3)
    assert (energy(untimed, prices), money(untimed, prices)) == (None, None)


def test_the_line_says_what_is_known() -> None:
    line = describe_cost(COST, Prices(per_hour=0.5, watts=250.0))
    assert line == (
        "Cost: 1 GPU-hours, 1 device-hours on CPUs, 1,500 tokens (500 of them sampled), 2.5 MB exchanged, 0.5 kWh, "
        "1.00 at these prices."
    )
    on_cpus = replace(COST, gpu_seconds=0.0, bytes_exchanged=0, untimed=1)
    assert describe_cost(on_cpus) == (
        "Cost: 2 device-hours on CPUs, 1,500 tokens (500 of them sampled); "
        "1 of 3 versions do not say what time they took."
    )
    assert "GPU" not in describe_cost(on_cpus)
    assert "hours" not in describe_cost(replace(COST, untimed=3))


def test_the_command_prints_a_line_or_an_object(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    show_cost(str(made.folder), Prices(), as_json=False)
    captured = capsys.readouterr()
    assert captured.out == describe_cost(cost_of(made.chain.entries)) + "\n"
    assert "nothing proves" in captured.err
    show_cost(str(made.home), Prices(per_hour=3.0), as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert (content["run_id"], content["version"]) == (made.chain.run_id, 3)
    assert (content["device_seconds"], content["money"], content["kwh"]) == (7200.0, 6.0, None)


def test_an_address_is_asked_for_its_chain_alone(
    made: MadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path))

    async def mirror() -> Path:
        network = MemoryNetwork()
        transport = network.join(made.coordinator)
        await serve_chain(transport, made.chain)  # and no blob

        async def connect() -> Transport:
            return network.join(Identity.generate())

        return await mirror_run(transport.addresses()[0], None, connect)

    folder = asyncio.run(mirror())
    assert cost_of(ChainFile.open(folder / "cache").chain.entries) == cost_of(made.chain.entries)


# Where the numbers come from.


def test_time_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    spent = DeviceTime()
    with spent.learning():
        pass
    with spent.stepping():
        pass
    assert spent.take(on_gpu=True) == {"num_device_seconds": 3.5, "num_gpu_seconds": 3.0}
    assert spent.take(on_gpu=False) == {"num_device_seconds": 0.0}
    with pytest.raises(ZeroDivisionError), spent.learning():
        1 / 0  # noqa: B018
    assert spent.take(on_gpu=False) == {"num_device_seconds": 4.0}


WORK_SECONDS = 0.05


class SlowLearner(IntegerLearner):
    """Takes a while; on a GPU, if it is told so."""

    on_gpu = False

    def contribute(self, *arguments: Any) -> Any:
        time.sleep(WORK_SECONDS)  # what is measured is time
        return replace(super().contribute(*arguments), on_gpu=self.on_gpu)


class GpuLearner(SlowLearner):
    on_gpu = True


def test_sampling_ahead_is_work_too() -> None:
    learner = SlowLearner(8)
    learner.during_sample = lambda lease: time.sleep(WORK_SECONDS)
    desk = LeaseDesk(small_config(), learner, None, None, None)
    desk.sample(pb.Lease(id=1, version=1, count=6, wanted=6), torch.zeros(8), threading.Event())
    assert desk.device_time.take(on_gpu=False)["num_device_seconds"] >= WORK_SECONDS


def test_a_swarms_chain_has_the_time_of_all_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepping, steps = DeviceTime.stepping, []
    monkeypatch.setattr(DeviceTime, "stepping", lambda spent: (steps.append(spent), stepping(spent))[1])
    coordinator, values = Identity.generate(), 40_000
    config = small_config(run={"start_peers": 2, "versions": 3})
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, values), coordinator)

    async def scenario() -> None:
        node = await swarm.start_coordinator()
        await swarm.start_peer("a", SlowLearner(values))
        await swarm.start_peer("b", GpuLearner(values))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await node.leave()

    began = time.monotonic()
    asyncio.run(asyncio.wait_for(scenario(), 60))
    elapsed = time.monotonic() - began
    cost = cost_of(ChainFile.open(swarm.coordinator_home).chain.entries)
    assert (cost.versions, cost.untimed, len(steps)) == (3, 0, 2 * 3)
    assert 2 * 3 * WORK_SECONDS <= cost.device_seconds < 2 * elapsed
    assert 3 * WORK_SECONDS <= cost.gpu_seconds < cost.device_seconds - 3 * WORK_SECONDS
    assert cost.bytes_exchanged == 3 * 2 * sum(
        span.size for span in ChainFile.open(swarm.coordinator_home).chain.entries[1].manifest.message.spans
    )


def test_no_contribution_has_more_metrics_than_a_coordinator_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many rewards as a run may have, each of which fails once, and every setting that adds a metric."""
    names = [f"reward_{number}" for number in range(8)]

    def sometimes(*, completions: list[str], **_: Any) -> list[float | None]:
        return [None, *(float(len(text)) for text in completions[1:])]

    for name in names:
        monkeypatch.setitem(BUILT_IN, name, Reward(name, 1, sometimes))
    save_model(tmp_path / "model")
    grpo = {
        "num_generations": 4, "max_prompt_length": 6, "max_completion_length": 5, "beta": 0.1,
        "importance_sampling_correction": True, "off_policy_mask_threshold": 10.0,
    }  # fmt: skip
    config = RunConfig.model_validate(
        {
            "run": {"name": "test", "versions": 1},
            "model": {"path": "model"},
            "dataset": {"path": "rows.jsonl"},
            "rewards": {"functions": names},
            "lora": LORA.model_dump(),
            "grpo": grpo,
        }
    )
    policy = spread(load_policy(tmp_path / "model"))
    policy.model.generation_config.eos_token_id = list(range(64))  # some completions end
    encoder = PromptEncoder(load_tokenizer(tmp_path / "model"), config.dataset)
    learner = Learner(config, PeerConfig(), policy, encoder, Prompts(({"answer": "a", "prompt": "12"},) * 4), None)
    try:
        metrics = learner.contribute(1, 0, 4, 4, threading.Event()).metrics
    finally:
        learner.close()
    assert {"kl", "off_policy_mask/kept", "sampling/importance_sampling_ratio/max"} <= metrics.keys()
    assert {"completions/mean_terminated_length", "rewards/reward_7/failed", "rewards/reward_7/std"} <= metrics.keys()
    # What the desk, the sampling ahead and the coordinator add.
    added = {"seconds/rollout", "seconds/gradient", "seconds/hidden", "eval/accuracy"}
    added |= {"num_device_seconds", "num_gpu_seconds"}
    assert added.isdisjoint(metrics)
    assert len(metrics) + len(added) <= MAX_METRICS
    assert total_cost([metrics]).tokens == int(metrics["num_tokens"]) > 0
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()
