"""Addresses that people paste."""

import pytest

from hivegrpo.protocol.address import EXAMPLE, parse_address
from hivegrpo.protocol.errors import ConfigError

PEER = "12D3KooWRuLaLpqnXwYL2fM8KxmBtGgFk8NMKmV2aHJEaVavSawY"


@pytest.mark.parametrize(
    "multiaddr",
    [
        "/ip4/203.0.113.7/tcp/4001",
        "/ip6/2001:db8::1/tcp/65535",
        "/dns4/hive.example.org/tcp/1",
        "/dns6/hive.example.org/tcp/1",
        "/dns/localhost/tcp/4001",
    ],
)
def test_an_address_is_a_peer_and_a_way_to_it(multiaddr: str) -> None:
    assert parse_address(f"{multiaddr}/p2p/{PEER}") == (PEER, multiaddr)


def test_a_pasted_line_may_have_space_around_it() -> None:
    assert parse_address(f"  {EXAMPLE}\n")[0] == EXAMPLE.rpartition("/")[2]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "203.0.113.7:4001",
        "/ip4/203.0.113.7/tcp/4001",
        f"/p2p/{PEER}",
        f"ip4/203.0.113.7/tcp/4001/p2p/{PEER}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER}/",
        f"/ip4/203.0.113.7/udp/4001/p2p/{PEER}",
        f"/ip4/203.0.113/tcp/4001/p2p/{PEER}",
        f"/ip4/::1/tcp/4001/p2p/{PEER}",
        f"/ip6/203.0.113.7/tcp/4001/p2p/{PEER}",
        f"/ip6/fe80::1%eth0/tcp/4001/p2p/{PEER}",
        f"/dns4/-hive.example.org/tcp/4001/p2p/{PEER}",
        f"/dns4/hive..org/tcp/4001/p2p/{PEER}",
        f"/dns4/{'a' * 64}.org/tcp/4001/p2p/{PEER}",
        f"/unix/tmp/tcp/4001/p2p/{PEER}",
        f"/ip4/203.0.113.7/tcp/0/p2p/{PEER}",
        f"/ip4/203.0.113.7/tcp/65536/p2p/{PEER}",
        f"/ip4/203.0.113.7/tcp/٤/p2p/{PEER}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER[:-1]}",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER[:-1]}0",
        "/ip4/203.0.113.7/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
    ],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a node's address") as caught:
        parse_address(text)
    assert EXAMPLE in caught.value.hint
