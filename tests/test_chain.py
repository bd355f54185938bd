import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message
from support.chains import ROOT, ChainMaker

from hivegrpo.protocol import chain, chainfile
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ENTRIES_FILE, MARK_FILE, RUN_FILE, ChainFile, count_entries
from hivegrpo.protocol.chainstream import MAX_ENTRIES, extend_chain, fetch_run, serve_chain
from hivegrpo.protocol.envelope import Opened, digest_of, parse, run_id_of, sign
from hivegrpo.protocol.errors import (
    ChainError,
    ConfigError,
    ForgedError,
    ForkError,
    FrameError,
    GapError,
    ReplayError,
)
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Stream
from hivegrpo.protocol.transport.memory import MemoryNetwork


@pytest.fixture
def coordinator() -> ChainMaker:
    return ChainMaker()


def test_a_chain_of_signed_versions_verifies(coordinator: ChainMaker) -> None:
    chain = coordinator.chain()
    assert (chain.height, chain.head) == (-1, None)
    for entry in coordinator.entries(4):
        chain.append(entry)
    assert chain.height == 3
    assert chain.run_id == coordinator.run_id
    assert chain.head is not None
    assert chain.head.manifest.digest == coordinator.head


def refused(chain: Chain, entry: pb.ChainEntry, reason: str, kind: type[ChainError] = ChainError) -> None:
    height = chain.height
    with pytest.raises(ChainError, match=reason) as caught:
        chain.append(entry)
    assert type(caught.value) is kind
    assert chain.height == height


def test_a_gap_is_refused(coordinator: ChainMaker) -> None:
    first, _, third = coordinator.entries(3)
    chain = coordinator.chain()
    chain.append(first)
    refused(chain, third, "Expected version 1, got 2", GapError)


def test_a_replay_is_refused(coordinator: ChainMaker) -> None:
    entries = coordinator.entries(3)
    chain = coordinator.chain()
    for entry in entries:
        chain.append(entry)
    for version, entry in enumerate(entries):
        refused(chain, entry, f"Expected version 3, got {version} again", ReplayError)


def test_a_fork_is_refused(coordinator: ChainMaker) -> None:
    chain = coordinator.chain()
    for entry in coordinator.entries(2):
        chain.append(entry)
    manifest, plan, seal = coordinator.messages(2)
    manifest.parent = digest_of(b"another version 1")
    refused(chain, coordinator.bind(manifest, plan, seal), "its parent differs", ForkError)


def test_a_second_version_of_a_number_is_a_fork(coordinator: ChainMaker) -> None:
    chain = coordinator.chain()
    first, second = coordinator.entries(2)
    chain.append(first)
    coordinator.head = digest_of(first.manifest.payload)
    manifest, plan, seal = coordinator.messages(1)
    manifest.state.size += 1
    other = coordinator.bind(manifest, plan, seal)
    chain.append(second)
    refused(chain, other, "got 1, another one than was verified", ForkError)


def test_version_0_continues_the_run_manifest(coordinator: ChainMaker) -> None:
    manifest, _, _ = coordinator.messages(0)
    manifest.parent = digest_of(b"another run")
    refused(coordinator.chain(), coordinator.bind(manifest, None, None), "its parent differs", ForkError)


@pytest.mark.parametrize("part", ["manifest", "plan", "seal"])
def test_a_tampered_part_is_refused(coordinator: ChainMaker, part: str) -> None:
    first, second = coordinator.entries(2)
    chain = coordinator.chain()
    chain.append(first)
    envelope = getattr(second, part)
    envelope.payload += b"\x00"
    refused(chain, second, "not signed by", ForgedError)


@pytest.mark.parametrize("part", ["manifest", "plan", "seal"])
def test_another_signer_is_refused(coordinator: ChainMaker, part: str) -> None:
    first, second = coordinator.entries(2)
    chain = coordinator.chain()
    chain.append(first)
    mallory = Identity.generate()
    kind = {"manifest": pb.VersionManifest, "plan": pb.RoundPlan, "seal": pb.Seal}[part]
    message = kind.FromString(getattr(second, part).payload)
    getattr(second, part).CopyFrom(sign(mallory, coordinator.run_id, message))
    refused(chain, second, f"is signed by '{mallory.peer_id}'", ForgedError)


