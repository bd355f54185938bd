"""One peer of a run without a model: `hivegrpo.peer.daemon.work_in_run` over libp2p, with a learner that only answers.

Arguments: home folder, rank, number of peers, number of values; optionally the address to listen on, and the
seconds that a rollout takes.

The product has no switches for this. What is timed is seen from outside: the transport sees the peer's reports go out,
and `decode_vector`, as `hivegrpo.peer.swarm.replay` calls it, returns when the averaged gradient is decoded.
"""

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lines import hear, say
from sockets import keep_sockets_together
from torch import Tensor
from vectors import Mean, vector_of

from hivegrpo.peer.daemon import work_in_run
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.cancel import Cancelled
from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.swarm import replay
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.peer.swarm.session import REPORT
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstream import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import fetch_run
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.p2p import P2PTransport


class Stopwatch:
    """Times of the round in progress, and the figures of those that are over."""

    def __init__(self, mean: Mean) -> None:
        self.rounds: list[dict[str, Any]] = []
        self._mean = mean
        self._learned = self._reported = self._decoded = 0.0
        self._contributed = 0
        self._average = torch.zeros(0)

    def learned(self) -> None:
        """The learner returns its vector."""
        self._learned = time.perf_counter()

    def reports(self, signed: pb.Signed) -> None:
        """A report is about to be sent, for the first time or again."""
        if signed.type == "Contribution":
            lease = parse(pb.Contribution, signed.payload).lease
            if lease != self._contributed:
                self._contributed, self._reported = lease, time.perf_counter()
        elif signed.type == "StepReport":
            report = parse(pb.StepReport, signed.payload)
            if not self.rounds or self.rounds[-1]["version"] != report.version:
                self.rounds.append(self._figures(report))

    def decode(self, codec: Codec, data: bytes | memoryview, values: int) -> Tensor:
        """`decode_vector`, and the time at which it is done."""
        vector = decode_vector(codec, data, values)
        self._decoded, self._average = time.perf_counter(), vector
        return vector

    def _figures(self, report: pb.StepReport) -> dict[str, Any]:
        return {
            "version": report.version,
            "round": self._decoded - self._reported,
            "averaged": self._mean.matches(self._average),
            "exchange": report.metrics["seconds/exchange"],
            "encoding": self._reported - self._learned,
            "at": time.time(),
            "interface": interface_bytes(),
        }


def interface_bytes() -> list[int]:
    """Sent and received so far by eth0, headers included; zeros where there is none."""
    counters = [Path(f"/sys/class/net/eth0/statistics/{name}_bytes") for name in ("tx", "rx")]
    return [int(path.read_text()) if path.exists() else 0 for path in counters]


class WatchedTransport(P2PTransport):
    """Shows a stopwatch the reports that are sent."""

    watch: Stopwatch

    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        if name == REPORT:
            self.watch.reports(parse(pb.Signed, request))
        return await super().call(peer_id, name, request, timeout)


class ConstantLearner:
    """Returns the same vector, after a while that passes for a rollout."""

    def __init__(self, vector: Tensor, watch: Stopwatch, rollout: float) -> None:
        self._vector = vector
        self._rollout = rollout
        self._watch = watch
        self._ahead = 0
        """The lease that was sampled ahead."""
        self.rollouts: list[list[float]] = []
        """Of each rollout, in seconds since some moment: beginning, end, and when its gradient could be taken."""

    def load(self, version: int, vector: Tensor) -> None:
        """Nothing depends on the parameters."""

    def load_reference(self, vector: Tensor | None) -> None:
        raise AssertionError("the run has no reference")

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
        self._watch.learned()
        return LearnedContribution(
            vector=self._vector,
            weight=1,
            used=tuple(range(count)),
            dropped=(),
            returned=(),
            metrics={},
            num_tokens=0,
            seconds={},
        )

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        raise AssertionError("the run has one iteration")

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        raise AssertionError("the run has nothing to evaluate")


async def main(home: PeerHome, rank: int, peers: int, values: int, host: str, rollout: float) -> None:
    """Hear the address; work until the run is finished; say the figures."""
    watch = Stopwatch(Mean(peers, values))
    learner = ConstantLearner(vector_of(rank, values), watch, rollout)
    say("loaded")
    message = hear("join")
    if message is None:
        return
    working = asyncio.current_task()
    assert working is not None
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), working.cancel)  # the driver has gone
    address = message["address"]
    identity = Identity.generate()
    transport = await WatchedTransport.create(identity, host, initial_peers=[address])
    transport.watch = watch
    try:
        coordinator = await transport.connect([address])
        chainfile = ChainFile.create(home.root, await fetch_run(transport, coordinator), coordinator)
        with ThreadPoolExecutor(max_workers=1) as worker, patch.object(replay, "decode_vector", watch.decode):
            await work_in_run(
                address,
                identity=identity,
                transport=transport,
                chainfile=chainfile,
                config=RunConfig.from_json(chainfile.chain.manifest.message.config),
                home=home,
                store=BlobStore(home.blobs),
                learner=learner,
                worker=worker,
                stop=asyncio.Event(),
                show=lambda status: None,
            )
    finally:
        await transport.close()
    say("finished", rounds=watch.rounds, rollouts=learner.rollouts)


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    home, rank, peers, values, *more = sys.argv[1:]
    host, rollout = more or ("127.0.0.1", "0")
    asyncio.run(main(PeerHome(Path(home)), int(rank), int(peers), int(values), host, float(rollout)))
