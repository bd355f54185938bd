"""Error feedback: what comes back, when it does not, and that a restart changes nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from support.invariants import assert_invariants
from support.runs import IntegerLearner, signed_run, small_config, vector_of
from support.swarm import Swarm
from torch import Tensor

from hivegrpo.peer.feedback import ErrorFeedback
from hivegrpo.peer.floats import NonFiniteError
from hivegrpo.peer.home import PeerHome
from hivegrpo.peer.swarm.codecs.mxfp4 import MxFp4
from hivegrpo.peer.swarm.codecs.vectors import decode_vector
from hivegrpo.peer.swarm.contribution import EncodedVector
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.chain import Chain, Entry
from hivegrpo.protocol.chainfile import ChainFile
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.envelope import Opened
from hivegrpo.protocol.identity import Identity

MXFP4 = MxFp4()
VALUES = CHUNK_VALUES + 1_024
PEER = "me"
ROLLOUT_SECONDS = 0.3


def slowly(lease: int) -> None:
    """Work that takes longer than catching up by one version does."""
    time.sleep(ROLLOUT_SECONDS)


def gradient(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(seed)) * scale


def committed(version: int, root: bytes | None = None) -> Entry:
    """A version that counts this peer's contribution with that root, or none of it."""
    contributors = [pb.Contributor(peer="another", root=bytes(32))]
    if root is not None:
        contributors.append(pb.Contributor(peer=PEER, root=root))
    manifest = pb.VersionManifest(version=version, contributors=contributors)
    return Entry(Opened(manifest, bytes(32), "", pb.Signed()), None, None)


def decoded(encoded: EncodedVector) -> Tensor:
    return decode_vector(MXFP4, b"".join(encoded.chunks), VALUES)


def plain(vector: Tensor) -> EncodedVector:
    return EncodedVector.encode(MXFP4, vector)


@pytest.fixture
def feedback(tmp_path: Path) -> ErrorFeedback:
    return ErrorFeedback(tmp_path, MXFP4, PEER)


def test_what_is_lost_comes_back_once_its_contribution_is_committed(feedback: ErrorFeedback) -> None:
    first = feedback.encode(committed(0), gradient(1))
    assert first.root == plain(gradient(1)).root
    lost = gradient(1) - decoded(first)
    second = feedback.encode(committed(1, first.root), gradient(2))
    assert second.root == plain(gradient(2) + lost).root
    third = feedback.encode(committed(2, second.root), gradient(3))
    assert third.root == plain(gradient(3) + (gradient(2) + lost - decoded(second))).root


@pytest.mark.parametrize("root", [None, bytes(32)], ids=["not in the version", "other bytes of the peer's"])
def test_nothing_comes_back_of_a_contribution_that_was_not_committed(
    feedback: ErrorFeedback, root: bytes | None
) -> None:
    feedback.encode(committed(0), gradient(1))
    assert feedback.encode(committed(1, root), gradient(2)).root == plain(gradient(2)).root


def test_nothing_comes_back_after_a_version_was_skipped(feedback: ErrorFeedback, tmp_path: Path) -> None:
    first = feedback.encode(committed(0), gradient(1))
    second = feedback.encode(committed(1, first.root), gradient(2))
    # Version 2 counts `second`, but this peer comes back at version 3.
    third = feedback.encode(committed(3), gradient(3))
    assert third.root == plain(gradient(3)).root
    assert [path.name for path in tmp_path.iterdir()] == [f"00000004-{third.root.hex()}"]
    assert feedback.encode(committed(4, second.root), gradient(4)).root == plain(gradient(4)).root


def test_contributions_to_one_version_have_the_same_residual(feedback: ErrorFeedback, tmp_path: Path) -> None:
    first = feedback.encode(committed(0), gradient(1))
    lost = gradient(1) - decoded(first)
    given_up = feedback.encode(committed(1, first.root), gradient(2))
    again = feedback.encode(committed(1, first.root), gradient(3))
    assert again.root == plain(gradient(3) + lost).root
    assert given_up.root == plain(gradient(2) + lost).root
    assert len(list(tmp_path.iterdir())) == 2


def test_a_residual_is_no_longer_than_its_gradient(feedback: ErrorFeedback) -> None:
    large = feedback.encode(committed(0), gradient(1, 1000.0))
    # The residual is some 115 long for each that this gradient is, and so is what this encoding loses.
    small = feedback.encode(committed(1, large.root), gradient(2))
    lost = gradient(2) + (gradient(1, 1000.0) - decoded(large)) - decoded(small)
    assert lost.norm() > 5 * gradient(2).norm()
    zero = torch.zeros(VALUES)
    sent = feedback.encode(committed(2, small.root), zero)
    norms = [torch.linalg.vector_norm(vector, dtype=torch.float64).item() for vector in (gradient(2), lost)]
    expected = lost * (norms[0] / norms[1])
    assert sent.root == plain(expected).root
    assert expected.double().norm() <= gradient(2).double().norm() * (1 + 2.0**-23)  # a rounding of each value
    # What follows a gradient of zero is zero.
    assert feedback.encode(committed(3, sent.root), zero).root == plain(zero).root


