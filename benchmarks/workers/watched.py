"""A peer of a run without a model, watched from outside: what swarm_peer.py and wan_peer.py share.

The product has no switches for this. The transport sees the peer's reports go out, and the optimizer step, as
`hivegrpo.peer.swarm.replay` takes it, begins when the averaged gradient is decoded.
"""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import torch
from torch import Tensor

from hivegrpo.peer.daemon import work_in_run
from hivegrpo.peer.desk import Learns
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.evaluation import Evaluation
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.learn.step import PolicyState, adamw_step
from hivegrpo.peer.swarm import replay
from hivegrpo.peer.swarm.codecs.base import Codec
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.peer.swarm.session import REPORT
from hivegrpo.peer.swarm.sharing import Sharing
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import fetch_run
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import parse
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars
from hivegrpo.protocol.transport.frames import FramedStream
from hivegrpo.protocol.transport.p2p import P2PTransport


class Stopwatch:
    """Times of the round in progress, in seconds since some moment. A subclass says what a vote means to it."""

    def __init__(self) -> None:
        self.learned = self.reported = self.decoded = 0.0
        self.average = torch.zeros(0)
        self.encoded = 0
        """Bytes that the average was decoded from."""
        self._contributed = self._voted = self._encoded = 0

    def voted(self, report: pb.StepReport) -> None:
        """A vote is about to be sent, for the first time."""

    def reports(self, signed: pb.Signed) -> None:
        """A report is about to be sent, for the first time or again."""
        if signed.type == "Contribution":
            lease = parse(pb.Contribution, signed.payload).lease
            if lease != self._contributed:
                self._contributed, self.reported = lease, time.perf_counter()
        elif signed.type == "StepReport":
            report = parse(pb.StepReport, signed.payload)
            if report.version != self._voted:
                self._voted = report.version
                self.voted(report)

    def decode(self, codec: Codec, data: bytes | memoryview, values: int) -> Tensor:
        """`decode_vector`, of a part of the average."""
        self._encoded += len(data)
        return decode_vector(codec, data, values)

    def step(self, state: PolicyState, gradient: Tensor, scalars: StepScalars, *, out: PolicyState) -> None:
        """`adamw_step`, and the time at which it begins: then all of the average is decoded."""
        self.decoded, self.average = time.perf_counter(), gradient
        self.encoded, self._encoded = self._encoded, 0
        adamw_step(state, gradient, scalars, out=out)


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
    """Returns the same vector in every round. A subclass says when, in `contribute`."""

    def __init__(self, vector: Tensor, watch: Stopwatch) -> None:
        self._vector = vector
        self._watch = watch

    def load(self, version: int, vector: Tensor) -> None:
        """Nothing depends on the parameters."""

    def load_reference(self, vector: Tensor | None) -> None:
        raise AssertionError("the run has no reference")

    def contribute_again(self, lease: int, iteration: int, cancelled: threading.Event) -> LearnedContribution | None:
        raise AssertionError("the run has one iteration")

    def evaluate(self, cancelled: threading.Event) -> Evaluation:
        raise AssertionError("the run has nothing to evaluate")

    def contribution(self, count: int) -> LearnedContribution:
        """All of the lease is used."""
        self._watch.learned = time.perf_counter()
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


async def take_part(
    address: str, home: PeerHome, identity: Identity, transport: WatchedTransport, learner: Learns
) -> None:
    """Work in the run at `address` until it is finished; the transport is closed then."""
    try:
        coordinator = await transport.connect([address])
        chainfile = ChainFile.create(home.root, await fetch_run(transport, coordinator), coordinator)
        chain = chainfile.chain
        sharing = Sharing(transport, identity, chain.run_id, chain.coordinator, BlobStore(home.blobs))
        await sharing.start()
        watch = transport.watch
        with (
            ThreadPoolExecutor(max_workers=1) as worker,
            patch.object(replay, "decode_vector", watch.decode),
            patch.object(replay, "adamw_step", watch.step),
        ):
            gc.collect()
            gc.freeze()  # as the daemon does
            await work_in_run(
                address,
                identity=identity,
                transport=transport,
                chainfile=chainfile,
                config=RunConfig.from_json(chainfile.chain.manifest.message.config),
                home=home,
                sharing=sharing,
                learner=learner,
                worker=worker,
                stop=asyncio.Event(),
                show=lambda status: None,
            )
    finally:
        await transport.close()
