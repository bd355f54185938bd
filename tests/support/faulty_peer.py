"""A peer that kills itself, as `kill -9` would, at a chosen moment. An entry point for tests only.

python faulty_peer.py ADDRESS HOME rollout|exchange N: in the N-th rollout, or while it pushes chunks for the N-th time.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from hivegrpo.cli.output import configure_logging
from hivegrpo.peer.daemon import run_peer
from hivegrpo.peer.learn import collect
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream, Transport
from hivegrpo.protocol.transport.p2p import P2PTransport


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    def __init__(self, count: int) -> None:
        self.left = count

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            die()


def die_in_rollout(countdown: Countdown) -> None:
    make_rollout = collect.make_rollout

    def dying(*args: Any, **kwargs: Any) -> Any:
        countdown.tick()
        return make_rollout(*args, **kwargs)

    collect.make_rollout = dying


def die_in_push(transport: Transport, countdown: Countdown) -> None:
    """After the header of a push and before its first chunk."""
    open_stream = transport.open_stream

    async def opening(peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
        stream = await open_stream(peer_id, name, timeout, lanes)
        if name == "push":
            send, frames = stream.send, 0

            async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
                nonlocal frames
                frames += 1
                if frames == 2:
                    countdown.tick()
                await send(frame, timeout)

            stream.send = sending  # type: ignore[method-assign]  # the fault
        return stream

    transport.open_stream = opening  # type: ignore[method-assign]  # the fault


async def main(address: str, home: Path, moment: str, count: int) -> None:
    configure_logging(verbose=True)
    countdown = Countdown(count)

    async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
        transport = await P2PTransport.create(identity, "127.0.0.1", 0, [address])
        if moment == "exchange":
            die_in_push(transport, countdown)
        return transport

    if moment == "rollout":
        die_in_rollout(countdown)
    settings = PeerConfig.load(home=home, threads=1, host="127.0.0.1")
    await run_peer(address, settings, asyncio.Event(), lambda record: None, make_transport=make_transport)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
