"""Where the coordinator judges proofs: what it takes, from whom, and whom it bans."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.evidence import Evidence
from support.machine import make_config

from hivegrpo.coordinator.apply import apply
from hivegrpo.coordinator.bench import MAX_FALSE, Bench
from hivegrpo.coordinator.events import PeerBanned, PeerJoined
from hivegrpo.coordinator.round import Attempt, Audit
from hivegrpo.coordinator.state import State, Terms
from hivegrpo.peer.swarm.faults import judge
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import MAX_PROOF_BYTES
from hivegrpo.protocol.blobs import BlobRef, blob_ref
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.blobstream import serve_blobs
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.errors import FrameError
from hivegrpo.protocol.transport.memory import MemoryNetwork

CASE = Evidence()
LIE = CASE.wrong_span()
HOLDS = LIE.SerializeToString(deterministic=True)
SHOWS_NOTHING = CASE.accuse_honest_span().SerializeToString(deterministic=True)
REPORTER = CASE.keys[2]


class Court:
    """A bench on a network of two: the coordinator, and a peer that serves what it accuses others with."""

    def __init__(self, folder: Path) -> None:
        network = MemoryNetwork()
        self.state = State(Terms.of(CASE.run, make_config(averaging={"audit_rate": 1.0})))
        for key in CASE.keys:
            apply(self.state, PeerJoined(0.0, key.peer_id, (), "test"))
        self.coordinator, self.peer = network.join(CASE.coordinator), network.join(REPORTER)
        self.blobs, self.served = BlobStore(folder / "blobs"), BlobStore(folder / "served")
        self.inbox = folder / "proofs"
        self.judged = 0
        self.bench = Bench(
            self.coordinator,
            self.blobs,
            self.inbox,
            self.judge,
            run=CASE.run,
            state=lambda: self.state,
            ban=self.ban,
            sign_plan=lambda payload: CASE.plan.signed,
        )

    async def judge(self, proof: bytes) -> list[tuple[str, str]]:
        self.judged += 1
        return judge(proof, CASE.run_id)

    def ban(self, peer: str, reason: str, proof: BlobRef) -> None:
        banned = self.state.banned.get(peer)
        if banned is None or not banned.proved:
            apply(self.state, PeerBanned(1.0, peer, reason, proof.root, proof.size))

    async def open(self) -> None:
        await serve_blobs(self.peer, self.served)
        await self.coordinator.connect(self.peer.addresses())

    async def report(self, proof: bytes) -> str | None:
        """The answer, once it is one."""
        opened = self.accusation(self.served.add_bytes(proof))
        while (answer := self.bench.take(opened)) is not None and answer.startswith("busy"):
            await asyncio.gather(*self.bench._cases.values())
        return answer

    def accusation(self, ref: BlobRef, reporter: int = 2) -> Opened[pb.FaultReport]:
        report = pb.FaultReport(plan=CASE.plan.digest, proof=pb.Blob(root=ref.root, size=ref.size))
        return CASE.opened(CASE.keys[reporter], report)


def run(folder: Path, scenario: Callable[[Court], Awaitable[None]]) -> None:
    async def bounded() -> None:
        court = Court(folder)
        await court.open()
        try:
            async with asyncio.timeout(30):
                await scenario(court)
        finally:
            await court.bench.close()
            await court.peer.close()
            await court.coordinator.close()
        assert not list(court.inbox.glob("*")), "nothing that was fetched is left behind"

    asyncio.run(bounded())


def test_a_proof_that_holds_is_kept_and_bans_once(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        assert await court.report(HOLDS) is None
        ban = court.state.banned[CASE.peer(0)]
        assert court.blobs.read(BlobRef(ban.root, ban.size)) == HOLDS
        assert await court.report(HOLDS) is None
        assert court.judged == 1
        assert list(court.state.banned) == [CASE.peer(0)]

    run(tmp_path, scenario)


def test_a_proof_takes_the_place_of_an_ordered_ban(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        apply(court.state, PeerBanned(1.0, CASE.peer(0), "a hunch", until=3600.0))
        assert await court.report(HOLDS) is None
        assert court.state.banned[CASE.peer(0)].proved

    run(tmp_path, scenario)


@pytest.mark.parametrize("where", ["current", "failed", "last"])
def test_auditors_that_agreed_with_the_span_are_banned_with_its_reducer(tmp_path: Path, where: str) -> None:
    async def scenario(court: Court) -> None:
        plan, seal = CASE.plan, CASE.seal
        roster = frozenset(key.peer_id for key in CASE.keys)
        attempt = Attempt(plan.message, plan.signed.payload, plan.digest, 0.0, roster)
        attempt.seal, attempt.seal_digest = seal.message, seal.digest
        lie = pb.SpanReceipt.FromString(LIE.wrong_span.receipt.payload).content.root
        true = blob_ref(CASE.spans[0]).root
        for place, content in ((1, true), (3, lie)):
            audit = Audit(content, CASE.audit(place, 0, content).SerializeToString())
            attempt.audits.setdefault(0, {})[CASE.peer(place)] = audit
        match where:
            case "current":
                court.state.round.attempt = attempt
            case "failed":
                court.state.failed = attempt
            case "last":
                court.state.last = attempt
        assert await court.report(HOLDS) is None
        assert list(court.state.banned) == [CASE.peer(0), CASE.peer(3)]

    run(tmp_path, scenario)


def test_who_reports_what_shows_nothing_is_soon_not_listened_to(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        assert "is what its rule gives" in str(await court.report(SHOWS_NOTHING))
        for place in range(1, MAX_FALSE):
            assert str(await court.report(bytes([place]))).startswith("refused")
        assert await court.report(HOLDS) == f"refused: {MAX_FALSE} proofs of this peer showed nothing"
        assert not court.state.banned
        assert not list(court.blobs.folder.iterdir())

    run(tmp_path, scenario)


def test_a_proof_that_cannot_be_had_is_no_false_one(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        nowhere = court.accusation(blob_ref(b"nowhere"))
        for _ in range(2 * MAX_FALSE):
            assert str(court.bench.take(nowhere)).startswith("busy")
            await asyncio.gather(*court.bench._cases.values())
        assert await court.report(HOLDS) is None

    run(tmp_path, scenario)


def test_a_blob_of_the_run_cannot_be_removed_by_calling_it_a_proof(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        court.blobs.add_bytes(b"the model")
        assert str(await court.report(b"the model")).startswith("refused")
        assert court.blobs.has(blob_ref(b"the model"))

    run(tmp_path, scenario)


def test_what_is_too_large_or_from_nobody_is_not_fetched(tmp_path: Path) -> None:
    async def scenario(court: Court) -> None:
        for size in (0, MAX_PROOF_BYTES + 1):
            with pytest.raises(FrameError):
                court.bench.take(court.accusation(BlobRef(bytes(32), size)))
        court.ban(CASE.peer(3), "it lied", BlobRef(bytes(32), 1))
        assert court.bench.take(court.accusation(blob_ref(HOLDS), 3)) == "banned: it lied"
        del court.state.members[CASE.peer(1)]
        assert str(court.bench.take(court.accusation(blob_ref(HOLDS), 1))).startswith("unknown")
        assert not court.bench._cases

    run(tmp_path, scenario)
