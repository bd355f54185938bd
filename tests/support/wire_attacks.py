"""Attacks against the wire: real coordinator, real peers, some of them byzantine; and what came of it.

Whatever the byzantine do, each version has to be the rule over the contributions that honest peers committed to, to
the last bit, by `support.reference`; those who do it have to be named. `attack` runs one and says what it saw;
`defence_off` gives the same run without the check that holds the attack off.
"""

import asyncio
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from structlog.testing import capture_logs

from hivegrpo.coordinator import reports, service
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm import exchange, exchanges, reducer
from hivegrpo.peer.swarm.codecs.float32 import Float32
from hivegrpo.protocol import checks
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.history import Record, read_history
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invariants import check
from support import reference
from support.byzantine import ChunkedLearner, Fault, byzantine, gradient_of
from support.runs import signed_run, small_config
from support.swarm import Swarm

VALUES = 10 * CHUNK_VALUES
"""Whole chunks, so that one fits in the place of another; and every one of eight peers reduces a span."""

MEMORY_BOUND = 64 << 20
"""Bytes that a whole swarm in one process may have allocated at once, beyond what it had before the run."""

SECONDS = 60.0
"""Of a run; a run that has not made its versions by then is ruined."""

CONTROL_SECONDS = 15.0
"""The same for runs with a defence off, which may never end; undisturbed ones take less than half of it."""

REPLAYS = (Fault.REPLAYED_CONTRIBUTION, Fault.REPLAYED_PUSH, Fault.REPLAYED_REPORT)
HARMLESS = (Fault.BANDWIDTH_LIE, Fault.REPLAYED_REPORT, Fault.FORGED_PLANS, Fault.GARBAGE)
"""Faults beside a contribution that is in order; it may count."""


