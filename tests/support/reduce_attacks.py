"""Attacks by reducing and auditing: peers that are in order on the wire, and sign what is not so (`support.liars`)."""

import asyncio
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from structlog.testing import capture_logs

from hivegrpo.peer.swarm.faults import judge
from hivegrpo.protocol.identity import Identity
from support.byzantine import ChunkedLearner
from support.liars import Fault, liars
from support.runs import signed_run, small_config
from support.swarm import Swarm
from support.wire_attacks import VALUES, Seen, judge_run, named

BANNED = {Fault.LYING_REDUCER, Fault.EQUIVOCATING_REDUCER, Fault.BAD_HEADER}
"""Faults that leave a proof."""

VERSIONS = 2
_rate = 1.0


@contextmanager
def without_audits() -> Iterator[None]:
    """Runs of `attack` draw no auditors."""
    global _rate
    _rate = 0.0
    try:
        yield
    finally:
        _rate = 1.0


def attack(folder: Path, peers: int, fault: Fault, count: int, seconds: float) -> Seen:
    """A run in which every span is audited, and the last `count` peers lie."""
    config = small_config(
        run={"start_peers": peers, "versions": VERSIONS},
        grpo={"prompts_per_round": 4 * peers},
        averaging={"audit_rate": _rate},
        timing={"lease": 10.0, "audit": 1.0, "exchange": 4.0, "step": 8.0, "grace": 1.0},
    )
    coordinator = Identity.generate()
    swarm = Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)

    async def judging(proof: bytes) -> list[tuple[str, str]]:
        return await asyncio.to_thread(judge, proof, swarm.run_id)

    swarm.judge_proof = judging
    names = [f"honest {index}" for index in range(peers - count)]
    liar_names = [f"liar {index}" for index in range(count)]
    swarm.identities = {name: Identity.generate() for name in (*names, *liar_names)}
    seen = Seen((), peers)
    with capture_logs() as logs, liars({swarm.identities[name].peer_id: fault for name in liar_names}):
        tracemalloc.start()
        try:
            asyncio.run(_run(swarm, names, seen, seconds))
            seen.memory = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    judge_run(swarm, [], {}, seen)
    for name, key in swarm.identities.items():
        where = named(swarm, key.peer_id, logs)
        if name in liar_names:
            seen.named[name] = sorted(where)
            if fault in BANNED and "banned by proof" not in where:
                seen.wrong.append(f"{name} is not banned")
        elif "banned by proof" in where:
            seen.wrong.append(f"{name} is banned")
    return seen


async def _run(swarm: Swarm, honest: list[str], seen: Seen, seconds: float) -> None:
    coordinator = await swarm.start_coordinator()
    for name in swarm.identities:
        await swarm.start_peer(name, ChunkedLearner(VALUES))
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(swarm.peers[name].task for name in honest))
    except TimeoutError:
        seen.wrong.append(f"no version {VERSIONS} within {seconds:.0f} s")
    for node in swarm.peers.values():
        if not node.task.done():
            await swarm.crash(node)
    await swarm.crash(coordinator)
    await asyncio.gather(*(node.task for node in swarm.peers.values()), return_exceptions=True)
