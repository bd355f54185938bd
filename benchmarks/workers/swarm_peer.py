"""One peer of a run without a model: `hivegrpo.peer.daemon.work_in_run` over libp2p, with a learner that only answers.

Arguments: home folder, rank, number of peers, number of values.

The product has no switches for this. What is timed is seen from outside: the transport sees the peer's reports go out,
and `decode_vector`, as `hivegrpo.peer.swarm.replay` calls it, returns when the averaged gradient is decoded.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
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
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.p2p import P2PTransport


class Stopwatch:
    """Times of the round in progress; tells the driver when it has been voted on."""

    def __init__(self, mean: Mean) -> None:
        self._mean = mean
        self._learned = self._reported = self._decoded = self._decoding = 0.0
        self._contributed = self._voted = self._encoded = 0
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
            if report.version != self._voted:
                self._voted = report.version
                say("averaged", **self._figures(report))

    def decode(self, codec: Codec, data: bytes | memoryview, values: int) -> Tensor:
        """`decode_vector`, and the time at which it is done."""
        began = time.perf_counter()
        vector = decode_vector(codec, data, values)
        self._decoded, self._average, self._encoded = time.perf_counter(), vector, len(data)
        self._decoding = self._decoded - began
        return vector

    def _figures(self, report: pb.StepReport) -> dict[str, Any]:
        return {
            "round": self._decoded - self._reported,
            "data": report.metrics["seconds/exchange"] + self._decoding,
            "encoding": self._reported - self._learned,
            "averaged": self._mean.matches(self._average),
            "digest": sha256(self._average.numpy()).hexdigest(),
            "encoded": self._encoded,
        }


class WatchedTransport(P2PTransport):
    """Shows a stopwatch the reports that are sent, and counts the bytes of all streams."""

    watch: Stopwatch
    _sent_before = 0

    @property
    def sent(self) -> int:
        """Bytes of frames and their prefixes so far, on streams that are open or were."""
        return self._sent_before + sum(stream.bytes_sent for stream in set(self._streams))

    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        if name == REPORT:
            self.watch.reports(parse(pb.Signed, request))
        return await super().call(peer_id, name, request, timeout)

    def forget(self, stream: FramedStream) -> None:
        if stream in self._streams:
            self._sent_before += stream.bytes_sent
        super().forget(stream)


class ConstantLearner:
    """Returns the same vector, whenever the driver says."""

    def __init__(self, vector: Tensor, transport: WatchedTransport, gone: Callable[[], object]) -> None:
        """`gone` is called, in the worker's thread, when there is no driver any more."""
        self._vector = vector
        self._transport = transport
        self._gone = gone

    def load(self, version: int, vector: Tensor) -> None:
        """Nothing depends on the parameters."""

    def load_reference(self, vector: Tensor | None) -> None:
        raise AssertionError("the run has no reference")

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        say("armed", sent=self._transport.sent)
        if hear("go") is None:
            self._gone()
        self._transport.watch.learned()
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


async def main(home: PeerHome, rank: int, peers: int, values: int) -> None:
    """Hear the address; work until the driver has gone."""
    watch, own = Stopwatch(Mean(peers, values)), vector_of(rank, values)
    say("loaded")
    message = hear("join")
    if message is None:
        return
    working, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert working is not None
    address = message["address"]
    identity = Identity.generate()
    transport = await WatchedTransport.create(identity, initial_peers=[address])
    transport.watch = watch
    learner = ConstantLearner(own, transport, partial(loop.call_soon_threadsafe, working.cancel))
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


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    home, *numbers = sys.argv[1:]
    with suppress(asyncio.CancelledError):
        asyncio.run(main(PeerHome(Path(home)), *map(int, numbers)))
