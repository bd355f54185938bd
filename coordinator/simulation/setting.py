"""What is simulated."""

from dataclasses import dataclass, field

from hivegrpo.coordinator.simulation.faults import Faults
from hivegrpo.protocol.config import DatasetSection, GrpoSection, ModelSection, RewardsSection, RunConfig, RunSection

GROUPS_PER_PEER = 4
MOST_START_PEERS = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """The same setting gives the same history, to the last bit."""

    config: RunConfig
    peers: int
    seed: int
    faults: Faults = field(default_factory=Faults)
    values: int = 400_000
    """Length of the vector that is averaged."""
    speed: float = 0.5
    """Groups a second that the median peer samples."""
    upload_mbit: float = 20.0
    """10^6 bits a second that the median peer uploads."""


def config_for(peers: int, rounds: int, run: RunConfig | None = None) -> RunConfig:
    """A run of so many versions, which begins with half of the peers; all else as in `run`, or by default."""
    section = RunSection(name="simulated", versions=rounds, start_peers=min(max(peers // 2, 1), MOST_START_PEERS))
    if run is not None:
        return run.model_copy(update={"run": section})
    return RunConfig(
        run=section,
        model=ModelSection.model_validate({"path": "none"}),
        dataset=DatasetSection.model_validate({"path": "none.jsonl"}),
        rewards=RewardsSection(functions=("none",)),
        grpo=GrpoSection(prompts_per_round=GROUPS_PER_PEER * peers),
    )
