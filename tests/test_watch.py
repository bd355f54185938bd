"""The light client over the in-memory network: what it shows, keeps, and refuses."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.chains import ChainMaker

from hivegrpo.cli.launch_watch import watch
from hivegrpo.cli.main import main
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.envelope import digest_of, sign
from hivegrpo.protocol.errors import (
    BusyError,
    ChainError,
    ConfigError,
    ForgedError,
    ForkError,
    GapError,
    RemoteError,
    ReplayError,
    UnreachableError,
)
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.lightclient import FIRST_PAUSE, GIVE_UP_SECONDS, LAST_PAUSE, POLL_SECONDS, LightClient
from hivegrpo.protocol.transport.memory import MemoryNetwork, MemoryTransport

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "watch.py"
Records = list[dict[str, Any]]


class Holder:
    """Serves whatever entries it is given, true or not, as `serve_chain` takes them."""

    def __init__(self, maker: ChainMaker, entries: list[pb.ChainEntry]) -> None:
        self.run = maker.run
        self.successions: list[pb.Signed] = []
        self.entries = entries

    @property
    def height(self) -> int:
        return len(self.entries) - 1

    def entry(self, version: int) -> pb.ChainEntry:
        return self.entries[version]


async def no_more(seconds: float) -> None:
    raise AssertionError("it should not have to wait")


class Bed:
    """A network with one holder, and clients that come and go; they keep what they verified."""

    def __init__(self, maker: ChainMaker, home: Path | None = None) -> None:
        self.maker = maker
        self.home = home
        self.network = MemoryNetwork()
        self.holder = Holder(maker, [])
        self.served = self.network.join(maker.identity)
        self.address = self.served.addresses()[0]

    async def serve(self, entries: list[pb.ChainEntry]) -> "Bed":
        self.holder.entries = entries
        await serve_chain(self.served, self.holder)
        return self

    async def watch(
        self,
        *,
        once: bool = True,
        first: int | None = None,
        run_id: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = no_more,
        wrap: Callable[[MemoryTransport], Any] = lambda transport: transport,
        address: str | None = None,
    ) -> Records:
        """What one process shows; what it raises has `records`, too."""
        records: Records = []
        transport = self.network.join(Identity.generate())
        try:
            await watch(
                wrap(transport),
                address or self.address,
                records.append,
                sleep=sleep,
                run_id=run_id,
                home=self.home,
                first=first,
                once=once,
            )
        finally:
            self.records = records
            await transport.close()
        return records


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIVEGRPO_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def maker() -> ChainMaker:
    return ChainMaker(versions=6)


def run(test: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await test

    return asyncio.run(bounded())


def test_it_shows_the_run_and_its_newest_version(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(4))
        shown, version = await bed.watch()
        coordinator = maker.identity.peer_id
        assert shown == {
            "kind": "run",
            "run_id": maker.run_id,
            "coordinator": coordinator,
            "address": bed.address,
            "version": 3,
            "versions": 6,
        }
        assert version["kind"] == "version"
        assert (version["version"], version["versions"]) == (3, 6)
        assert version["manifest"] == maker.head.hex()
        assert version["metrics"] == {"reward": 0.003}
        assert version["contributors"] == maker.peers[1:], "those of the seal"

    run(test())


def test_it_shows_versions_as_they_come_until_the_last(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(1))
        pauses = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            bed.holder.entries.append(maker.entry(len(bed.holder.entries)))

        records = await bed.watch(once=False, sleep=sleep)
        assert [record["version"] for record in records if record["kind"] == "version"] == [0, 1, 2, 3, 4, 5, 6]
        assert pauses == [POLL_SECONDS] * 6

    run(test())


def test_what_was_verified_is_kept(maker: ChainMaker, state: Path) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(3))
        await bed.watch()
        asked = []
        entry = bed.holder.entry
        bed.holder.entry = lambda version: asked.append(version) or entry(version)  # type: ignore[method-assign]
        bed.holder.entries.append(maker.entry(3))
        records = await bed.watch(first=0)
        assert [record["version"] for record in records[1:]] == [0, 1, 2, 3]
        assert asked[-2:] == [2, 3], "the head, to compare it, and what is new"
        assert (state / "watch" / maker.run_id[:16] / "chain.bin").is_file()

    run(test())


def changed(entry: pb.ChainEntry) -> pb.ChainEntry:
    other = pb.ChainEntry()
    other.CopyFrom(entry)
    other.manifest.payload += b"\x00"
    return other


def resigned(maker: ChainMaker, entry: pb.ChainEntry) -> pb.ChainEntry:
    """The same version, signed by somebody else."""
    other = pb.ChainEntry()
    other.CopyFrom(entry)
    manifest = pb.VersionManifest.FromString(entry.manifest.payload)
    other.manifest.CopyFrom(sign(Identity.generate(), maker.run_id, manifest))
    return other


def another(maker: ChainMaker, version: int, parent: bytes) -> pb.ChainEntry:
    """Another version than the one that `maker` made, signed by it all the same."""
    maker.head = parent
    manifest, plan, seal = maker.messages(version)
    manifest.state.size += 1
    return maker.bind(manifest, plan, seal)


LIES: dict[str, tuple[Callable[[ChainMaker, list[pb.ChainEntry]], list[pb.ChainEntry]], type[ChainError]]] = {
    "tampered manifest": (lambda maker, true: [*true[:3], changed(true[3]), true[4]], ForgedError),
    "wrong signer": (lambda maker, true: [*true[:3], resigned(maker, true[3]), true[4]], ForgedError),
    "gap": (lambda maker, true: [*true[:3], true[4]], GapError),
    "fork": (lambda maker, true: [*true[:3], another(maker, 3, digest_of(b"elsewhere"))], ForkError),
    "replay": (lambda maker, true: [*true[:3], true[2], true[3]], ReplayError),
    "second head": (lambda maker, true: [*true[:2], another(maker, 2, digest_of(true[1].manifest.payload))], ForkError),
    "older head": (lambda maker, true: true[:2], ReplayError),
    "no head": (lambda maker, true: [], ReplayError),
    "forged head": (lambda maker, true: [*true[:2], resigned(maker, true[2])], ForgedError),
    "old version as the head": (lambda maker, true: [*true[:2], true[1]], GapError),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("again", [False, True], ids=["in one process", "after a restart"])
def test_what_does_not_follow_from_what_was_verified_is_refused(maker: ChainMaker, lie: str, again: bool) -> None:
    """Versions 0 to 2 are verified; then the coordinator's address serves something else."""
    make, kind = LIES[lie]

    async def test() -> None:
        true = maker.entries(5)
        bed = await Bed(maker).serve(true[:3])
        lies = make(maker, true)

        async def sleep(seconds: float) -> None:
            bed.holder.entries = lies

        if again:
            await bed.watch()
            bed.holder.entries = lies
        with pytest.raises(kind) as caught:
            await bed.watch(once=False, sleep=sleep)
        assert type(caught.value) is kind
        assert caught.value.exit_code == 76
        assert bed.records[-1] == {"kind": "refused", "error": kind.__name__, "message": caught.value.message}
        bed.holder.entries = true[:3]
        assert (await bed.watch())[-1]["version"] == 2, "nothing of it is kept"

    run(test())


