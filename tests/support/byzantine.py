"""A peer that runs the real code and lies on the wire: everything it says goes through `ByzantineTransport`.

`Swarm.start_peer(name, learner, wrap=byzantine(swarm, name, Fault.HEAVY_WEIGHT))` starts one.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message

from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.learn.learner import LearnedContribution
from hivegrpo.peer.swarm.codecs.registry import get_codec
from hivegrpo.peer.swarm.contribution import ContributionStore, EncodedVector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.envelope import parse, sign, sign_payload
from hivegrpo.protocol.errors import WireError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import (
    MAX_CALL_BYTES,
    MAX_FRAME_BYTES,
    CallHandler,
    Stream,
    StreamHandler,
    Transport,
)
from hivegrpo.protocol.transport.frames import FramedStream
from support.runs import IntegerLearner, vector_of
from support.swarm import Swarm

Send = Callable[..., Awaitable[None]]

OTHER_RUN = "ee" * 32
FLOOD_FRAMES = 2000
"""Frames of a stream without an end; more than any reader of this protocol takes from one stream."""


class Fault(Enum):
    """What a byzantine peer does; all else it does as an honest one would."""

    HEAVY_WEIGHT = "weight 1e6"
    NEGATIVE_WEIGHT = "weight -1"
    ZERO_WEIGHT = "weight 0 for groups it used"
    NAN_METRIC = "a metric that is NaN"
    NAN_VALUE = "a NaN in a committed chunk"
    INFINITE_VALUE = "an infinity in a committed chunk"
    WRONG_CHUNK = "a chunk with one bit changed"
    SHORT_CHUNK = "a chunk that lacks a value"
    LONG_CHUNK = "a chunk with a value more"
    REPEATED_CHUNK = "one chunk in the place of all"
    FEW_CHUNKS = "all chunks but the last"
    ENDLESS_STREAM = "chunks without an end"
    ONE_BYTE_A_SECOND = "1 byte a second"
    BANDWIDTH_LIE = "impossible speeds in its report"
    REPLAYED_CONTRIBUTION = "the last version's contribution again"
    REPLAYED_PUSH = "the last version's pushes again"
    REPLAYED_REPORT = "the last version's reports and votes again"
    FORGED_PLANS = "forged and unsigned plans, seals and leases"
    OTHER_TYPE = "a signature of another type"
    OTHER_RUN = "a signature of another run"
    GARBAGE = "garbage to every handler"


def gradient_of(lease: int, values: int) -> torch.Tensor:
    """A gradient that depends on the lease alone, and no two chunks of which are alike; exact in fp32."""
    return vector_of(lease, values) + torch.arange(values).div(CHUNK_VALUES, rounding_mode="floor") / 8


class ChunkedLearner(IntegerLearner):
    """Takes `gradient_of` for a gradient."""

    def contribute(self, lease: int, *args: Any) -> LearnedContribution:
        return replace(super().contribute(lease, *args), vector=gradient_of(lease, self.values))


class ByzantineTransport(Transport):
    """A transport with a fault, around a real one."""

    def __init__(
        self,
        inner: Transport,
        identity: Identity,
        run_id: str,
        fault: Fault,
        *,
        poison: Callable[[pb.Contribution], bytes],
        victims: Callable[[], list[str]],
        coordinator: str,
        chunk_bytes: int,
    ) -> None:
        """`poison` commits to other chunks than the learner's, and gives their root; `victims` are the others.

        `chunk_bytes`: of a whole chunk, encoded.
        """
        self._inner = inner
        self._identity = identity
        self._run_id = run_id
        self._fault = fault
        self._poison = poison
        self._victims = victims
        self._coordinator = coordinator
        self._chunk_bytes = chunk_bytes
        self._recorded: dict[str, Any] = {}
        self._thrown = False
        self._flood: asyncio.Task[None] | None = None
        self.refusals: list[str] = []
        """Reasons that the coordinator gave."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def addresses(self) -> list[str]:
        return self._inner.addresses()

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        return await self._inner.connect(addresses, timeout)

    async def probe(self, addresses: list[str], timeout: float = 3.0) -> bool:
        return await self._inner.probe(addresses, timeout)

    async def serve_call(self, name: str, handler: CallHandler) -> None:
        await self._inner.serve_call(name, handler)

    async def serve_stream(self, name: str, handler: StreamHandler, max_per_peer: int = 8, lanes: bool = False) -> None:
        await self._inner.serve_stream(name, handler, max_per_peer, lanes)

    async def announce(self, key: str, value: bytes, ttl: float) -> None:
        await self._inner.announce(key, value, ttl)

    async def find(self, key: str, timeout: float = 5.0) -> dict[str, bytes]:
        return await self._inner.find(key, timeout)

    async def close(self) -> None:
        if self._flood is not None:
            self._flood.cancel()
            await asyncio.gather(self._flood, return_exceptions=True)
        await self._inner.close()

    async def call(self, peer_id: str, name: str, request: bytes, timeout: float = 10.0) -> bytes:
        """A report, as the fault has it."""
        signed = parse(pb.Signed, request)
        if signed.type == "Contribution" and self._fault in (Fault.FORGED_PLANS, Fault.GARBAGE) and not self._thrown:
            self._thrown = True
            self._flood = asyncio.create_task(self._throw())
            await asyncio.wait([self._flood], timeout=10)
        answer = await self._inner.call(peer_id, name, self._lie(signed), timeout)
        if signed.type != "Heartbeat" and not (ack := parse(pb.Ack, answer)).accepted:
            self.refusals.append(ack.reason)
        return answer

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1) -> Stream:
        stream = await self._inner.open_stream(peer_id, name, timeout)  # one lane: the faults write to it directly
        if name == "push" and (change := self._push_fault()) is not None:
            assert isinstance(stream, FramedStream)
            change(stream)
        return stream

    def _lie(self, signed: pb.Signed) -> bytes:
        """What is sent in the place of a report."""
        kind: type[Message] = getattr(pb, signed.type)
        message: Any = parse(kind, signed.payload)
        fault = self._fault
        if signed.type == "Contribution":
            match fault:
                case Fault.HEAVY_WEIGHT:
                    message.weight = 10**6
                case Fault.NEGATIVE_WEIGHT:
                    message.weight = 2**64 - 1  # what -1 is as a varint
                case Fault.ZERO_WEIGHT:
                    message.weight = 0
                case Fault.NAN_METRIC:
                    message.metrics["reward"] = math.nan
                case Fault.NAN_VALUE | Fault.INFINITE_VALUE:
                    message.root = self._poison(message)
                case Fault.OTHER_TYPE:
                    forged = sign_payload(self._identity, self._run_id, "StepReport", signed.payload)
                    signed = pb.Signed(**_fields(forged) | {"type": "Contribution"})
                    return signed.SerializeToString()
                case Fault.OTHER_RUN:
                    return sign(self._identity, OTHER_RUN, message).SerializeToString()
        if signed.type == "SenderReport" and fault is Fault.BANDWIDTH_LIE:
            for complete in message.complete:
                complete.seconds = math.nan
        replayed = {
            Fault.REPLAYED_CONTRIBUTION: ("Contribution",),
            Fault.REPLAYED_REPORT: ("SenderReport", "StepReport"),
        }
        if signed.type in replayed.get(fault, ()):
            return self._recorded.setdefault(
                signed.type, sign(self._identity, self._run_id, message).SerializeToString()
            )
        return sign(self._identity, self._run_id, message).SerializeToString()

    def _push_fault(self) -> Callable[[FramedStream], None] | None:
        changes: dict[Fault, Callable[[FramedStream], None]] = {
            Fault.WRONG_CHUNK: _on_frame(2, lambda stream, send, frame: send(bytes([frame[0] ^ 1]) + frame[1:])),
            Fault.SHORT_CHUNK: _on_frame(2, lambda stream, send, frame: send(frame[:-4])),
            Fault.LONG_CHUNK: _on_frame(2, lambda stream, send, frame: send(frame + bytes(4))),
            Fault.REPEATED_CHUNK: _on_frame(None, self._repeat),
            Fault.FEW_CHUNKS: _without_the_last,
            Fault.ENDLESS_STREAM: _on_frame(2, _without_end),
            Fault.ONE_BYTE_A_SECOND: _on_frame(2, _slowly),
            Fault.REPLAYED_PUSH: self._replay,
        }
        return changes.get(self._fault)

    async def _repeat(self, _: FramedStream, send: Send, frame: bytes) -> None:
        await send(frame[: self._chunk_bytes] * (len(frame) // self._chunk_bytes) or frame)

    def _replay(self, stream: FramedStream) -> None:
        """Send what was sent to this reducer for the first version."""
        send, frames, recorded = stream.send, 0, self._recorded.get(stream.remote)
        heard: list[bytes] = []
        if recorded is None:
            self._recorded[stream.remote] = heard

        async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
            nonlocal frames
            heard.append(bytes(frame))
            if recorded is None:
                await send(frame, timeout)
            elif frames < len(recorded):
                await send(recorded[frames], timeout)
            frames += 1

        stream.send = sending  # type: ignore[method-assign]  # the fault

    async def _throw(self) -> None:
        """Everything that is not welcome, to every handler of everybody, one after the other."""
        forged = list(self._forged() if self._fault is Fault.FORGED_PLANS else _garbage())
        with suppress(WireError):
            for frame in forged:
                await self._inner.call(self._coordinator, "report", frame)
        for name in ("follow", "chain", "blob"):
            await self._throw_at(self._coordinator, name, forged)
        for peer in self._victims():
            for name in ("push", "push/lane", "span", "pull", "blob", "chain", "follow"):
                await self._throw_at(peer, name, forged)

    async def _throw_at(self, peer: str, name: str, frames: list[bytes]) -> None:
        for frame in frames:
            with suppress(WireError):
                async with await self._inner.open_stream(peer, name) as stream:
                    await stream.send(frame)
                    while True:
                        await stream.receive(MAX_FRAME_BYTES, timeout=0.2)

    def _forged(self) -> Iterator[bytes]:
        """A plan, a seal and a lease that give this peer everything: in its own name, the coordinator's, nobody's."""
        plan = pb.RoundPlan(version=1, attempt=99, contributors=[pb.Contributor(peer=self.peer_id, weight=1)])
        seal = pb.Seal(plan=bytes(32), contributors=[pb.Sealed(peer=self.peer_id, coefficient=0x3F800000)])
        for message in (plan, seal, pb.Lease(id=1, peer=self.peer_id, count=1, wanted=1, max_weight=10**6)):
            own = sign(self._identity, self._run_id, message)
            yield own.SerializeToString()
            yield pb.Signed(**_fields(own) | {"signer": self._coordinator}).SerializeToString()
            yield pb.Signed(**_fields(own) | {"signer": self._coordinator, "signature": b""}).SerializeToString()


def byzantine(swarm: Swarm, name: str, fault: Fault) -> Callable[[Transport], Transport]:
    """The `wrap` of a peer of `swarm` that has this fault."""

    def wrap(transport: Transport) -> Transport:
        identity = swarm.identities[name]

        def poison(contribution: pb.Contribution) -> bytes:
            bits = 0x7FC00000 if fault is Fault.NAN_VALUE else 0x7F800000
            return poisoned(swarm, swarm.peer_home(name), contribution, bits)

        return ByzantineTransport(
            transport,
            identity,
            swarm.run_id,
            fault,
            poison=poison,
            victims=lambda: [node.identity.peer_id for other, node in swarm.peers.items() if other != name],
            coordinator=swarm.coordinator_identity.peer_id,
            chunk_bytes=get_codec(swarm.config.averaging.codec).encoded_size(CHUNK_VALUES),
        )

    return wrap


def poisoned(swarm: Swarm, home: Path, contribution: pb.Contribution, bits: int) -> bytes:
    """The root of the lease's contribution with one value replaced by `bits`, which is put where the peer looks."""
    codec = get_codec("fp32")
    assert swarm.config.averaging.codec == codec.name, "only fp32 has a code for any value"
    manifest = parse(pb.RunManifest, swarm.run.payload)
    values = sum(math.prod(tensor.shape) for tensor in manifest.layout)
    honest = EncodedVector.encode(codec, gradient_of(contribution.lease, values))
    first = bytearray(honest.chunks[0])
    first[:4] = bits.to_bytes(4, "little")
    changed = EncodedVector((bytes(first), *honest.chunks[1:]))
    ContributionStore(PeerHome(home).contributions, codec, values, keep=100).add(contribution.version, changed)
    return changed.root


def _on_frame(
    number: int | None, fault: Callable[[FramedStream, Send, bytes], Awaitable[None]]
) -> Callable[[FramedStream], None]:
    """`fault` sends in the place of frame `number` of a stream (1 is the header), or of all but the header."""

    def change(stream: FramedStream) -> None:
        send, frames = stream.send, 0

        async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
            nonlocal frames
            frames += 1
            if frames == number or (number is None and frames > 1):
                await fault(stream, send, bytes(frame))
            else:
                await send(frame, timeout)

        stream.send = sending  # type: ignore[method-assign]  # the fault

    return change


def _without_the_last(stream: FramedStream) -> None:
    """Two frames behind, so that the last chunks are never sent, nor the request for the span after them."""
    send, held = stream.send, list[bytes]()

    async def sending(frame: bytes | memoryview, timeout: float | None = 30.0) -> None:
        held.append(bytes(frame))
        if len(held) == 3:
            await send(held.pop(0), timeout)

    stream.send = sending  # type: ignore[method-assign]  # the fault


async def _without_end(_: FramedStream, send: Send, frame: bytes) -> None:
    for _number in range(FLOOD_FRAMES):
        await send(bytes(len(frame)))


async def _slowly(stream: FramedStream, _: Send, frame: bytes) -> None:
    for byte in len(frame).to_bytes(4, "big") + frame:
        stream._writer.write(bytes([byte]))
        await asyncio.sleep(1)
        if not stream.usable:
            return


def _garbage() -> Iterator[bytes]:
    yield b""
    yield b"\xff" * 40
    yield bytes(5000)
    yield bytes(MAX_CALL_BYTES)


def _fields(message: Message) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
