"""Whole runs with a liar among them: nothing wrong is committed, the liar is banned by proof, and nobody else is."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from support.invariants import assert_invariants
from support.liars import Fault, SpoiltLearner, liars
from support.machine import canonical
from support.runs import IntegerLearner, signed_run, small_config
from support.swarm import Swarm

from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.history import read_records
from hivegrpo.coordinator.log import LOG_FILE, EventLog
from hivegrpo.coordinator.state import State
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.faults import examine, judge, parse_proof
from hivegrpo.peer.swarm.recompute import span_auditor
from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.errors import MismatchError
from hivegrpo.protocol.history import Record, read_history
from hivegrpo.protocol.identity import Identity

VALUES = 40_000
"""Three chunks: three reducers, the first three peers in order of their ids."""

NAMES = ("a", "b", "c", "d", "e")
TIMING = {"audit": 0.3, "exchange": 2.0, "step": 4.0, "grace": 0.5}


def make_swarm(folder: Path, rate: float, versions: int = 2) -> Swarm:
    """Five peers, named in the order of their ids: a, b and c reduce."""
    config = small_config(
        run={"start_peers": len(NAMES), "versions": versions},
        grpo={"prompts_per_round": 10},
        averaging={"audit_rate": rate},
        timing=TIMING,
    )
    coordinator = Identity.generate()
    swarm = Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)
    identities = sorted((Identity.generate() for _ in NAMES), key=lambda identity: identity.peer_id)
    swarm.identities = dict(zip(NAMES, identities, strict=True))

    async def judging(proof: bytes) -> list[tuple[str, str]]:
        return await asyncio.to_thread(judge, proof, swarm.run_id)

    swarm.judge_proof = judging
    return swarm


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(bounded())


def play(swarm: Swarm, faults: Mapping[str, Fault], learners: Mapping[str, IntegerLearner] | None = None) -> None:
    """Run to the end; the honest have to come through, and a restart of the coordinator would remember the same."""

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        for name in NAMES:
            learner = (learners or {}).get(name) or IntegerLearner(VALUES)
            await swarm.start_peer(name, learner)
        await asyncio.gather(*(swarm.peers[name].task for name in NAMES if name not in faults))
        for name in faults:
            swarm.peers[name].stop.set()
        ends = await asyncio.gather(*(swarm.peers[name].task for name in faults), return_exceptions=True)
        assert all(end is None or (isinstance(end, MismatchError) and "banned" in str(end)) for end in ends)
        await coordinator.leave()

    with liars({swarm.identities[name].peer_id: fault for name, fault in faults.items()}):
        run(scenario)
    assert swarm.service is not None
    replayed = State(swarm.service.state.terms)
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)) as log:
        for event in log.replay():
            apply(replayed, event)
    assert canonical(replayed) == canonical(swarm.service.state)


def records(swarm: Swarm, kind: str) -> list[Record]:
    with closing(EventLog(swarm.coordinator_home / LOG_FILE, swarm.run_id)) as log:
        return [record for record in read_records(log) if record["kind"] == kind]


def banned(swarm: Swarm) -> dict[str, Record]:
    """Records of bans, by the name of the peer."""
    names = {identity.peer_id: name for name, identity in swarm.identities.items()}
    return {names[record["peer"]]: record for record in records(swarm, "banned")}


def kinds(swarm: Swarm) -> dict[str, str | None]:
    """What each banned peer is banned for, by its proof."""
    store = BlobStore(swarm.coordinator_home / "blobs")
    return {
        name: parse_proof(
            store.read(BlobRef(bytes.fromhex(record["proof"]["root"]), record["proof"]["size"]))
        ).WhichOneof("fault")
        for name, record in banned(swarm).items()
    }


def wrong_spans(swarm: Swarm) -> list[tuple[int, int]]:
    """Version and index of committed spans that are not what their rule gives."""
    chain = ChainFile.open(swarm.coordinator_home).chain
    recompute = span_auditor(chain, [PeerHome(swarm.peer_home(name)).contributions for name in NAMES])
    seals = {record["digest"]: record for record in records(swarm, "seal")}
    plans = {record["digest"]: record for record in records(swarm, "plan")}
    return [
        (version["version"], index)
        for version in records(swarm, "version")[1:]
        for index, span in enumerate(version["spans"])
        if (root := recompute(plans[version["plan"]], seals[version["seal"]], index)) is not None
        and root.hex() != span["root"]
    ]


def test_honest_peers_audit_every_span_and_ban_nobody(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, rate=1.0)
    play(swarm, {})
    assert_invariants(swarm)
    assert not banned(swarm)
    assert not records(swarm, "attempt_failed")
    audits = [record for name in NAMES for record in read_history(PeerHome(swarm.peer_home(name)).history)]
    made = [record for record in audits if record["kind"] == "audit"]
    assert all(record["agrees"] for record in made)
    reported = {(record["plan"], record["span"], record["peer"]) for record in records(swarm, "audit")}
    for version in records(swarm, "version")[1:]:
        for span in range(3):
            assert sum(name[:2] == (version["plan"], span) for name in reported) >= 2


@pytest.mark.parametrize(
    ("liar", "fault", "proved"),
    [
        ("b", Fault.LYING_REDUCER, "wrong_span"),
        ("b", Fault.EQUIVOCATING_REDUCER, "two_receipts"),
        ("e", Fault.BAD_CHUNK, "wrong_chunk"),
        ("b", Fault.COVERED_CHUNK, "wrong_chunk"),
        ("e", Fault.BAD_HEADER, "wrong_push"),
        ("e", Fault.FRAMING_AUDITOR, None),
        ("e", Fault.WITHHOLDING, None),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_liar_is_banned_by_proof_and_nothing_wrong_is_committed(
    tmp_path: Path, liar: str, fault: Fault, proved: str | None
) -> None:
    swarm = make_swarm(tmp_path, rate=1.0)
    spoils = fault in (Fault.BAD_CHUNK, Fault.COVERED_CHUNK)
    play(swarm, {liar: fault}, {liar: SpoiltLearner(VALUES, 1)} if spoils else {})
    assert_invariants(swarm)
    assert ChainFile.open(swarm.peer_home("a")).chain.height == 2
    assert kinds(swarm) == ({liar: proved} if proved else {})
    reasons = [record["reason"] for record in records(swarm, "attempt_failed")]
    assert all(reason.startswith("banned") for reason in reasons), "it is caught in the attempt in which it lies"


def test_an_auditor_that_covers_a_lying_reducer_is_banned_with_it(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, rate=1.0)
    play(swarm, {"a": Fault.LYING_REDUCER, "d": Fault.LYING_AUDITOR})
    assert_invariants(swarm)
    assert not wrong_spans(swarm)
    assert kinds(swarm) == {"a": "wrong_span", "d": "wrong_span"}


def test_without_audits_the_lie_is_committed(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, rate=0.0)
    play(swarm, {"b": Fault.LYING_REDUCER})
    assert wrong_spans(swarm) == [(1, 1), (2, 1)]
    assert not banned(swarm)
    assert not records(swarm, "audit")


def test_a_ban_says_where_and_why(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, rate=1.0, versions=1)
    play(swarm, {"a": Fault.LYING_REDUCER})
    (ban,) = records(swarm, "banned")
    proof = BlobStore(swarm.coordinator_home / "blobs").read(
        BlobRef(bytes.fromhex(ban["proof"]["root"]), ban["proof"]["size"])
    )
    finding = examine(proof, swarm.run_id)
    assert (finding.version, finding.attempt, finding.span) == (1, 1, 0)
    assert finding.guilty == [(swarm.identities["a"].peer_id, ban["reason"])]
    failed = records(swarm, "attempt_failed")
    assert ban["peer"] in failed[0]["reason"]