@dataclass
class Seen:
    """What one run came to."""

    faults: tuple[Fault, ...]
    peers: int
    versions: int = 0
    wrong: list[str] = field(default_factory=list)
    """What is not as it should be; empty for a run that the attack did not hurt."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """By byzantine peer: where it is named."""
    memory: int = 0
    """Bytes allocated at the worst moment, beyond those before the run, of all peers together."""


def make_swarm(folder: Path, peers: int, faults: Sequence[Fault], pace: float) -> Swarm:
    config = small_config(
        run={"start_peers": peers, "versions": 2 if set(faults) & set(REPLAYS) else 1},
        grpo={"prompts_per_round": 4 * peers},
        averaging={"codec": "fp32" if set(faults) & FP32_ONLY else "mxint8"},
        timing={"lease": 2.0 * pace, "exchange": 1.5 * pace, "step": 10.0},
    )
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


FP32_ONLY = {Fault.NAN_VALUE, Fault.INFINITE_VALUE, Fault.SHORT_CHUNK, Fault.LONG_CHUNK}
"""fp32 has a code for any value, and chunks whose length does not give the number of their values away."""


def attack(folder: Path, peers: int, faults: Sequence[Fault], seconds: float = SECONDS, *, pace: float = 1.0) -> Seen:
    """A run of `peers` peers, the last ones of which have the faults.

    `pace` stretches the times that a round has, for machines on which even the honest may need long.
    """
    swarm = make_swarm(folder, peers, faults, pace)
    seen = Seen(tuple(faults), peers)
    names = [f"honest {index}" for index in range(peers - len(faults))]
    liars = {f"byzantine {index}": fault for index, fault in enumerate(faults)}
    with capture_logs() as logs:
        tracemalloc.start()
        try:
            asyncio.run(_run(swarm, names, liars, seen, seconds))
            seen.memory = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    if seen.memory > MEMORY_BOUND:
        seen.wrong.append(f"{seen.memory >> 20} MiB were allocated")
    unwelcome = {swarm.identities[name].peer_id: _unwelcome_from(fault) for name, fault in liars.items()}
    judge_run(swarm, names, unwelcome, seen)
    for name in liars:
        seen.named[name] = sorted(named(swarm, swarm.identities[name].peer_id, logs))
    return seen


def _unwelcome_from(fault: Fault) -> float:
    """The first version that must not have the contribution of a peer with this fault."""
    return np.inf if fault in HARMLESS else 2 if fault in REPLAYS else 1


async def _run(swarm: Swarm, honest: list[str], liars: dict[str, Fault], seen: Seen, seconds: float) -> None:
    coordinator = await swarm.start_coordinator()
    for name in honest:
        await swarm.start_peer(name, ChunkedLearner(VALUES))
    for name, fault in liars.items():
        swarm.identities[name] = Identity.generate()
        await swarm.start_peer(name, ChunkedLearner(VALUES), byzantine(swarm, name, fault))
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(swarm.peers[name].task for name in honest))
    except TimeoutError:
        seen.wrong.append(f"no version {swarm.config.run.versions} within {seconds:.0f} s")
    except Exception as error:  # noqa: BLE001 - whatever it is, it ruined the run
        seen.wrong.append(f"an honest peer ended with {type(error).__name__}: {error}")
    if coordinator.task.done():
        seen.wrong.append(f"the coordinator ended with {coordinator.task.exception()!r}")
    for node in swarm.peers.values():
        await swarm.crash(node) if not node.task.done() else None
    await swarm.crash(coordinator)
    await asyncio.gather(*(node.transport.close() for node in swarm.peers.values()), return_exceptions=True)


def judge_run(swarm: Swarm, honest: Sequence[str], unwelcome: Mapping[str, float], seen: Seen) -> None:
    """Add to `seen` whatever the run's versions and histories should not have."""
    chain = ChainFile.open(swarm.coordinator_home).chain
    seen.versions = chain.height
    for entry in chain.entries[1:]:
        assert entry.plan is not None
        assert entry.seal is not None
        plan, seal, manifest = entry.plan.message, entry.seal.message, entry.manifest.message
        sealed = {item.peer for item in seal.contributors}
        for name in honest:
            if swarm.identities[name].peer_id not in sealed:
                seen.wrong.append(f"version {manifest.version} is without {name}")
        for peer in sealed & unwelcome.keys():
            # The only reducer of an attempt takes its own chunks as it committed to them: nothing crosses the wire.
            alone = all(reducer.peer == peer for reducer in plan.reducers)
            if manifest.version >= unwelcome[peer] and not alone:
                share = _share(plan, peer, sealed)
                seen.wrong.append(f"version {manifest.version} has the attacker's contribution, {share:.0%} of it")
        if not np.isfinite(list(manifest.metrics.values())).all():
            seen.wrong.append(f"version {manifest.version} has a metric that is not finite")
        if [span.root for span in manifest.spans] != _expected(swarm, plan, seal):
            seen.wrong.append(f"version {manifest.version} is not the rule over what was committed")
    homes = {name: PeerHome(swarm.peer_home(name)) for name in honest}
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, chain.run_id)) as log:
        records = list(read_records(log))
    for record in records:
        if record["kind"] == "contribution" and record["used"] and not record["weight"]:
            seen.wrong.append("prompts are spent for a contribution without weight")
    violations = check(iter(records), {name: read_history(home.history) for name, home in homes.items()}, None)
    seen.wrong.extend(str(violation) for violation in violations)


def _share(plan: pb.RoundPlan, peer: str, sealed: set[str]) -> float:
    weights = {item.peer: item.weight for item in plan.contributors if item.peer in sealed}
    return weights[peer] / sum(weights.values())


def _expected(swarm: Swarm, plan: pb.RoundPlan, seal: pb.Seal) -> list[bytes]:
    """The roots that a version's spans have to have, from what honest work under the sealed leases yields."""
    leases = {item.peer: item for item in plan.contributors}
    vectors, weights = [], []
    for item in seal.contributors:
        vector = gradient_of(leases[item.peer].lease, plan.values).numpy()
        vectors.append(reference.decode_vector(plan.codec, reference.encode_vector(plan.codec, vector), plan.values))
        weights.append(leases[item.peer].weight)
    norms = [reference.norm_squared(vector) for vector in vectors]
    spans = [slice(span.first * CHUNK_VALUES, (span.first + span.chunks) * CHUNK_VALUES) for span in plan.reducers]
    result = reference.reduce_vectors(plan.rule, vectors, reference.coefficients(plan.rule, weights, norms), spans)
    chunks = reference.encode_vector(plan.codec, result)
    return [reference.span_root(b"".join(chunks[span.first : span.first + span.chunks])) for span in plan.reducers]


def named(swarm: Swarm, peer: str, logs: Sequence[Any]) -> set[str]:
    """Where somebody who looks for the culprit finds it."""
    found = {f"log: {entry['error']}" for entry in logs if entry["event"] == "rejected" and entry["peer"] == peer}
    leases: dict[int, str] = {}
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)) as log:
        for record in read_records(log):
            found |= _named_in(record, peer, leases)
    return found


