import asyncio
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from google.protobuf.message import Message

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ENTRIES_FILE, RUN_FILE, ChainFile
from hivegrpo.protocol.chainstream import MAX_ENTRIES, extend_chain, fetch_run, serve_chain
from hivegrpo.protocol.envelope import digest_of, run_id_of, sign
from hivegrpo.protocol.errors import ChainError, ConfigError, FrameError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.scalars import StepScalars, fp32_bits
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.memory import MemoryNetwork

SCALARS = StepScalars.for_step(1, learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0).to_bits()
PEERS = sorted(Identity.generate().peer_id for _ in range(2))
ROOT = sha256(b"root").digest()


class Coordinator:
    """Signs a chain."""

    def __init__(self, name: bytes = b"") -> None:
        self.identity = Identity.generate()
        manifest = pb.RunManifest(protocol="hivegrpo/1", coordinator=self.identity.peer_id, nonce=name.ljust(16))
        self.run_id = run_id_of(manifest.SerializeToString(deterministic=True))
        self.run = sign(self.identity, self.run_id, manifest)
        self.head = digest_of(self.run.payload)

    def chain(self) -> Chain:
        return Chain(self.run, self.identity.peer_id)

    def sign(self, message: Message) -> pb.Signed:
        return sign(self.identity, self.run_id, message)

    def messages(self, version: int) -> tuple[pb.VersionManifest, pb.RoundPlan | None, pb.Seal | None]:
        """The next version's, without the digests that tie them together."""
        manifest = pb.VersionManifest(version=version, parent=self.head, state=pb.Blob(root=ROOT, size=20))
        if version == 0:
            return manifest, None, None
        manifest.spans.append(pb.Blob(root=ROOT, size=4))
        plan = pb.RoundPlan(
            version=version,
            parent=self.head,
            attempt=1,
            codec="fp32",
            rule="mean",
            values=1,
            contributors=[pb.Contributor(peer=peer, weight=1, root=ROOT) for peer in PEERS],
            reducers=[pb.Reducer(peer=PEERS[0], first=0, chunks=1)],
            scalars=SCALARS,
            exchange_seconds=1.0,
            step_seconds=1.0,
            audit_seconds=1.0,
        )
        return manifest, plan, pb.Seal(contributors=[pb.Sealed(peer=PEERS[1], coefficient=fp32_bits(1.0))])

    def bind(self, manifest: pb.VersionManifest, plan: pb.RoundPlan | None, seal: pb.Seal | None) -> pb.ChainEntry:
        """Tie the messages together, sign them, and move the head."""
        entry = pb.ChainEntry()
        if plan is not None and seal is not None:
            entry.plan.CopyFrom(self.sign(plan))
            seal.plan = digest_of(entry.plan.payload)
            entry.seal.CopyFrom(self.sign(seal))
            manifest.plan, manifest.seal = seal.plan, digest_of(entry.seal.payload)
        entry.manifest.CopyFrom(self.sign(manifest))
        self.head = digest_of(entry.manifest.payload)
        return entry

    def entries(self, count: int) -> list[pb.ChainEntry]:
        return [self.bind(*self.messages(version)) for version in range(count)]


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


def test_a_chain_of_signed_versions_verifies(coordinator: Coordinator) -> None:
    chain = coordinator.chain()
    assert (chain.height, chain.head) == (-1, None)
    for entry in coordinator.entries(4):
        chain.append(entry)
    assert chain.height == 3
    assert chain.run_id == coordinator.run_id
    assert chain.head is not None
    assert chain.head.manifest.digest == coordinator.head


def refused(chain: Chain, entry: pb.ChainEntry, reason: str) -> None:
    height = chain.height
    with pytest.raises(ChainError, match=reason):
        chain.append(entry)
    assert chain.height == height


def test_a_gap_is_refused(coordinator: Coordinator) -> None:
    first, _, third = coordinator.entries(3)
    chain = coordinator.chain()
    chain.append(first)
    refused(chain, third, "Expected version 1, got 2")
    refused(chain, first, "Expected version 1, got 0")


def test_a_fork_is_refused(coordinator: Coordinator) -> None:
    chain = coordinator.chain()
    for entry in coordinator.entries(2):
        chain.append(entry)
    manifest, plan, seal = coordinator.messages(2)
    manifest.parent = digest_of(b"another version 1")
    refused(chain, coordinator.bind(manifest, plan, seal), "its parent differs")


def test_version_0_continues_the_run_manifest(coordinator: Coordinator) -> None:
    manifest, _, _ = coordinator.messages(0)
    manifest.parent = digest_of(b"another run")
    refused(coordinator.chain(), coordinator.bind(manifest, None, None), "its parent differs")


