"""A policy whose numbers are not finite: the lease is dropped and shown, and the daemon goes on."""

import asyncio
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import save_model
from support.runs import signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.learn.data import Prompts
from hivegrpo.peer.learn.learner import Learner
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.errors import NumericsError
from hivegrpo.protocol.identity import Identity

PROMPTS = Prompts(tuple({"answer": str(digit), "prompt": f"{digit}+0="} for digit in range(9)))


class Diverged(Learner):
    """Its policy gives `value` for a logit, under the first lease that it works on."""

    value = float("nan")
    loads = 0

    def load(self, version: int, vector: torch.Tensor) -> None:
        super().load(version, vector)
        self.loads += 1
        if self.loads == 1:
            self.hook = self.policy.model.get_output_embeddings().register_forward_hook(self._spoil)
        elif self.loads == 2:
            self.hook.remove()

    def _spoil(self, module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([5]), self.value)


def run_of_one(**sections: Any) -> RunConfig:
    grpo = {"prompts_per_round": 2, "num_generations": 2, "max_prompt_length": 8, "max_completion_length": 3}
    return small_config(run={"versions": 1, "start_peers": 1}, grpo=grpo, **sections)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_neither_sampling_nor_evaluation_takes_numbers_that_are_not_finite(model: Path, value: float) -> None:
    learner = Diverged.open(run_of_one(evaluation={"path": "x.jsonl"}), PeerConfig(), model, PROMPTS, PROMPTS)
    learner.value = value
    vector = torch.zeros(learner.policy.size)
    learner.load(0, vector)
    with pytest.raises(NumericsError, match="logits are not finite"):
        learner.contribute(1, 0, 2, 2, threading.Event())
    with pytest.raises(NumericsError, match="logits are not finite"):
        learner.evaluate(threading.Event())
    learner.load(0, vector)
    assert learner.contribute(1, 0, 2, 2, threading.Event()).weight > 0
    learner.close()


@pytest.mark.parametrize("sections", [{}, {"evaluation": {"path": "x.jsonl", "every": 1}}], ids=["rollout", "accuracy"])
def test_the_lease_is_dropped_and_shown_and_the_next_one_makes_a_version(
    tmp_path: Path, model: Path, sections: dict[str, Any]
) -> None:
    config = run_of_one(**sections)
    learner = Diverged.open(config, PeerConfig(), model, PROMPTS, PROMPTS)

    async def play() -> str:
        chief = Identity.generate()
        run = signed_run(chief, config, rows=len(PROMPTS), layout=learner.layout)
        swarm = Swarm(tmp_path, config, run, chief)
        coordinator = await swarm.start_coordinator()
        peer = await swarm.start_peer("peer", learner)
        async with asyncio.timeout(30.0):
            await swarm.committed(1)
            await peer.leave()
            await coordinator.leave()
        return swarm.run_id

    run_id = asyncio.run(play())
    learner.close()
    with closing(EventLog(tmp_path / "coordinator" / LOG_FILE, run_id)) as log:
        records = list(read_records(log))
    [empty] = [record for record in records if record["kind"] == "round_empty"]
    assert empty["reason"] == "no contribution has weight: numerics/failed = 1"
    [dropped, used] = [record for record in records if record["kind"] == "contribution"]
    assert (dropped["dropped"], dropped["used"], dropped["weight"]) == ([0, 1], [], 0)
    assert used["weight"] > 0
