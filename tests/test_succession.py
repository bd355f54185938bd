"""A key that is kept offline names another coordinator: what counts then, whose signature, and what is refused."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from support.chains import ROOT, ChainMaker

from hivegrpo.cli.launch_watch import watch
from hivegrpo.coordinator.admission import check_head
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chainstream import extend_chain, find_chain, serve_chain
from hivegrpo.protocol.envelope import digest_of, sign
from hivegrpo.protocol.errors import (
    ChainError,
    ForgedError,
    ForkError,
    FrameError,
    GapError,
    ReplayError,
    SignatureError,
)
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.succession import MAX_SUCCESSIONS
from hivegrpo.protocol.transport.memory import MemoryNetwork

FIRST = 3
"""The first version that the new coordinator signs."""


class Line:
    """A run that changes hands: versions 0 to 2 by one key, then as many as a test wants by another."""

    def __init__(self) -> None:
        self.run_key = Identity.generate()
        self.maker = ChainMaker(run_key=self.run_key)
        self.old = self.maker.identity
        self.new = Identity.generate()
        self.entries = self.maker.entries(FIRST)
        self.parent = self.maker.head
        self.succession = self.name(1, self.new)

    def name(self, number: int, coordinator: Identity, key: Identity | None = None, **changes: Any) -> pb.Signed:
        fields = {"number": number, "coordinator": coordinator.peer_id, "first": FIRST, "parent": self.parent}
        return sign(key or self.run_key, self.maker.run_id, pb.Succession(**{**fields, **changes}))

    def by(self, identity: Identity, version: int = FIRST) -> pb.ChainEntry:
        """The next version, signed by whom a test says."""
        self.maker.identity = identity
        return self.maker.entry(version)

    def chain(self, versions: int = FIRST, successions: list[pb.Signed] | None = None) -> Chain:
        chain = Chain(self.maker.run, successions=successions or [])
        for entry in self.entries[:versions]:
            chain.append(entry)
        return chain


@pytest.fixture
def line() -> Line:
    return Line()


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


def refused(kind: type[ChainError], chain: Chain, *successions: pb.Signed, reason: str | None = None) -> None:
    """None of them is taken."""
    before = chain.successions, chain.coordinator
    with pytest.raises(kind, match=reason) as caught:
        chain.succeed(successions)
    assert type(caught.value) is kind
    assert (chain.successions, chain.coordinator) == before


@pytest.mark.parametrize("versions", [0, FIRST], ids=["a late joiner", "who was there"])
def test_the_chain_goes_on_under_the_new_coordinator(line: Line, versions: int) -> None:
    chain = line.chain(versions)
    assert chain.succeed([line.succession]) == 1
    assert chain.succeed([line.succession]) == 0, "it is known by now"
    assert chain.coordinator == line.new.peer_id
    for entry in [*line.entries[versions:], line.by(line.new), line.by(line.new, FIRST + 1)]:
        chain.append(entry)
    assert [chain.signer_of(version) for version in (0, FIRST - 1, FIRST, FIRST + 9)] == [
        *[line.old.peer_id] * 2,
        *[line.new.peer_id] * 2,
    ]


def test_the_old_coordinators_signature_counts_no_more(line: Line) -> None:
    chain = line.chain(successions=[line.succession])
    with pytest.raises(ForgedError, match=f"version {FIRST} is signed by {line.old.peer_id}"):
        chain.append(line.by(line.old))
    line.maker.head = line.parent
    mixed = line.by(line.new)
    plan = pb.RoundPlan.FromString(mixed.plan.payload)
    mixed.plan.CopyFrom(sign(line.old, line.maker.run_id, plan))
    with pytest.raises(ForgedError, match="RoundPlan is signed by"):
        chain.append(mixed)
    assert chain.height == FIRST - 1


def test_the_new_coordinator_cannot_rewrite_what_was_before(line: Line) -> None:
    chain = line.chain(versions=FIRST - 1, successions=[line.succession])
    line.maker.head = digest_of(line.entries[FIRST - 2].manifest.payload)
    with pytest.raises(ForgedError, match=f"version {FIRST - 1} is signed by {line.new.peer_id}"):
        chain.append(line.by(line.new, FIRST - 1))


def test_forged_successions_are_refused(line: Line) -> None:
    chain = line.chain()
    refused(ForgedError, chain, line.name(1, line.new, key=line.old), reason="is signed by")
    refused(ForgedError, chain, line.name(1, line.new, key=line.new))
    tampered = line.name(1, Identity.generate())
    tampered.signature = line.succession.signature
    refused(ForgedError, chain, tampered, reason="not signed by")
    as_another_type = line.name(1, line.new)
    as_another_type.type = "VersionManifest"
    refused(ForgedError, chain, as_another_type)


def test_a_succession_of_another_run_is_refused(line: Line) -> None:
    """Both runs have the same run key."""
    fields = pb.Succession.FromString(line.succession.payload)
    refused(ForgedError, line.chain(), sign(line.run_key, ChainMaker(b"other").run_id, fields), reason="not signed by")


def test_a_run_without_a_run_key_has_no_successions() -> None:
    maker = ChainMaker()
    succession = pb.Succession(number=1, coordinator=Identity.generate().peer_id, parent=digest_of(maker.run.payload))
    for signer in (maker.identity, Identity.generate()):
        refused(ForgedError, maker.chain(), maker.sign(succession), reason="no run key")
        refused(ForgedError, maker.chain(), sign(signer, maker.run_id, succession))


def test_an_older_succession_again_changes_nothing(line: Line) -> None:
    third = Identity.generate()
    both = [line.succession, line.name(2, third)]
    chain = line.chain(successions=both)
    assert chain.succeed([line.succession]) == 0
    assert chain.coordinator == third.peer_id
    with pytest.raises(ForgedError, match=f"signed by {line.new.peer_id}, not by {third.peer_id}"):
        chain.append(line.by(line.new))


def test_successions_come_in_order_and_once(line: Line) -> None:
    third = Identity.generate()
    refused(GapError, line.chain(), line.name(2, third), reason="Expected succession 1, got 2")
    chain = line.chain(successions=[line.succession])
    refused(ForkError, chain, line.name(1, third), reason="second succession 1")
    refused(
        ReplayError, chain, line.name(2, third, first=FIRST - 1, parent=ROOT), reason="an earlier one than the last"
    )
    good = line.name(2, third, first=FIRST + 1, parent=ROOT)
    refused(GapError, chain, good, line.name(4, third, first=FIRST + 2))


@pytest.mark.parametrize("change", [{"number": 0}, {"parent": b"short"}, {"coordinator": "12D3KooW"}])
def test_a_succession_that_makes_no_sense_is_refused(line: Line, change: dict[str, Any]) -> None:
    fields = {"number": 1, "coordinator": line.new.peer_id, "first": FIRST, "parent": line.parent, **change}
    nonsense = sign(line.run_key, line.maker.run_id, pb.Succession(**fields))
    refused(ChainError, line.chain(), nonsense, reason="makes no sense")


def test_the_run_key_says_which_history_goes_on(line: Line) -> None:
    elsewhere = line.name(1, line.new, parent=ROOT)
    refused(ForkError, line.chain(), elsewhere, reason="continue another history")
    late = line.chain(versions=FIRST - 1)
    late.succeed([elsewhere])
    late.append(line.entries[FIRST - 1])
    with pytest.raises(ForkError, match="continue another history"):
        late.append(line.by(line.new))
    corrected = line.name(2, line.new)
    line.maker.head = line.parent
    chain = line.chain()
    assert chain.succeed([elsewhere, corrected]) == 2, "the last word on a version counts"
    chain.append(line.by(line.new))


def test_who_has_versions_of_the_old_coordinators_beyond_is_told(line: Line) -> None:
    chain = line.chain()
    chain.append(line.by(line.old))
    refused(ForkError, chain, line.succession, reason=f"from version {FIRST} on")


def test_a_home_keeps_successions_and_refuses_the_old_address(line: Line, tmp_path: Path) -> None:
    maker, old, new = line.maker, line.old.peer_id, line.new.peer_id
    file = ChainFile.create(tmp_path, maker.run, old)
    for entry in line.entries:
        file.append(entry)
    with pytest.raises(ForgedError, match="run manifest does not verify"):
        ChainFile.create(tmp_path, maker.run, new)
    file = ChainFile.create(tmp_path, maker.run, new, [line.succession])
    file.append(line.by(line.new))
    for reopened in (
        ChainFile.open(tmp_path),
        ChainFile.open(tmp_path, new),
        ChainFile.create(tmp_path, maker.run, new),
    ):
        assert (reopened.chain.height, reopened.chain.coordinator) == (FIRST, new)
        assert reopened.chain.successions == [line.succession]
    with pytest.raises(ReplayError, match="coordinates this run no more"):
        ChainFile.create(tmp_path, maker.run, old)


def test_a_late_joiner_learns_of_it_from_the_new_coordinator_alone(line: Line) -> None:
    async def test() -> None:
        network = MemoryNetwork()
        server, reader = network.join(line.new), network.join(Identity.generate())
        served = line.chain(successions=[line.succession])
        served.append(line.by(line.new))
        await serve_chain(server, served)
        await reader.connect(server.addresses())
        chain = await find_chain(reader, line.new.peer_id)
        assert await extend_chain(reader, line.new.peer_id, chain) == FIRST + 1
        served.succeed([line.name(2, line.old, first=FIRST + 1, parent=line.maker.head)])
        with pytest.raises(ReplayError, match="coordinates this run no more"):
            await find_chain(reader, line.new.peer_id)

    run(test())


def test_a_header_with_too_many_successions_is_refused(line: Line) -> None:
    class Flood:
        run = line.maker.run
        height = -1
        successions = [line.succession] * (MAX_SUCCESSIONS + 1)

        def entry(self, version: int) -> pb.ChainEntry:
            raise AssertionError

    async def test() -> None:
        network = MemoryNetwork()
        server, reader = network.join(line.old), network.join(Identity.generate())
        await serve_chain(server, Flood())
        await reader.connect(server.addresses())
        with pytest.raises(FrameError, match="at most 64 are read"):
            await find_chain(reader, line.old.peer_id)

    run(test())


def test_the_light_client_follows_the_run_and_not_the_old_coordinator(line: Line, tmp_path: Path) -> None:
    """It hears of the succession from a peer; then the old coordinator, with its own next version, is refused."""
    records: list[dict[str, Any]] = []

    async def test() -> None:
        network = MemoryNetwork()
        old, (peer, liar, client) = network.join(line.old), (network.join(Identity.generate()) for _ in range(3))
        await serve_chain(old, line.chain())
        true = line.chain(successions=[line.succession])
        true.append(line.by(line.new))
        await serve_chain(peer, true)

        async def look(address: str, run_id: str | None = None) -> None:
            await watch(client, address, records.append, sleep=asyncio.sleep, home=tmp_path, run_id=run_id, once=True)

        await look(old.addresses()[0])
        assert records[-1]["coordinator"] == line.old.peer_id
        await look(peer.addresses()[0], line.maker.run_id)
        assert (records[-1]["version"], records[-1]["coordinator"]) == (FIRST, line.new.peer_id)
        with pytest.raises(ReplayError, match="coordinates this run no more"):
            await look(old.addresses()[0])
        line.maker.head = line.parent
        forged = line.chain()
        forged.append(line.by(line.old))
        await serve_chain(liar, forged)
        with pytest.raises(ForgedError, match=f"version {FIRST} is signed by {line.old.peer_id}"):
            await look(liar.addresses()[0], line.maker.run_id)

    run(test())


def test_the_new_coordinator_knows_heads_from_before_and_no_others(line: Line) -> None:
    """What the old one signed beyond is no reason to stop: only the own signature is."""
    chain = line.chain(successions=[line.succession])
    check_head(chain, line.entries[FIRST - 1].manifest)
    with pytest.raises(SignatureError):
        check_head(chain, line.by(line.old).manifest)
    line.maker.head = line.parent
    with pytest.raises(ChainError, match="this home is older"):
        check_head(chain, line.by(line.new).manifest)
