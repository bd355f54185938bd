"""Peers of a run that do nothing but follow it and send signed heartbeats over libp2p, at a steady rate.

Arguments: the coordinator's address, number of peers, heartbeats a second of all together, seconds.

Each heartbeat has a moment at which it is due, and its latency counts from then to its answer: whatever holds up the
sender, or makes it fall behind, is in it.
"""

import asyncio
import sys
from typing import Any

import uvloop
from lines import hear, say
from sockets import keep_sockets_together

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.chainstream import fetch_run
from hivegrpo.protocol.envelope import DIGEST_BYTES, PROTOCOL, parse, run_id_of, sign
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, Stream
from hivegrpo.protocol.transport.p2p import P2PTransport

WARM_UP = 1.0
"""Seconds of heartbeats before those that count."""

LINGER = 10.0
"""For the last answers."""


class BeatingPeer:
    """One identity, with its p2pd."""

    def __init__(self, transport: P2PTransport, identity: Identity, coordinator: str, run_id: str) -> None:
        self.transport = transport
        self._identity = identity
        self._coordinator = coordinator
        self._run_id = run_id
        self.latencies: list[float] = []
        self.failed = 0

    @classmethod
    async def start(cls, address: str) -> "BeatingPeer":
        identity = Identity.generate()
        transport = await P2PTransport.create(identity, dht=False)
        coordinator = await transport.connect([address])
        run = await fetch_run(transport, coordinator)
        return cls(transport, identity, coordinator, run_id_of(run.payload))

    async def join(self) -> Stream:
        """Follow the run; the stream that has to be kept open."""
        stream = await self.transport.open_stream(self._coordinator, "follow")
        join = pb.Join(protocol=PROTOCOL, addresses=self.transport.addresses(), known_answer=bytes(DIGEST_BYTES))
        await stream.send(self._sign(join))
        ack = parse(pb.Ack, await stream.receive(MAX_CALL_BYTES))
        assert ack.accepted, ack.reason
        return stream

    async def beat(self, due: float) -> None:
        """Send one heartbeat that was due then, on the loop's clock."""
        beat = pb.Heartbeat(version=0, state="online", metrics={"tokens_per_second": 5.0})
        try:
            answer = await self.transport.call(self._coordinator, "report", self._sign(beat))
        except WireError:
            self.failed += 1
            return
        if parse(pb.Ack, answer).accepted:
            self.latencies.append(asyncio.get_running_loop().time() - due)
        else:
            self.failed += 1

    def _sign(self, message: Any) -> bytes:
        return sign(self._identity, self._run_id, message).SerializeToString()


async def main(address: str, count: int, rate: float, seconds: float) -> None:
    """Join, warm up, measure, say what came out."""
    parse_address(address)
    peers = [await BeatingPeer.start(address) for _ in range(count)]
    try:
        streams = [await peer.join() for peer in peers]
        await beat_all(peers, rate, WARM_UP)
        for peer in peers:
            peer.latencies.clear()
        say("ready")
        await asyncio.to_thread(hear, "go")
        took = await beat_all(peers, rate, seconds)
        latencies = [latency for peer in peers for latency in peer.latencies]
        say("beaten", latencies=latencies, failed=sum(peer.failed for peer in peers), seconds=took)
        for stream in streams:
            await stream.close()
    finally:
        for peer in peers:
            await peer.transport.close()


async def beat_all(peers: list[BeatingPeer], rate: float, seconds: float) -> float:
    """Heartbeats at an even rate, from one peer after the other; seconds until the last was answered."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    sending: set[asyncio.Task[None]] = set()
    for number in range(round(rate * seconds)):
        due = begun + number / rate
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(peers[number % len(peers)].beat(due))
        sending.add(task)
        task.add_done_callback(sending.discard)
    if sending:
        await asyncio.wait(sending, timeout=LINGER)
    return loop.time() - begun


if __name__ == "__main__":
    keep_sockets_together()
    address, count, rate, seconds = sys.argv[1:]
    uvloop.run(main(address, int(count), float(rate), float(seconds)))