def test_another_runs_versions_are_refused(coordinator: ChainMaker) -> None:
    other = ChainMaker(b"other")
    other.identity = coordinator.identity
    refused(coordinator.chain(), other.entries(1)[0], "not signed by", ForgedError)


def _other_plan(entry: pb.ChainEntry, coordinator: ChainMaker) -> None:
    plan = pb.RoundPlan.FromString(entry.plan.payload)
    plan.attempt += 1
    entry.plan.CopyFrom(coordinator.sign(plan))


def _other_seal(entry: pb.ChainEntry, coordinator: ChainMaker) -> None:
    seal = pb.Seal.FromString(entry.seal.payload)
    seal.contributors[0].norm_squared = b"\x07"  # of a mean, which needs no norms
    entry.seal.CopyFrom(coordinator.sign(seal))


@pytest.mark.parametrize("swap", [_other_plan, _other_seal])
def test_a_plan_or_seal_that_the_manifest_does_not_name_is_refused(
    coordinator: ChainMaker, swap: Callable[[pb.ChainEntry, ChainMaker], None]
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
def test_a_plan_for_another_round_is_refused(coordinator: ChainMaker, change: Callable[[pb.RoundPlan], None]) -> None:
    chain = coordinator.chain()
    chain.append(coordinator.entries(1)[0])
    manifest, plan, seal = coordinator.messages(1)
    assert plan is not None
    change(plan)
    refused(chain, coordinator.bind(manifest, plan, seal), "do not belong together")


def test_a_version_without_a_span_for_each_reducer_is_refused(coordinator: ChainMaker) -> None:
    chain = coordinator.chain()
    chain.append(coordinator.entries(1)[0])
    manifest, plan, seal = coordinator.messages(1)
    del manifest.spans[:]
    refused(chain, coordinator.bind(manifest, plan, seal), "one span for each reducer")


def test_the_reference_stays_or_moves_to_the_version_itself(coordinator: ChainMaker) -> None:
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


def test_a_run_manifest_of_another_coordinator_is_refused(coordinator: ChainMaker) -> None:
    with pytest.raises(ChainError, match="run manifest does not verify"):
        Chain(coordinator.run, Identity.generate().peer_id)


def test_a_home_keeps_the_chain(coordinator: ChainMaker, tmp_path: Path) -> None:
    kept = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    for entry in coordinator.entries(3):
        kept.append(entry)
    reopened = ChainFile.open(tmp_path)
    assert reopened.chain.height == 2
    assert reopened.chain.head is not None
    assert reopened.chain.head.manifest.digest == coordinator.head


def test_what_nobody_verified_of_an_entry_is_not_written(coordinator: ChainMaker, tmp_path: Path) -> None:
    """A later start believes what it wrote."""
    first, second = coordinator.entries(2)
    padded = pb.ChainEntry(manifest=first.manifest, plan=second.plan, seal=pb.Signed(payload=b"no seal"))
    ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id).append(padded)
    stored = (tmp_path / ENTRIES_FILE).read_bytes()
    assert parse(pb.ChainEntry, stored[4:]) == pb.ChainEntry(manifest=first.manifest)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 100])
def test_an_entry_that_a_crash_cut_short_is_removed(coordinator: ChainMaker, tmp_path: Path, cut: int) -> None:
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


