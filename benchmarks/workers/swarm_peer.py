"""One peer of a run without a model: `hivegrpo.peer.daemon.work_in_run` over libp2p, with a learner that only answers.

Arguments: home folder, rank, number of peers, number of values; "corrupt" at the end makes it serve wrong blobs.
"""

import asyncio
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
import uvloop
from lines import hear, say
from sockets import keep_sockets_together
from torch import Tensor
from vectors import Mean, vector_of
from watched import ConstantLearner, Stopwatch, WatchedTransport, take_part

from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.identity import Identity


class TellingStopwatch(Stopwatch):
    """Tells the driver when a round has been voted on."""

    def __init__(self, mean: Mean) -> None:
        super().__init__()
        self._mean = mean

    def voted(self, report: pb.StepReport) -> None:
        say(
            "averaged",
            round=self.decoded - self.reported,
            data=report.metrics["seconds/exchange"],
            encoding=self.reported - self.learned,
            averaged=self._mean.matches(self.average),
            digest=sha256(self.average.numpy()).hexdigest(),
            encoded=self.encoded,
        )


class CommandedLearner(ConstantLearner):
    """Returns the same vector, whenever the driver says."""

    def __init__(self, vector: Tensor, transport: WatchedTransport, gone: Callable[[], object]) -> None:
        """`gone` is called, in the worker's thread, when there is no driver any more."""
        super().__init__(vector, transport.watch)
        self._transport = transport
        self._gone = gone

    def contribute(
        self, lease: int, start: int, count: int, wanted: int, cancelled: threading.Event
    ) -> LearnedContribution:
        say("armed")
        if hear("count") is not None:
            say("counted", sent=self._transport.sent)
        if hear("go") is None:
            self._gone()
        return self.contribution(count)


async def main(home: PeerHome, rank: int, peers: int, values: int) -> None:
    """Hear the address; work until the driver has gone."""
    watch, own = TellingStopwatch(Mean(peers, values)), vector_of(rank, values)
    say("loaded")
    message = hear("join")
    if message is None:
        return
    working, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert working is not None
    address, identity = message["address"], Identity.generate()
    transport = await WatchedTransport.create(identity, initial_peers=[address])
    transport.watch = watch
    learner = CommandedLearner(own, transport, partial(loop.call_soon_threadsafe, working.cancel))
    await take_part(address, home, identity, transport, learner)


def serve_wrong_pieces() -> None:
    """From now on the last byte of every piece that leaves this process is another one."""
    read = BlobStore.read_piece

    def damaged(store: BlobStore, ref: BlobRef, index: int) -> bytes | None:
        piece = read(store, ref, index)
        return piece and piece[:-1] + bytes([piece[-1] ^ 1])

    BlobStore.read_piece = damaged  # type: ignore[method-assign]  # the fault


if __name__ == "__main__":
    keep_sockets_together()
    torch.set_num_threads(1)
    home, *numbers = sys.argv[1:]
    if numbers[-1] == "corrupt":
        numbers.pop()
        serve_wrong_pieces()
    with suppress(asyncio.CancelledError):
        uvloop.run(main(PeerHome(Path(home)), *map(int, numbers)))