def test_what_was_in_order_before_a_lie_is_shown_and_kept(maker: ChainMaker) -> None:
    async def test() -> None:
        true = maker.entries(4)
        bed = await Bed(maker).serve([*true[:3], changed(true[3])])
        with pytest.raises(ForgedError):
            await bed.watch(first=0)
        assert [record["version"] for record in bed.records if record["kind"] == "version"] == [0, 1, 2]
        bed.holder.entries = true
        assert (await bed.watch())[-1]["version"] == 3

    run(test())


def test_a_manifest_that_the_address_does_not_pin_is_refused(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve([])
        bed.holder.run = ChainMaker().run
        with pytest.raises(ForgedError, match="run manifest does not verify"):
            await bed.watch()

    run(test())


def test_a_run_id_pins_the_run_whoever_serves_it(maker: ChainMaker) -> None:
    """A peer serves the coordinator's chain; it may lag, but not lie."""

    async def test() -> None:
        true = maker.entries(3)
        bed = await Bed(maker).serve(true)
        peer = bed.network.join(Identity.generate())
        holder = Holder(maker, true)
        await serve_chain(peer, holder)
        address = peer.addresses()[0]
        with pytest.raises(ForgedError):
            await bed.watch(address=address)
        assert (await bed.watch(address=address, run_id=maker.run_id))[-1]["version"] == 2
        with pytest.raises(ChainError, match="serves another run"):
            await bed.watch(address=address, run_id="0" * 64)
        holder.entries = true[:1]
        with pytest.raises(UnreachableError, match="ends before version 2"):
            await bed.watch(address=address, run_id=maker.run_id)
        holder.entries = [*true[:2], resigned(maker, true[2])]
        with pytest.raises(ForgedError):
            await bed.watch(address=address, run_id=maker.run_id)

    run(test())


class Flaky:
    """A transport whose next dials fail."""

    def __init__(self, transport: MemoryTransport, failures: int) -> None:
        self.transport = transport
        self.failures = failures
        self.broken = False
        """Whether the connection is gone: the next stream fails."""

    async def connect(self, addresses: list[str], timeout: float = 10.0) -> str:
        if self.failures:
            self.failures -= 1
            raise UnreachableError("Nobody answers.", "Try again.")
        return await self.transport.connect(addresses, timeout)

    async def open_stream(self, peer_id: str, name: str, timeout: float = 10.0) -> Any:
        if self.broken:
            self.broken = False
            raise RemoteError("the connection is gone")
        return await self.transport.open_stream(peer_id, name, timeout)


def test_it_dials_again_and_again_with_longer_pauses(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(6))
        pauses: list[float] = []
        flaky: list[Flaky] = []

        def wrap(transport: MemoryTransport) -> Flaky:
            flaky.append(Flaky(transport, 9))
            return flaky[0]

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if seconds == POLL_SECONDS and len(pauses) == 10:
                flaky[0].broken, flaky[0].failures = True, 1
                bed.holder.entries.append(maker.entry(6))

        records = await bed.watch(once=False, sleep=sleep, wrap=wrap)
        assert records[-1]["version"] == 6
        assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, POLL_SECONDS, 0.5, 1]
        assert (FIRST_PAUSE, LAST_PAUSE) == (0.5, 30)

    run(test())


