"""Three peers with uneven splits, through the real exchange with codec fp32, give one machine's gradient."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rollouts import GROUP, LONGEST, part, random_base, random_policy, random_rollout
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.peer.learn.gradient import rollout_gradient
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.peer.learn.rollout import Rollout
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.identity import Identity

GROUPS = 8
"""Over three peers: three, three and two."""


class PartLearner(IntegerLearner):
    """Takes the gradient of the groups that its lease names, always at the same parameters."""

    def __init__(self, policy: Policy, rollout: Rollout, grpo: GrpoSection) -> None:
        super().__init__(policy.size)
        self.policy, self.rollout, self.grpo = policy, rollout, grpo
        self.vectors: list[torch.Tensor] = []

    def load(self, version: int, vector: torch.Tensor) -> None:
        """The parameters stay those at which the one machine takes its gradient."""

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        mine = part(self.rollout, slice(start, start + count))
        gradient = rollout_gradient(self.policy, mine, self.grpo, micro_batch_tokens=30 + 40 * lease)
        self.vectors.append(gradient.vector)
        return LearnedContribution(gradient.vector, gradient.weight, tuple(range(count)), (), (), {}, 0, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"loss_type": "dr_grpo"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ],
    ids=["dapo", "grpo", "dr_grpo", "cispo"],
)
def test_three_peers_equal_one_machine(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Bar: 1e-5 of the norm, in float32; the plain mean of the peers' gradients is further away than 1e-2."""
    config = small_config(
        run={"start_peers": 3, "versions": 1},
        averaging={"codec": "fp32"},
        grpo={
            "prompts_per_round": GROUPS,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "beta": 0.04,
            **settings,
        },
    )
    policies = [random_policy(random_base(torch.float32)) for _ in range(3)]
    values, rollout = policies[0].size, random_rollout()
    one = rollout_gradient(policies[0], part(rollout, slice(0, GROUPS)), config.grpo, 10_000).vector
    learners = [PartLearner(policy, rollout, config.grpo) for policy in policies]
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config, values), coordinator)

    async def scenario() -> None:
        async with asyncio.timeout(60):
            serving = await swarm.start_coordinator()
            for name, learner in zip("abc", learners, strict=True):
                await swarm.start_peer(name, learner)
            await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
            await serving.leave()

    asyncio.run(scenario())
    entry = ChainFile.open(swarm.peer_home("a")).chain.entries[1]
    store = BlobStore(swarm.peer_home("a") / "blobs")
    spans = b"".join((store.folder / span.root.hex()).read_bytes() for span in entry.manifest.message.spans)
    averaged = decode_vector(get_codec("fp32"), spans, values)
    plain = torch.stack([learner.vectors[0] for learner in learners]).mean(dim=0)
    assert torch.linalg.norm(averaged - one) / torch.linalg.norm(one) <= 1e-5
    assert torch.linalg.norm(plain - one) / torch.linalg.norm(one) > 1e-2
