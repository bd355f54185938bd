"""Who may join: invites against the real service, over the in-memory network."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import base58
import pytest
from pydantic import SecretStr
from support.runs import IntegerLearner, signed_run, small_config
from support.scripted import Node, ScriptedPeer, is_version, run
from support.swarm import Swarm

from hivegrpo.coordinator import orders
from hivegrpo.coordinator.service import Coordinator
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import MismatchError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.invites import PREFIX, make_token, open_token
from hivegrpo.protocol.transport.memory import MemoryNetwork

DAY = 86_400.0


class Clocked(Node):
    """With the clock of the wall, since tokens carry one, and what the test adds to it."""

    def clock(self) -> float:
        return time.time() + self.later


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Clocked(tmp_path / "coordinator", MemoryNetwork(), admission={"mode": "invite"})


async def invite(coordinator: Coordinator, **terms: Any) -> tuple[str, str]:
    """A token and its id."""
    answer = await coordinator.operator.execute(orders.MakeInvite(command="invite", **terms))
    return answer["token"], answer["invite"]


async def ask(node: Node, token: str, peer: ScriptedPeer | None = None) -> pb.Ack:
    """What the coordinator says to a join with this token, of a new peer if none is given."""
    peer = peer or ScriptedPeer(node)
    peer.invite = token
    async with peer.connected() as transport:
        _, ack = await peer.join(transport)
        return ack


def forged(node: Node) -> str:
    return make_token(Identity.generate(), node.run_id, "ab" * 8, int(time.time() + DAY), 1)


def altered(token: str) -> str:
    """The same token, for ten years."""
    data = base58.b58decode(token.removeprefix(PREFIX))
    changed = pb.Invite.FromString(data[64:])
    changed.expires += int(3650 * DAY)
    return f"{PREFIX}{base58.b58encode(data[:64] + changed.SerializeToString()).decode()}"


def test_a_token_lets_in_the_first_peer_that_uses_it_and_no_other(node: Node) -> None:
    async def test() -> None:
        first = ScriptedPeer(node)
        async with node.running() as coordinator:
            token, name = await invite(coordinator, note="for Ann")
            assert (await ask(node, token, first)).accepted
            ack = await ask(node, token)
            assert not ack.accepted
            assert ack.reason.startswith(f"invite: invite {name} was used by another peer, and serves no further one")
            assert list(coordinator.state.members) == [first.peer_id]
            assert (await ask(node, token, first)).accepted, "it may come back with it"
            assert (await ask(node, "", first)).accepted, "and without: it is a member"
        async with node.running() as coordinator:
            assert not (await ask(node, token)).accepted, "a restart does not forget"
            assert (await ask(node, "", first)).accepted
            (shown,) = (await coordinator.operator.execute(orders.Status(command="status")))["invites"]
            assert (shown["note"], shown["standing"], shown["joined"]) == ("for Ann", "used", [first.peer_id])

    run(test())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda node, token: "", "invite: this run admits by invite, and this peer came without one; ask whoever"),
        (lambda node, token: "no token", "invite: this is no whole token (a token begins with hive_"),
        (lambda node, token: token[:-1] + "0", "invite: this is no whole token (it has characters that no token has)"),
        (lambda node, token: token[:60], "invite: this is no whole token ("),
        (lambda node, token: PREFIX + "z" * 5000, "invite: this is no whole token (a token begins with hive_"),
        (lambda node, token: forged(node), "invite: this token is forged or damaged (this run's coordinator did not"),
        (lambda node, token: altered(token), "invite: this token is forged or damaged (this run's coordinator did not"),
    ],
    ids=["missing", "words", "mistyped", "cut", "endless", "forged", "altered"],
)
def test_what_is_no_token_of_this_coordinator_is_refused(
    node: Node, spoil: Callable[[Node, str], str], reason: str
) -> None:
    async def test() -> None:
        async with node.running() as coordinator:
            token, _ = await invite(coordinator)
            ack = await ask(node, spoil(node, token))
            assert not ack.accepted
            assert ack.reason.startswith(reason), ack.reason
            assert coordinator.state.members == {}
            assert (await ask(node, token)).accepted, "and the token that it was made from is not spent"

    run(test())


def test_a_token_of_another_run_is_refused_by_its_name(node: Node, tmp_path: Path) -> None:
    async def test() -> None:
        other = Clocked(tmp_path / "other", MemoryNetwork(), admission={"mode": "invite"}, run={"name": "other"})
        other.identity = node.identity
        async with node.running():
            token = make_token(other.identity, other.run_id, "ab" * 8, int(time.time() + DAY), 0)
            ack = await ask(node, token)
            wanted = f"invite: this token is for another run (it is for run {other.run_id[:16]}, and this is run"
            assert ack.reason.startswith(wanted), ack.reason
            relabelled = pb.Invite.FromString(base58.b58decode(token.removeprefix(PREFIX))[64:])
            relabelled.run = bytes.fromhex(node.run_id)[:8]
            data = base58.b58decode(token.removeprefix(PREFIX))[:64] + relabelled.SerializeToString()
            ack = await ask(node, f"{PREFIX}{base58.b58encode(data).decode()}")
            assert ack.reason.startswith("invite: this token is forged"), "the signature covers the run"

    run(test())


def test_a_token_expires_by_the_coordinator_s_clock(node: Node) -> None:
    async def test() -> None:
        async with node.running() as coordinator:
            token, name = await invite(coordinator, hours=24.0, uses=0)
            node.later = DAY - 60.0
            early = ScriptedPeer(node)
            assert (await ask(node, token, early)).accepted
            node.later = DAY + 7200.0
            ack = await ask(node, token)
            assert ack.reason.startswith(f"invite: invite {name} expired 2 hours ago; ask whoever launched the run")
            assert (await ask(node, token, early)).accepted, "members stay"

    run(test())


def test_a_revoked_token_lets_nobody_in_and_nobody_out(node: Node) -> None:
    async def test() -> None:
        early = ScriptedPeer(node)
        async with node.running() as coordinator:
            token, name = await invite(coordinator, uses=0)
            assert (await ask(node, token, early)).accepted
            answer = await coordinator.operator.execute(orders.Revoke(command="revoke", invite=token))
            assert answer == {"invite": name, "joined": [early.peer_id]}
            assert (await ask(node, token)).reason.startswith(f"invite: invite {name} was revoked; ask")
        async with node.running():
            assert (await ask(node, token)).reason.startswith(f"invite: invite {name} was revoked; ask")
            assert (await ask(node, token, early)).accepted

    run(test())


def test_a_token_for_several_counts_peers_and_not_joins(node: Node) -> None:
    async def test() -> None:
        async with node.running() as coordinator:
            token, name = await invite(coordinator, uses=2)
            one, two = ScriptedPeer(node), ScriptedPeer(node)
            for peer in (one, one, two, one, two):
                assert (await ask(node, token, peer)).accepted
            ack = await ask(node, token)
            assert ack.reason.startswith(f"invite: invite {name} was used by 2 other peers")

    run(test())


def test_of_two_that_come_at_once_with_one_token_one_is_let_in(node: Node) -> None:
    async def test() -> None:
        async with node.running() as coordinator:
            token, _ = await invite(coordinator)
            answers = await asyncio.gather(*(ask(node, token) for _ in range(8)))
            assert sum(ack.accepted for ack in answers) == 1
            assert len(coordinator.state.members) == 1

    run(test())


def test_listed_peers_need_no_token_and_a_ban_outweighs_it(tmp_path: Path) -> None:
    async def test() -> None:
        listed = Identity.generate()
        node = Clocked(tmp_path / "c", MemoryNetwork(), admission={"mode": "invite", "peers": [listed.peer_id]})
        async with node.running() as coordinator:
            assert (await ask(node, "", ScriptedPeer(node, listed))).accepted
            token, _ = await invite(coordinator)
            bad = ScriptedPeer(node)
            order = orders.BanPeer(command="ban", peer=bad.peer_id, reason="it spams", hours=1.0)
            await coordinator.operator.execute(order)
            assert (await ask(node, token, bad)).reason.startswith("banned: it spams (until ")
            assert (await ask(node, token)).accepted, "its token is not spent"

    run(test())


def test_a_run_by_invite_trains(node: Node) -> None:
    async def test() -> None:
        async with node.running() as coordinator:
            token, _ = await invite(coordinator, uses=3)
            peers = [ScriptedPeer(node, invite=token) for _ in range(3)]
            async with peers[0].online(), peers[1].online(), peers[2].online():
                await peers[0].until(is_version(2))

    run(test())


def test_a_token_is_short_enough_to_paste_and_has_no_character_to_trip_over() -> None:
    identity = Identity.generate()
    token = make_token(identity, "5" * 64, "ab" * 8, 2**32, 0xFFFFFFFF)
    assert len(token) < 150
    assert token.removeprefix(PREFIX).isalnum()
    assert open_token(token, "5" * 64, identity.peer_id).uses == 0xFFFFFFFF


def test_a_real_peer_is_refused_without_a_token_and_joins_with_it(tmp_path: Path) -> None:
    config = small_config(admission={"mode": "invite"}, run={"start_peers": 1, "versions": 1})
    coordinator = Identity.generate()
    swarm = Swarm(tmp_path, config, signed_run(coordinator, config), coordinator)

    async def test() -> None:
        await swarm.start_coordinator()
        assert swarm.service is not None
        refused = await swarm.start_peer("a", IntegerLearner(40_000))
        with pytest.raises(MismatchError, match="refuses this peer: invite: this run admits by invite, and this peer"):
            await refused.task
        token, _ = await invite(swarm.service)
        joined = await swarm.start_peer("a", IntegerLearner(40_000), invite=token)
        await joined.task
        assert swarm.coordinator is not None
        await swarm.coordinator.leave()

    run(test())


def test_a_peer_s_token_comes_from_its_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVEGRPO_PEER_INVITE", "hive_secret")
    settings = PeerConfig.load()
    assert settings.invite is not None
    assert settings.invite.get_secret_value() == "hive_secret"
    assert "secret" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert PeerConfig.load(invite="hive_flag").invite == SecretStr("hive_flag")
