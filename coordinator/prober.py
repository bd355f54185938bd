"""Asking whether peers can be dialled by strangers, without becoming anybody's port scanner.

An identity costs nothing, and a join names up to 16 addresses. So: a few addresses of a join, those that parse and end
in the peer's own id; one probe of a peer at a time, and no new one for a while; few at once in all, and few a second.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from hivegrpo.protocol.address import parse_address
from hivegrpo.protocol.errors import ConfigError

MOST_ADDRESSES = 3
"""Of a join that are tried."""

AT_ONCE = 4
SPACING = 0.25
"""Seconds after a probe before its worker makes the next one: at most 16 probes, of 48 addresses, a second."""

TIMEOUT = 3.0
RETRY_SECONDS = 5.0
"""Pause before the second and last try of a peer that did not answer."""

PEER_SECONDS = 30.0
"""Pause between two joins of one peer that are probed."""

MOST_WAITING = 1024
"""Peers beyond that are not probed; they count as peers of whom nothing is known."""

Probe = Callable[[list[str], float], Awaitable[bool]]


@dataclass(slots=True)
class _Wish:
    addresses: tuple[str, ...]
    due: float
    last: bool = False


class Prober:
    """Probes peers in tasks of its own."""

    def __init__(self, probe: Probe, on_result: Callable[[str, tuple[str, ...], bool], None]) -> None:
        """`on_result(peer, addresses of its join, whether it can be dialled)`."""
        self._probe = probe
        self._on_result = on_result
        self._waiting: dict[str, _Wish] = {}
        self._busy: set[str] = set()
        self._probed: dict[str, float] = {}
        """When a join of a peer was probed, oldest first, as far as that still matters."""
        self._news = asyncio.Event()

    def want(self, peer: str, addresses: tuple[str, ...]) -> None:
        """Probe a peer that has joined, as soon as the bounds allow."""
        if not probed_addresses(peer, addresses) or (peer not in self._waiting and len(self._waiting) >= MOST_WAITING):
            return
        now = asyncio.get_running_loop().time()
        self._waiting[peer] = _Wish(addresses, max(now, self._probed.get(peer, now - PEER_SECONDS) + PEER_SECONDS))
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as workers:
            for _ in range(AT_ONCE):
                workers.create_task(self._work())

    async def _work(self) -> None:
        while True:
            peer = await self._next()
            wish = self._waiting.pop(peer)
            self._busy.add(peer)
            try:
                reachable = await self._probe(probed_addresses(peer, wish.addresses), TIMEOUT)
            finally:
                self._busy.discard(peer)
            now = asyncio.get_running_loop().time()
            if reachable or wish.last:
                self._on_result(peer, wish.addresses, reachable)
            else:
                self._waiting.setdefault(peer, _Wish(wish.addresses, now + RETRY_SECONDS, last=True))
            self._note(peer, now)
            self._news.set()
            await asyncio.sleep(SPACING)

    async def _next(self) -> str:
        """The first peer whose time has come."""
        while True:
            now = asyncio.get_running_loop().time()
            open_ = {peer: wish.due for peer, wish in self._waiting.items() if peer not in self._busy}
            due = next((peer for peer, at in open_.items() if at <= now), None)
            if due is not None:
                return due
            self._news.clear()
            try:
                async with asyncio.timeout_at(min(open_.values(), default=None)):
                    await self._news.wait()
            except TimeoutError:
                pass  # that is what it waited for

    def _note(self, peer: str, now: float) -> None:
        self._probed.pop(peer, None)
        self._probed[peer] = now
        while (oldest := next(iter(self._probed))) and self._probed[oldest] <= now - PEER_SECONDS:
            del self._probed[oldest]


def probed_addresses(peer: str, addresses: Sequence[str]) -> list[str]:
    """Which of a peer's addresses to try: those that may be public first, loopback only if there is nothing else."""
    ranked = sorted((rank, index) for index, address in enumerate(addresses) if (rank := _rank(peer, address)) < _NEVER)
    best = [(rank, index) for rank, index in ranked if rank < _LOOPBACK] or ranked
    return [addresses[index] for _, index in best[:MOST_ADDRESSES]]


_PUBLIC, _PRIVATE, _LOOPBACK, _NEVER = range(4)


def _rank(peer: str, address: str) -> int:
    try:
        named, where = parse_address(address)
    except ConfigError:
        return _NEVER
    if named != peer:
        return _NEVER
    try:
        host = ipaddress.ip_address(where.split("/")[2])
    except ValueError:
        return _PUBLIC  # a name
    if host.is_unspecified or host.is_multicast or host.is_link_local:
        return _NEVER
    return _LOOPBACK if host.is_loopback else _PUBLIC if host.is_global else _PRIVATE