@pytest.mark.parametrize("part", ["manifest", "plan", "seal"])
def test_a_tampered_part_is_refused(coordinator: Coordinator, part: str) -> None:
    first, second = coordinator.entries(2)
    chain = coordinator.chain()
    chain.append(first)
    envelope = getattr(second, part)
    envelope.payload += b"\x00"
    refused(chain, second, "not signed by")


@pytest.mark.parametrize("part", ["manifest", "plan", "seal"])
def test_another_signer_is_refused(coordinator: Coordinator, part: str) -> None:
    first, second = coordinator.entries(2)
    chain = coordinator.chain()
    chain.append(first)
    mallory = Identity.generate()
    kind = {"manifest": pb.VersionManifest, "plan": pb.RoundPlan, "seal": pb.Seal}[part]
    message = kind.FromString(getattr(second, part).payload)
    getattr(second, part).CopyFrom(sign(mallory, coordinator.run_id, message))
    refused(chain, second, f"is signed by '{mallory.peer_id}'")


def test_another_runs_versions_are_refused(coordinator: Coordinator) -> None:
    other = Coordinator(b"other")
    other.identity = coordinator.identity
    refused(coordinator.chain(), other.entries(1)[0], "not signed by")


def _other_plan(entry: pb.ChainEntry, coordinator: Coordinator) -> None:
    plan = pb.RoundPlan.FromString(entry.plan.payload)
    plan.attempt += 1
    entry.plan.CopyFrom(coordinator.sign(plan))


def _other_seal(entry: pb.ChainEntry, coordinator: Coordinator) -> None:
    seal = pb.Seal.FromString(entry.seal.payload)
    seal.contributors[0].norm_squared = b"\x07"  # of a mean, which needs no norms
    entry.seal.CopyFrom(coordinator.sign(seal))


@pytest.mark.parametrize("swap", [_other_plan, _other_seal])
def test_a_plan_or_seal_that_the_manifest_does_not_name_is_refused(
    coordinator: Coordinator, swap: Callable[[pb.ChainEntry, Coordinator], None]
) -> None:
    first, second = coordinator.entries(2)
    chain = coordinator.chain()
    chain.append(first)
    swap(second, coordinator)
    refused(chain, second, "another plan or seal than it names")


def _plan_of_version_7(plan: pb.RoundPlan) -> None:
    plan.version = 7


def _plan_on_another_parent(plan: pb.RoundPlan) -> None:
    plan.parent = ROOT


@pytest.mark.parametrize("change", [_plan_of_version_7, _plan_on_another_parent])
def test_a_plan_for_another_round_is_refused(coordinator: Coordinator, change: Callable[[pb.RoundPlan], None]) -> None:
    chain = coordinator.chain()
    chain.append(coordinator.entries(1)[0])
    manifest, plan, seal = coordinator.messages(1)
    assert plan is not None
    change(plan)
    refused(chain, coordinator.bind(manifest, plan, seal), "do not belong together")


def test_a_version_without_a_span_for_each_reducer_is_refused(coordinator: Coordinator) -> None:
    chain = coordinator.chain()
    chain.append(coordinator.entries(1)[0])
    manifest, plan, seal = coordinator.messages(1)
    del manifest.spans[:]
    refused(chain, coordinator.bind(manifest, plan, seal), "one span for each reducer")


def test_the_reference_stays_or_moves_to_the_version_itself(coordinator: Coordinator) -> None:
    chain = coordinator.chain()
    for version, reference in enumerate([0, 0, 2, 2, 4]):
        manifest, plan, seal = coordinator.messages(version)
        manifest.reference_version = reference
        chain.append(coordinator.bind(manifest, plan, seal))
    head = coordinator.head
    for reference in (0, 2, 3):
        coordinator.head = head
        manifest, plan, seal = coordinator.messages(5)
        manifest.reference_version = reference
        refused(chain, coordinator.bind(manifest, plan, seal), "goes back to an older reference")
    coordinator.head = head
    manifest, plan, seal = coordinator.messages(5)
    manifest.reference_version = 6
    refused(chain, coordinator.bind(manifest, plan, seal), "refers to version 6, which is to come")


def test_a_run_manifest_of_another_coordinator_is_refused(coordinator: Coordinator) -> None:
    with pytest.raises(ChainError, match="run manifest does not verify"):
        Chain(coordinator.run, Identity.generate().peer_id)


