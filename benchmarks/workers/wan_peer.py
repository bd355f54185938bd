"""One peer of a run without a model, in a network namespace: it contributes by itself, after what passes for a rollout.

Arguments: home folder, rank, number of peers, number of values, the address to listen on, and the seconds that a
rollout takes.
"""

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvloop
from lines import hear, say
from sockets import keep_sockets_together
from torch import Tensor
from vectors import Mean, vector_of
from watched import ConstantLearner, Stopwatch, WatchedTransport, take_part

from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.identity import Identity


class KeepingStopwatch(Stopwatch):
    """Keeps the figures of the rounds that are over."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self.rounds: list[dict[str, Any]] = []
        self._mean = mean

    def voted(self, report: pb.StepReport) -> None:
        self.rounds.append(
            {
                "version": report.version,
                "reported": self.reported,
                "decoded": self.decoded,
                "averaged": self._mean.matches(self.average),
                "exchange": report.metrics["seconds/exchange"],
                "encoding": self.reported - self.learned,
                "at": time.time(),
                "interface": interface_bytes(),
            }
        )


def interface_bytes() -> list[int]:
    """Sent and received so far by eth0, headers included; zeros where there is none."""
    counters = [Path(f"/sys/class/net/eth0/statistics/{name}_bytes") for name in ("tx", "rx")]
    return [int(path.read_text()) if path.exists() else 0 for path in counters]


class SleepingLearner(ConstantLearner):
    """Returns the same vector, after a while that passes for a rollout."""

    def __init__(self, vector: Tensor, watch: Stopwatch, rollout: float) -> None:
        super().__init__(vector, watch)
        self._rollout = rollout
        self._ahead = 0
        """The lease that was sampled ahead."""
        self.rollouts: list[list[float]] = []
        """Of each rollout, in seconds since some moment: beginning, end, and when its gradient could be taken."""

    def sample(self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event) -> None:
        began = time.perf_counter()
        if self._rollout and cancelled.wait(self._rollout):
            raise Cancelled
        self._ahead = lease
        self.rollouts.append([began, time.perf_counter()])

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        if lease != self._ahead:
            self.sample(lease, start, count, wanted, cancelled)
        self.rollouts[-1].append(time.perf_counter())
        return self.contribution(count)


async def main(home: PeerHome, rank: int, peers: int, values: int, host: str, rollout: float) -> None:
    """Hear the address; work until the run is finished; say the figures."""
    watch = KeepingStopwatch(Mean(peers, values))
    learner = SleepingLearner(vector_of(rank, values), watch, rollout)
    say("loaded")
    message = hear("join")
    if message is None:
        return
    working = asyncio.current_task()
    assert working is not None
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), working.cancel)  # the driver has gone
    address, identity = message["address"], Identity.generate()
    transport = await WatchedTransport.create(identity, host, initial_peers=[address])
    transport.watch = watch
    await take_part(address, home, identity, transport, learner)
    say("finished", rounds=watch.rounds, rollouts=learner.rollouts)


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    home, rank, peers, values, host, rollout = sys.argv[1:]
    uvloop.run(main(PeerHome(Path(home)), int(rank), int(peers), int(values), host, float(rollout)))