def test_the_mean_of_what_is_sent_approaches_the_gradient(feedback: ErrorFeedback) -> None:
    """After T rounds the sum of what was sent lacks one residual, so the mean's error is that over T."""
    rounds, root, total = 40, None, torch.zeros(VALUES, dtype=torch.float64)
    for version in range(rounds):
        encoded = feedback.encode(committed(version, root), gradient(1))
        root, total = encoded.root, total + decoded(encoded).double()
    without = (decoded(plain(gradient(1))) - gradient(1)).norm() / gradient(1).norm()
    with_feedback = (total / rounds - gradient(1).double()).norm() / gradient(1).double().norm()
    assert without > 0.1
    # The residual's steady length is that of an encoding's loss, 11 to 12 percent of a vector a little longer.
    assert with_feedback < 0.15 / rounds


def test_a_gradient_that_is_not_finite_changes_nothing(feedback: ErrorFeedback, tmp_path: Path) -> None:
    first = feedback.encode(committed(0), gradient(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NonFiniteError):
        feedback.encode(committed(1, first.root), torch.full((VALUES,), torch.inf))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_restarted_peer_goes_on_with_the_same_residual(tmp_path: Path) -> None:
    first = ErrorFeedback(tmp_path / "a", MXFP4, PEER).encode(committed(0), gradient(1))
    restarted = ErrorFeedback(tmp_path / "a", MXFP4, PEER)
    lost = gradient(1) - decoded(first)
    assert restarted.encode(committed(1, first.root), gradient(2)).root == plain(gradient(2) + lost).root


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: data[:-1] + b"\x7f", lambda _: b""])
def test_a_damaged_residual_is_left_out(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    first = ErrorFeedback(tmp_path, MXFP4, PEER).encode(committed(0), gradient(1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    restarted = ErrorFeedback(tmp_path, MXFP4, PEER)
    assert restarted.encode(committed(1, first.root), gradient(2)).root == plain(gradient(2)).root


def make_swarm(folder: Path, versions: int, peers: int) -> Swarm:
    config = small_config(run={"start_peers": peers, "versions": versions}, averaging={"codec": "mxfp4"})
    coordinator = Identity.generate()
    return Swarm(folder, config, signed_run(coordinator, config, VALUES), coordinator)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60.0):
            await test()

    asyncio.run(bounded())


def assert_fed_back(chain: Chain, peer: str) -> list[int]:
    """The versions that count the peer: each with its gradient plus what the version before has lost, if it did count.

    Computed here from nothing but the chain and the gradients that the learner makes.
    """
    counted, residual = [], None
    for entry in chain.entries[1:]:
        mine = [item for item in entry.manifest.message.contributors if item.peer == peer]
        if not mine:
            residual = None
            continue
        wanted = vector_of(mine[0].lease, VALUES)
        wanted = wanted if residual is None else wanted + residual
        assert plain(wanted).root == mine[0].root
        residual = wanted - decoded(plain(wanted))
        counted.append(int(entry.manifest.message.version))
    return counted


def test_a_swarm_feeds_back_what_was_committed_and_drops_what_was_skipped(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, versions=9, peers=3)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        at_work = asyncio.Event()
        loop = asyncio.get_running_loop()
        gradients = 0

        def count(lease: int) -> None:
            nonlocal gradients
            gradients += 1
            if gradients == 3:
                loop.call_soon_threadsafe(at_work.set)

        for name in ("a", "b"):
            await swarm.start_peer(name, IntegerLearner(VALUES, before=slowly))
        victim = await swarm.start_peer("c", IntegerLearner(VALUES, before=count))
        await at_work.wait()
        await swarm.crash(victim)
        version = ChainFile.open(swarm.coordinator_home).chain.height
        await swarm.committed(version + 2)
        await swarm.start_peer("c", IntegerLearner(VALUES, before=slowly))
        await asyncio.gather(*(peer.task for peer in swarm.peers.values()))
        await coordinator.leave()

    run(scenario)
    chain = ChainFile.open(swarm.coordinator_home).chain
    assert assert_fed_back(chain, swarm.identities["a"].peer_id) == list(range(1, 10))
    counted = assert_fed_back(chain, swarm.identities["c"].peer_id)
    skipped = set(range(counted[0], counted[-1])) - set(counted)
    assert skipped
    assert counted[0] + 1 in counted  # there was a residual to be dropped
    assert_invariants(swarm)


def test_a_peer_that_crashes_and_comes_back_feeds_back_from_its_disk(tmp_path: Path) -> None:
    swarm = make_swarm(tmp_path, versions=4, peers=1)

    async def scenario() -> None:
        coordinator = await swarm.start_coordinator()
        at_work = asyncio.Event()
        loop = asyncio.get_running_loop()
        gradients = 0

        def count(lease: int) -> None:
            nonlocal gradients
            gradients += 1
            if gradients == 3:
                loop.call_soon_threadsafe(at_work.set)

        only = await swarm.start_peer("only", IntegerLearner(VALUES, before=count))
        await at_work.wait()
        await swarm.crash(only)
        assert any(PeerHome(only.home).feedback.glob("00000002-*"))
        await swarm.start_peer("only", IntegerLearner(VALUES))
        await swarm.peers["only"].task
        await coordinator.leave()

    run(scenario)
    chain = ChainFile.open(swarm.coordinator_home).chain
    assert assert_fed_back(chain, swarm.identities["only"].peer_id) == [1, 2, 3, 4]
    assert_invariants(swarm)