def test_a_home_keeps_the_chain(coordinator: Coordinator, tmp_path: Path) -> None:
    kept = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    for entry in coordinator.entries(3):
        kept.append(entry)
    reopened = ChainFile.open(tmp_path)
    assert reopened.chain.height == 2
    assert reopened.chain.head is not None
    assert reopened.chain.head.manifest.digest == coordinator.head


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 100])
def test_an_entry_that_a_crash_cut_short_is_removed(coordinator: Coordinator, tmp_path: Path, cut: int) -> None:
    entries = coordinator.entries(3)
    kept = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    kept.append(entries[0])
    kept.append(entries[1])
    whole = (tmp_path / ENTRIES_FILE).read_bytes()
    data = entries[2].SerializeToString()
    (tmp_path / ENTRIES_FILE).write_bytes(whole + (len(data).to_bytes(4, "big") + data)[:cut])
    torn = (tmp_path / ENTRIES_FILE).read_bytes()
    assert ChainFile.open(tmp_path).chain.height == 1
    assert (tmp_path / ENTRIES_FILE).read_bytes() == torn  # whoever only reads leaves it to the home's owner
    repaired = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    assert repaired.chain.height == 1
    assert (tmp_path / ENTRIES_FILE).read_bytes() == whole
    repaired.append(entries[2])
    assert ChainFile.open(tmp_path).chain.height == 2


def test_a_damaged_entry_is_an_error(coordinator: Coordinator, tmp_path: Path) -> None:
    kept = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    for entry in coordinator.entries(2):
        kept.append(entry)
    data = bytearray((tmp_path / ENTRIES_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / ENTRIES_FILE).write_bytes(data)
    with pytest.raises(ChainError):
        ChainFile.open(tmp_path)
    for garbage in (b"\xff" * 8, b"\x00\x00\x00\x01\xff"):
        (tmp_path / ENTRIES_FILE).write_bytes(garbage)
        with pytest.raises(ChainError, match="damaged at byte 0"):
            ChainFile.open(tmp_path)


def test_a_home_takes_no_second_run(coordinator: Coordinator, tmp_path: Path) -> None:
    ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    other = pb.RunManifest.FromString(coordinator.run.payload)
    other.nonce = b"another run"
    run = sign(coordinator.identity, run_id_of(other.SerializeToString(deterministic=True)), other)
    with pytest.raises(ChainError, match="belongs to run"):
        ChainFile.create(tmp_path, run, coordinator.identity.peer_id)
    assert ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id).chain.run_id == coordinator.run_id


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run in"):
        ChainFile.open(tmp_path)
    assert not (tmp_path / RUN_FILE).exists()


async def served(network: MemoryNetwork, chain: Chain) -> tuple[Chain, pb.Signed]:
    """What a fresh node gets from one that serves `chain`."""
    holder, reader = network.join("holder"), network.join("reader")
    await serve_chain(holder, chain)
    await reader.connect(holder.addresses())
    run = await fetch_run(reader, "holder")
    fetched = Chain(run, chain.coordinator)
    await extend_chain(reader, "holder", fetched, fetched.append)
    return fetched, run


@pytest.mark.parametrize("count", [0, 3, MAX_ENTRIES, MAX_ENTRIES + 1])
def test_a_chain_is_fetched_whole(coordinator: Coordinator, count: int) -> None:
    chain = coordinator.chain()
    for entry in coordinator.entries(count):
        chain.append(entry)
    fetched, run = asyncio.run(served(MemoryNetwork(), chain))
    assert fetched.height == count - 1
    assert run == coordinator.run


def test_a_holder_of_another_run_is_refused(coordinator: Coordinator) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        holder, reader = network.join("holder"), network.join("reader")
        await serve_chain(holder, Coordinator(b"other").chain())
        await reader.connect(holder.addresses())
        chain = coordinator.chain()
        with pytest.raises(ChainError, match="serves another run"):
            await extend_chain(reader, "holder", chain, chain.append)

    asyncio.run(scenario())


@pytest.mark.parametrize(("first", "count"), [(0, MAX_ENTRIES + 1), (1, 0)])
def test_a_header_that_was_not_asked_for_is_refused(coordinator: Coordinator, first: int, count: int) -> None:
    async def lie(stream: Stream) -> None:
        await stream.receive(64)
        await stream.send(pb.ChainHeader(run=coordinator.run, first=first, count=count).SerializeToString())

    async def scenario() -> None:
        network = MemoryNetwork()
        holder, reader = network.join("holder"), network.join("reader")
        await holder.serve_stream("chain", lie)
        await reader.connect(holder.addresses())
        chain = coordinator.chain()
        with pytest.raises(FrameError):
            await extend_chain(reader, "holder", chain, chain.append)

    asyncio.run(scenario())
