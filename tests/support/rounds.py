"""Rounds of the real exchange among eight peers in memory, under plans and seals of a scripted coordinator.

Every round is checked against `support.reference`: the seal's norms and coefficients, the bytes of every span at every
peer, one digest a span, and the values in fp64.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hivegrpo.peer.swarm.codecs.registry import CODECS, get_codec
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.peer.swarm.exchange import Exchange, Span
from hivegrpo.peer.swarm.exchanges import ExchangeServer
from hivegrpo.peer.swarm.rules.registry import RULES
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_plan, check_seal, check_sender_report
from hivegrpo.protocol.chunks import CHUNK_VALUES, chunk_count
from hivegrpo.protocol.coefficients import coefficients, norm_bytes
from hivegrpo.protocol.envelope import Opened, open_signed, sign
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars
from hivegrpo.protocol.transport.memory import MemoryNetwork
from support import reference
from support.reference import Double, Single

PEERS = 8
RUN_ID = "ab" * 32
MOST_VALUES = 3_000_000
FIXED_SIZES = (1, 31, 32, 33, 16_383, 16_384, 16_385, MOST_VALUES)
"""Around the sizes of blocks and chunks, and the ends of the range."""

SECONDS = 60.0
"""Of an exchange; running into it fails the round."""

SCALARS = StepScalars.for_step(1, learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)


def identity(seed: str) -> Identity:
    """The same for the same seed."""
    return Identity(Ed25519PrivateKey.from_private_bytes(sha256(seed.encode()).digest()))


@dataclass(frozen=True)
class Case:
    """One round. Peers are numbers, in the order of the roster."""

    codec: str
    rule: str
    vectors: dict[int, Single]
    """What each contributor commits to."""
    weights: dict[int, int]
    spans: dict[int, range]
    """Chunks of each reducer."""
    silent: frozenset[int] = frozenset()
    """Contributors that are gone before they send anything."""
    unsent: dict[int, frozenset[int]] = field(default_factory=dict)
    """By contributor: reducers that its chunks do not reach."""

    @property
    def values(self) -> int:
        return len(next(iter(self.vectors.values())))

    @property
    def slices(self) -> list[slice]:
        """Values of each span."""
        return [slice(span.start * CHUNK_VALUES, span.stop * CHUNK_VALUES) for span in self.spans.values()]

    @property
    def sealed(self) -> list[int]:
        """Who is complete at every reducer."""
        return [peer for peer in sorted(self.vectors) if peer not in self.silent and not self.unsent.get(peer)]

    def __str__(self) -> str:
        return (
            f"{self.values} values, {self.codec}, {self.rule}, {len(self.vectors)} contributors, "
            f"{len(self.sealed)} sealed, {len(self.spans)} reducers"
        )


def draw_case(seed: int, longest: int = MOST_VALUES) -> Case:
    """A random round; the first ones have the sizes of `FIXED_SIZES`, the others log-uniform ones up to `longest`."""
    rng = np.random.default_rng(seed)
    values = int(np.exp(rng.uniform(0, np.log(longest + 1))))
    if seed < len(FIXED_SIZES):
        values = min(FIXED_SIZES[seed], longest)
    count = PEERS if rng.random() < 0.7 else int(rng.integers(1, PEERS + 1))
    roster = sorted(rng.choice(PEERS, count, replace=False).tolist())
    lost = [peer for peer in roster[1:] if rng.random() < 0.2]
    silent = frozenset(peer for peer in lost if rng.random() < 0.5)
    present = [peer for peer in roster if peer not in silent]
    chunks = chunk_count(values)
    some = int(rng.integers(1, min(len(present), chunks) + 1))
    reducers = sorted(rng.choice(present, some, replace=False).tolist())
    bounds = [0, *sorted((1 + rng.choice(chunks - 1, some - 1, replace=False)).tolist()), chunks]
    unsent = {}
    for peer in sorted(set(lost) - silent):
        if others := [reducer for reducer in reducers if reducer != peer]:
            missed = int(rng.integers(1, len(others) + 1))
            unsent[peer] = frozenset(rng.choice(others, missed, replace=False).tolist())
    scale = 10.0 ** rng.uniform(-30, 6)
    return Case(
        codec=list(CODECS)[rng.integers(len(CODECS))],
        rule=list(RULES)[rng.integers(len(RULES))],
        vectors={peer: _draw_vector(rng, values, scale) for peer in roster},
        weights={peer: int(np.exp(rng.uniform(0, np.log(1e6)))) for peer in roster},
        spans={peer: range(bounds[i], bounds[i + 1]) for i, peer in enumerate(reducers)},
        silent=silent,
        unsent=unsent,
    )


def _draw_vector(rng: np.random.Generator, values: int, scale: float) -> Single:
    """Gaussian values, some blocks of zeros, and sometimes a hundred times as large as the others'."""
    vector = rng.standard_normal(values, dtype=np.float32) * np.float32(scale * (100 if rng.random() < 0.15 else 1))
    for _ in range(int(rng.integers(3))):
        start = int(rng.integers(values))
        vector[start : start + int(rng.integers(1, 200))] = 0.0
    return vector