def _named_in(record: Record, peer: str, leases: dict[int, str]) -> set[str]:
    match record["kind"]:
        case "lease":
            leases[record["lease"]] = record["peer"]
        case "lease_expired" if leases[record["lease"]] == peer:
            return {"lease expired"}
        case "contribution_rejected" if record["peer"] == peer:
            return {"contribution rejected"}
        case "senders" if peer in record["refused"]:
            return {"a reducer's report"}
        case "banned" if record["peer"] == peer:
            return {"banned by proof"}
    return set()


def defence_off(fault: Fault) -> ExitStack | None:
    """The run's checks without those that hold this fault off; None if there is no single one to leave out."""
    patches = DEFENCES.get(fault)
    if patches is None:
        return None
    stack = ExitStack()
    for target, name, replacement in patches:
        stack.enter_context(patch.object(target, name, replacement))
    return stack


def _nothing(*_: Any, **__: Any) -> None:
    """A check that is left out."""


def _any_values(self: Float32, data: bytes, values: int, count: int = 1) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def _norm_of_anything(self: Float32, data: bytes, values: int, count: int = 1) -> int:
    return reference.norm_squared(np.nan_to_num(np.frombuffer(data, "<f4"), nan=1.0, posinf=1.0))


async def _any_frame(stream: Any, size: int, timeout: float | None = None) -> bytes:
    return bytes(await stream.receive(2 << 20, timeout=10.0))


async def _whatever_comes(self: reducer.SpanReducer, stream: Any, header: Any) -> None:
    """Buffers until what was announced is there."""
    data, chunks = bytearray(), list[bytes]()
    ends = list(accumulate(self.layout.sizes))
    while len(data) != ends[-1] or reference.chunks_root(chunks) != header.message.content:
        data += await stream.receive(2 << 20, timeout=10.0)
        chunks = [bytes(data[start:end]) for start, end in pairwise([0, *ends])]
    await self.take(header.signer, chunks, header.message)


async def _wait_for_all(self: exchange.Exchange) -> pb.SenderReport | None:
    """However long it takes."""
    if self.reducer is None:
        return None
    await self.reducer.all_complete.wait()
    return self.reducer.report()


async def _any_plan(self: exchanges.ExchangeServer, plan: bytes, patience: float = 5.0) -> exchange.Exchange:
    return list(self._exchanges.values())[-1]


UNCOMMITTED = [
    (reducer, "check_range", _nothing),
    (reducer, "merkle_root", lambda leaves: _Anything()),
]
UNMEASURED = [
    (Float32, "decode", _any_values),
    (Float32, "norm_squared", _norm_of_anything),
    (Float32, "check_size", lambda self, data, values, count=1: len(data) // count),
]
ANY_SIZE = [*UNCOMMITTED, *UNMEASURED, (reducer, "receive_frame", _any_frame)]


class _Anything(bytes):
    """Differs from nothing."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


DEFENCES: dict[Fault, list[tuple[Any, str, Callable[..., Any]]]] = {
    Fault.HEAVY_WEIGHT: [(reports, "check_contribution", _nothing)],
    Fault.NEGATIVE_WEIGHT: [(reports, "check_contribution", _nothing)],
    Fault.ZERO_WEIGHT: [(reports, "check_contribution", _nothing)],
    Fault.NAN_METRIC: [(checks, "check_metrics", _nothing)],
    Fault.NAN_VALUE: UNMEASURED,
    Fault.INFINITE_VALUE: UNMEASURED,
    Fault.WRONG_CHUNK: UNCOMMITTED,
    Fault.SHORT_CHUNK: ANY_SIZE,
    Fault.LONG_CHUNK: ANY_SIZE,
    Fault.FEW_CHUNKS: [(exchange.Exchange, "gather", _wait_for_all)],
    Fault.ONE_BYTE_A_SECOND: [(exchange.Exchange, "gather", _wait_for_all)],
    Fault.ENDLESS_STREAM: [(reducer.SpanReducer, "receive", _whatever_comes)],
    Fault.REPEATED_CHUNK: UNCOMMITTED,
    Fault.OTHER_TYPE: [(service, "judge", partial(service.judge, verify=_nothing))],
    Fault.OTHER_RUN: [(service, "judge", partial(service.judge, verify=_nothing))],
    Fault.REPLAYED_PUSH: [*UNCOMMITTED, (exchanges.ExchangeServer, "_find", _any_plan)],
}
