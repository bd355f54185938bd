"""How many files a process may have open."""

import asyncio
import resource
import sys
from pathlib import Path

import pytest

from hivegrpo.cli import network
from hivegrpo.coordinator.planning import LARGEST_ROSTER
from hivegrpo.protocol.config import PeerConfig
from hivegrpo.protocol.errors import BusyError
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.limits import open_files
from hivegrpo.protocol.transport.p2p import P2PTransport

ALL = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "files"),
    [
        (256, 4096, 1000, 1000),
        (256, 512, 1000, 512),
        (256, ALL, 1000, 1000),
        (2000, 4096, 1000, 2000),
        (ALL, ALL, 1000, sys.maxsize),
    ],
)
def test_the_limit_is_raised_as_far_as_is_needed_and_let(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, files: int
) -> None:
    set_to = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: set_to[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert open_files(wanted) == files
    assert set_to[-1] == (soft if files == sys.maxsize else files, hard)
    assert len(set_to) == (1 if soft in (files, ALL) else 2)


def test_a_system_that_lets_nothing_be_raised_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, limits: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, ALL))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert open_files(1000) == 256


def test_a_daemon_has_room_for_the_streams_of_a_full_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    async def create(*_: object) -> None:
        assert asked, "the limit is raised before there are streams"
        raise BusyError("the port is taken", "")

    monkeypatch.setattr(network, "open_files", asked.append)
    monkeypatch.setattr(P2PTransport, "create", create)

    async def scenario() -> None:
        with pytest.raises(BusyError):
            await network.Network().open(Identity.generate(), tmp_path, PeerConfig())

    asyncio.run(scenario())
    assert asked[0] > LARGEST_ROSTER