@dataclass(frozen=True)
class Outcome:
    """What a round came to."""

    plan: pb.RoundPlan
    seal: pb.Seal
    result: Single
    """The decoded spans, one after the other."""


class LossyDirectory(Directory):
    """A peer's way to the others; streams to those in `lost` never open."""

    def __init__(self, transport: object) -> None:
        super().__init__(transport)  # type: ignore[arg-type]
        self.lost: frozenset[str] = frozenset()

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0, lanes: int = 1):  # type: ignore[no-untyped-def]
        if peer_id in self.lost:
            await asyncio.Event().wait()
        return await super().open_stream(peer_id, name, timeout, lanes)


class Ring:
    """Eight peers that serve exchanges, and a coordinator that is nothing but a key."""

    def __init__(self) -> None:
        self.coordinator = identity("coordinator")
        self.peers = sorted((identity(f"peer {index}") for index in range(PEERS)), key=lambda each: each.peer_id)
        self.network = MemoryNetwork()
        self.transports = [self.network.join(peer) for peer in self.peers]
        self.servers = [ExchangeServer() for _ in self.peers]
        self.directories = [LossyDirectory(transport) for transport in self.transports]
        self.rounds = 0

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator["Ring"]:
        ring = cls()
        for server, transport in zip(ring.servers, ring.transports, strict=True):
            await server.start(transport)
        with ThreadPoolExecutor(max_workers=2) as ring.worker:
            try:
                yield ring
            finally:
                for transport in ring.transports:
                    await transport.close()

    async def play(self, case: Case) -> Outcome:
        """One round, checked; AssertionError says what differs from the reference."""
        self.rounds += 1
        own = {peer: EncodedVector.encode(get_codec(case.codec), _tensor(case.vectors[peer])) for peer in case.vectors}
        for peer, encoded in own.items():
            assert list(encoded.chunks) == reference.encode_vector(case.codec, case.vectors[peer])
            assert encoded.root == reference.chunks_root(encoded.chunks)
        plan = self._sign(self._plan(case, own), pb.RoundPlan)
        check_plan(plan.message)
        exchanges = await self._begin(case, plan, own)
        reports = await self._push(case, exchanges)
        seal = self._sign(self._seal(case, plan, reports), pb.Seal)
        check_seal(seal.message, plan.message)
        spans = await asyncio.gather(*(exchange.collect(seal) for exchange in exchanges.values()))
        decoded = {peer: _decode(case, own[peer].chunks) for peer in case.sealed}
        self._check_seal(case, seal.message, decoded)
        return Outcome(plan.message, seal.message, _check_spans(case, seal.message, decoded, spans))

    def _plan(self, case: Case, own: dict[int, EncodedVector]) -> pb.RoundPlan:
        return pb.RoundPlan(
            version=self.rounds,
            parent=bytes(32),
            attempt=1,
            codec=case.codec,
            rule=case.rule,
            values=case.values,
            contributors=[
                pb.Contributor(
                    peer=self.peers[peer].peer_id, lease=1 + peer, weight=case.weights[peer], root=own[peer].root
                )
                for peer in sorted(own)
            ],
            reducers=[
                pb.Reducer(
                    peer=self.peers[peer].peer_id,
                    addresses=self.transports[peer].addresses(),
                    first=span.start,
                    chunks=len(span),
                )
                for peer, span in case.spans.items()
            ],
            scalars=SCALARS.to_bits(),
            exchange_seconds=SECONDS,
            step_seconds=SECONDS,
            audit_seconds=SECONDS,
        )

    async def _begin(
        self, case: Case, plan: Opened[pb.RoundPlan], own: dict[int, EncodedVector]
    ) -> dict[int, Exchange]:
        exchanges = {}
        for peer in own.keys() - case.silent:
            self.directories[peer].lost = frozenset(self.peers[r].peer_id for r in case.unsent.get(peer, ()))
            exchanges[peer] = Exchange(
                plan,
                own[peer],
                identity=self.peers[peer],
                run_id=RUN_ID,
                directory=self.directories[peer],
                worker=self.worker,
            )
            await self.servers[peer].add(exchanges[peer])
        return exchanges

    async def _push(self, case: Case, exchanges: dict[int, Exchange]) -> list[pb.SenderReport]:
        """The reducers' reports, once all chunks have come that will come."""
        expected = {
            reducer: {peer for peer in exchanges if peer == reducer or reducer not in case.unsent.get(peer, ())}
            for reducer in case.spans
        }
        pushing = [asyncio.create_task(exchange.push()) for exchange in exchanges.values()]
        try:
            if len(case.sealed) == len(case.vectors):
                return [await self._gather(exchanges[reducer]) for reducer in case.spans]
            return [await self._until(exchanges[reducer], expected[reducer]) for reducer in case.spans]
        finally:
            for peer, task in zip(exchanges, pushing, strict=True):
                if not case.unsent.get(peer):
                    await task
                task.cancel()
            await asyncio.gather(*pushing, return_exceptions=True)
            for directory in self.directories:
                directory.lost = frozenset()

    async def _gather(self, exchange: Exchange) -> pb.SenderReport:
        report = await exchange.gather()
        assert report is not None
        check_sender_report(report, {item.peer for item in exchange.plan.message.contributors})
        return report

    async def _until(self, exchange: Exchange, expected: set[int]) -> pb.SenderReport:
        """A report once those that are expected are complete, as at the end of the time for the exchange."""
        names = {self.peers[peer].peer_id for peer in expected}
        assert exchange.reducer is not None
        async with asyncio.timeout(SECONDS):
            while True:
                report = exchange.reducer.report()
                if names <= {item.peer for item in report.complete}:
                    break
                await asyncio.sleep(0.001)  # nothing tells of single senders
        check_sender_report(report, {item.peer for item in exchange.plan.message.contributors})
        return report

    def _seal(self, case: Case, plan: Opened[pb.RoundPlan], reports: Sequence[pb.SenderReport]) -> pb.Seal:
        norms = [
            {item.peer: int.from_bytes(item.norm_squared, "big") for item in report.complete} for report in reports
        ]
        complete = set.intersection(*(set(each) for each in norms))
        sealed = [peer for peer in sorted(case.vectors) if self.peers[peer].peer_id in complete]
        assert sealed == case.sealed
        totals = [sum(each[self.peers[peer].peer_id] for each in norms) for peer in case.sealed]
        bits = coefficients(case.rule, [case.weights[peer] for peer in case.sealed], totals)
        return pb.Seal(
            plan=plan.digest,
            contributors=[
                pb.Sealed(peer=self.peers[peer].peer_id, coefficient=bit, norm_squared=norm_bytes(total))
                for peer, bit, total in zip(case.sealed, bits, totals, strict=True)
            ],
        )

    def _check_seal(self, case: Case, seal: pb.Seal, decoded: dict[int, Single]) -> None:
        norms = [reference.norm_squared(decoded[peer]) for peer in case.sealed]
        assert [int.from_bytes(item.norm_squared, "big") for item in seal.contributors] == norms
        weights = [case.weights[peer] for peer in case.sealed]
        assert [item.coefficient for item in seal.contributors] == reference.coefficients(case.rule, weights, norms)

    def _sign(self, message, kind):  # type: ignore[no-untyped-def]
        signed = sign(self.coordinator, RUN_ID, message)
        return open_signed(signed, RUN_ID, kind, signer=self.coordinator.peer_id)


