"""A peer that cannot or must not join says why in one paragraph, with the exit code that a program can act on."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import addition_config, machine

from hivegrpo.cli.prepare import prepare_run
from hivegrpo.peer.daemon import run_peer
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.blobstream import BlobStore, serve_blobs
from hivegrpo.protocol.chainstream import serve_chain
from hivegrpo.protocol.config import PeerConfig, RunConfig
from hivegrpo.protocol.envelope import digest_of, run_id_of, sign
from hivegrpo.protocol.errors import ChainError, MismatchError, UnreachableError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.transport.base import Transport
from hivegrpo.protocol.transport.memory import MemoryNetwork

COORDINATOR = Identity.generate()


class Served:
    """A chain as a coordinator serves it, right or wrong."""

    def __init__(self, run: pb.Signed, entries: list[pb.ChainEntry]) -> None:
        self.run = run
        self.entries = entries

    @property
    def height(self) -> int:
        return len(self.entries) - 1

    def entry(self, version: int) -> pb.ChainEntry:
        return self.entries[version]


def join(folder: Path, change: Callable[[pb.RunManifest], None], entries: Callable[[str], list[pb.ChainEntry]]) -> None:
    """Join an addition run whose manifest was changed before it was signed, and whose chain is `entries`."""

    async def scenario() -> None:
        network = MemoryNetwork()
        store = BlobStore(folder / "coordinator")
        prepared = prepare_run(RunConfig.load(addition_config(folder)), COORDINATOR, store)
        manifest = pb.RunManifest.FromString(prepared.payload)
        change(manifest)
        run_id = run_id_of(manifest.SerializeToString(deterministic=True))
        run = sign(COORDINATOR, run_id, manifest)
        coordinator = network.join(COORDINATOR)
        await serve_chain(coordinator, Served(run, entries(run_id)))
        await serve_blobs(coordinator, store)

        async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
            return network.join(identity)

        settings = PeerConfig(home=folder / "peer", device="cpu", threads=1)
        address = network.address(COORDINATOR.peer_id)
        async with asyncio.timeout(100):
            await run_peer(address, settings, asyncio.Event(), lambda record: None, make_transport=make_transport)

    asyncio.run(scenario())


def unchanged(manifest: pb.RunManifest) -> None:
    """As it was prepared."""


def no_versions(run_id: str) -> list[pb.ChainEntry]:
    return []


def genesis(run_id: str, **changes: object) -> list[pb.ChainEntry]:
    manifest = pb.VersionManifest(version=0, parent=bytes.fromhex(run_id), state=pb.Blob(root=bytes(32), size=8))
    for name, value in changes.items():
        setattr(manifest, name, value)
    return [pb.ChainEntry(manifest=sign(COORDINATOR, run_id, manifest))]


def forged(run_id: str) -> list[pb.ChainEntry]:
    entries = genesis(run_id)
    entries[0].manifest.payload += b"\x00\x00"
    return entries


def signed_by_another(run_id: str) -> list[pb.ChainEntry]:
    manifest = pb.VersionManifest.FromString(genesis(run_id)[0].manifest.payload)
    return [pb.ChainEntry(manifest=sign(Identity.generate(), run_id, manifest))]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest.digests.update(base=bytes(32)), "The base in"),
        (lambda manifest: manifest.digests.update(tokenizer=bytes(32)), "The tokenizer in"),
        (lambda manifest: manifest.digests.update(dataset=bytes(32)), "The rows of"),
        (
            lambda manifest: manifest.digests.update(known_answer=bytes(32)),
            "version of the canonical arithmetic",
        ),
        (lambda manifest: manifest.rewards.update(exact_match=99), "The run uses reward functions"),
        (lambda manifest: manifest.layout.pop(), "laid out differently"),
        (lambda manifest: setattr(manifest, "protocol", "hivegrpo/2"), "speaks 'hivegrpo/2'"),
        (lambda manifest: setattr(manifest, "config", '{"run": {}}'), "The run's configuration"),
        (lambda manifest: setattr(manifest.model[0], "name", "../model.py"), "wants to send a file"),
    ],
    ids=["base", "tokenizer", "dataset", "arithmetic", "rewards", "layout", "protocol", "config", "file name"],
)
def test_a_run_that_this_machine_does_not_agree_with_is_not_joined(
    tmp_path: Path, change: Callable[[pb.RunManifest], None], says: str
) -> None:
    with pytest.raises(MismatchError, match=says) as refused:
        join(tmp_path, change, no_versions)
    assert refused.value.exit_code == 76
    assert refused.value.hint


@pytest.mark.parametrize(
    "entries",
    [
        forged,
        signed_by_another,
        lambda run_id: genesis(run_id, version=1),
        lambda run_id: genesis(run_id, parent=digest_of(b"another run")),
        lambda run_id: genesis(run_id) * 2,
    ],
    ids=["forged", "another signer", "gap", "another run", "repeated"],
)
def test_a_chain_that_does_not_verify_is_not_joined(
    tmp_path: Path, entries: Callable[[str], list[pb.ChainEntry]]
) -> None:
    with pytest.raises(ChainError, match=r"[Vv]ersion [01]") as refused:
        join(tmp_path, unchanged, entries)
    assert refused.value.exit_code == 76
    assert "do not contribute" in refused.value.hint


def test_a_manifest_that_another_signed_is_not_joined(tmp_path: Path) -> None:
    def claim(manifest: pb.RunManifest) -> None:
        manifest.coordinator = Identity.generate().peer_id

    with pytest.raises(ChainError, match="run manifest does not verify"):
        join(tmp_path, claim, no_versions)


def test_an_address_where_no_run_is_served_is_explained(tmp_path: Path) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        network.join(COORDINATOR)

        async def make_transport(identity: Identity, key: Path, settings: PeerConfig, address: str) -> Transport:
            return network.join(identity)

        settings = PeerConfig(home=tmp_path / "peer")
        address = network.address(COORDINATOR.peer_id)
        await run_peer(address, settings, asyncio.Event(), lambda record: None, make_transport=make_transport)

    with pytest.raises(UnreachableError, match="serves no run") as refused:
        asyncio.run(scenario())
    assert refused.value.exit_code == 69


@pytest.mark.slow
def test_an_unreachable_coordinator_and_a_busy_port_have_their_exit_codes(tmp_path: Path) -> None:
    config = addition_config(tmp_path)

    async def scenario() -> None:
        async with machine(tmp_path) as host:
            with socket.create_server(("127.0.0.1", 0)) as taken:
                port = taken.getsockname()[1]
                busy = await host.coordinator(config, "--port", str(port))
                assert await busy.ended() == 75
                assert str(port) in busy.lines[-1]
            gone = await host.peer(f"/ip4/127.0.0.1/tcp/{port}/p2p/{COORDINATOR.peer_id}", "lonely")
            assert await gone.ended() == 69
            assert gone.lines[-1].startswith("Error: ")

    asyncio.run(scenario())