def test_it_gives_up_in_the_end(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(1))
        now = 0.0

        async def sleep(seconds: float) -> None:
            nonlocal now
            now += seconds

        transport = Flaky(bed.network.join(Identity.generate()), 10_000)
        with (
            LightClient(transport, bed.address, sleep=sleep, clock=lambda: now) as client,
            pytest.raises(UnreachableError, match="cannot be read: Nobody answers"),
        ):
            await client.follow(pytest.fail)
        assert GIVE_UP_SECONDS < now < GIVE_UP_SECONDS + 2 * LAST_PAUSE
        with pytest.raises(UnreachableError):
            await bed.watch(wrap=lambda transport: Flaky(transport, 1))

    run(test())


def test_two_processes_do_not_write_one_chain(maker: ChainMaker) -> None:
    async def test() -> None:
        bed = await Bed(maker).serve(maker.entries(1))

        async def sleep(seconds: float) -> None:
            with pytest.raises(BusyError):
                await bed.watch()
            bed.holder.entries = [*bed.holder.entries, *(maker.entry(version) for version in range(1, 7))]

        await bed.watch(once=False, sleep=sleep)

    run(test())


def test_without_py_libp2p_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hivegrpo.cli.launch_watch.importlib.util.find_spec", lambda name: None)
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.generate().peer_id}"
    for arguments, says in (((address,), "pip install 'hivegrpo[watch]'"), ((address, "--run", "ab"), "not a run id")):
        monkeypatch.setattr(sys, "argv", ["hivegrpo", "watch", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == ConfigError.exit_code
        assert says in capsys.readouterr().err


def test_a_thousand_versions_are_verified_in_two_seconds_without_torch_or_hivemind() -> None:
    """Seconds on the processor, which is what it takes on an idle machine: other tests may keep this one busy."""
    command = [sys.executable, str(BENCHMARK), "--versions", "1000", "--peers", "3", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    figures = json.loads(done.stdout)
    assert (figures["verified"], figures["imported"]) == (1000, []), done.stderr
    assert figures["cpu_seconds"] < 2.0