def _check_spans(case: Case, seal: pb.Seal, decoded: dict[int, Single], spans: Sequence[list[Span]]) -> Single:
    bits = [item.coefficient for item in seal.contributors]
    vectors = [decoded[peer] for peer in case.sealed]
    chunks = reference.encode_vector(case.codec, reference.reduce_vectors(case.rule, vectors, bits, case.slices))
    for index, run in enumerate(case.spans.values()):
        data = b"".join(chunks[run.start : run.stop])
        assert {each[index].data for each in spans} == {data}, f"span {index}"
        assert {each[index].content.root for each in spans} == {reference.span_root(data)}, f"digest {index}"
    result = reference.decode_vector(case.codec, chunks, case.values)
    exact, slack = reference.reduce_doubles(case.rule, vectors, bits, case.slices)
    bound = slack + reference.rounding_error(case.codec, _widened(exact, slack))
    assert (np.abs(result - exact) <= bound).all(), f"off by {np.max(np.abs(result - exact) - bound)}"
    return result


def _widened(exact: Double, slack: Double) -> Double:
    """The largest magnitudes that may have been encoded."""
    return np.abs(exact) + slack


def _decode(case: Case, chunks: Sequence[bytes]) -> Single:
    return reference.decode_vector(case.codec, chunks, case.values)


def _tensor(vector: Single) -> torch.Tensor:
    return torch.from_numpy(vector.copy())