@pytest.fixture
def marked(coordinator: ChainMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A home with seven entries, of which the mark has six; the types of what is verified from then on."""
    monkeypatch.setattr(chainfile, "MARK_EVERY", 3)
    stored = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    for entry in coordinator.entries(7):
        stored.append(entry)
    verified: list[str] = []
    verify = chain.open_signed

    def noting(envelope: pb.Signed, run_id: str, kind: type[Message], signer: str) -> Opened[Message]:
        verified.append(kind.DESCRIPTOR.name)
        return verify(envelope, run_id, kind, signer)

    monkeypatch.setattr(chain, "open_signed", noting)
    return verified


def test_an_owner_verifies_only_what_it_has_not_verified_before(
    coordinator: ChainMaker, tmp_path: Path, marked: list[str]
) -> None:
    ours = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    assert marked == ["VersionManifest", "RoundPlan", "Seal"]
    marked.clear()
    theirs = ChainFile.open(tmp_path)
    assert marked.count("VersionManifest") == 7, "somebody else's home"
    assert ours.chain.entries == theirs.chain.entries
    assert ours.append(coordinator.bind(*coordinator.messages(7))).manifest.message.version == 7
    marked.clear()
    assert ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id).chain.height == 7
    assert marked.count("VersionManifest") == 2


@pytest.mark.parametrize("place", [0.1, 0.4, 0.8])
def test_a_byte_that_has_changed_since_is_noticed(
    coordinator: ChainMaker, tmp_path: Path, marked: list[str], place: float
) -> None:
    path = tmp_path / ENTRIES_FILE
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChainError):
        ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)


def test_a_mark_of_more_than_there_is_marks_nothing(coordinator: ChainMaker, tmp_path: Path, marked: list[str]) -> None:
    path = tmp_path / ENTRIES_FILE
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[: whole // 2])
    stored = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    assert stored.chain.height + 1 == marked.count("VersionManifest") == 4 - 1
    path.unlink()
    assert ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id).chain.height == -1


def test_a_mark_is_of_one_run(coordinator: ChainMaker, tmp_path: Path, marked: list[str]) -> None:
    """Entries of another run that are marked in their own home are not taken into this one."""
    other = ChainMaker(b"other")
    home = tmp_path / "other"
    ChainFile.create(home, other.run, other.identity.peer_id)
    mark = (tmp_path / MARK_FILE).read_bytes()
    (home / MARK_FILE).write_bytes(mark)
    (home / ENTRIES_FILE).write_bytes((tmp_path / ENTRIES_FILE).read_bytes()[: int.from_bytes(mark[:8], "big")])
    with pytest.raises(ChainError, match="does not verify"):
        ChainFile.create(home, other.run, other.identity.peer_id)


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_entries_are_counted_without_a_look_at_them(coordinator: ChainMaker, tmp_path: Path, cut: int) -> None:
    stored = ChainFile.create(tmp_path, coordinator.run, coordinator.identity.peer_id)
    assert count_entries(tmp_path) == 0
    for entry in coordinator.entries(3):
        stored.append(entry)
    path = tmp_path / ENTRIES_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    assert count_entries(tmp_path) == (2 if cut else 3)


def test_a_damaged_entry_is_an_error(coordinator: ChainMaker, tmp_path: Path) -> None:
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


def test_a_home_takes_no_second_run(coordinator: ChainMaker, tmp_path: Path) -> None:
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
def test_a_chain_is_fetched_whole(coordinator: ChainMaker, count: int) -> None:
    chain = coordinator.chain()
    for entry in coordinator.entries(count):
        chain.append(entry)
    fetched, run = asyncio.run(served(MemoryNetwork(), chain))
    assert fetched.height == count - 1
    assert run == coordinator.run


def test_a_holder_of_another_run_is_refused(coordinator: ChainMaker) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        holder, reader = network.join("holder"), network.join("reader")
        await serve_chain(holder, ChainMaker(b"other").chain())
        await reader.connect(holder.addresses())
        chain = coordinator.chain()
        with pytest.raises(ChainError, match="serves another run"):
            await extend_chain(reader, "holder", chain, chain.append)

    asyncio.run(scenario())


@pytest.mark.parametrize(("first", "count"), [(0, MAX_ENTRIES + 1), (1, 0)])
def test_a_header_that_was_not_asked_for_is_refused(coordinator: ChainMaker, first: int, count: int) -> None:
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
