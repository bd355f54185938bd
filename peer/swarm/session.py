"""This peer's standing with the coordinator: the newest signed facts it was told, and the reports it makes.

The connection is remade whenever it breaks; after each join the coordinator tells again whatever is current, and
reports are idempotent, so nothing depends on a connection that lasts.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import structlog
from google.protobuf.message import Message

from hivegrpo.peer.swarm.directory import Directory
from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.audits import NOTICE, read_seed
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.checks import check_addresses, check_lease, check_manifest, check_plan, check_seal
from hivegrpo.protocol.envelope import Opened, open_signed, parse, sign
from hivegrpo.protocol.errors import (
    BusyError,
    FrameError,
    MismatchError,
    SignatureError,
    StaleError,
    UnreachableError,
    WireError,
)
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.text import printable
from hivegrpo.protocol.transport.base import MAX_CALL_BYTES, Stream, Transport

log = structlog.get_logger(__name__)

FOLLOW = "follow"
REPORT = "report"
PUSH_PATIENCE = 3600.0
"""Longest silence on the follow stream, seconds; heartbeats notice a dead coordinator long before."""
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 1.0
GIVE_UP_SECONDS = 600.0
"""A coordinator that cannot be reached for so long is given up."""

FORK = "fork: "
"""How a coordinator begins its last answer when a peer shows it that it was started from an old copy of its home."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Session:
    """Follows the coordinator. Reading attributes is free; `wait` sleeps until one of them makes a condition true."""

    def __init__(
        self,
        *,
        address: str,
        chain: Chain,
        identity: Identity,
        transport: Transport,
        directory: Directory,
        join: Callable[[], pb.Join],
    ) -> None:
        self.coordinator = chain.coordinator
        self.lease: Opened[pb.Lease] | None = None
        self.plan: Opened[pb.RoundPlan] | None = None
        self.seal: Opened[pb.Seal] | None = None
        self.head: Opened[pb.VersionManifest] | None = None
        self.audit_seed: tuple[bytes, bytes] | None = None
        """Digest of the seal whose spans are to be audited, and the seed that says which, and by whom."""
        self.finished = False
        self.paused = False
        """Whether the run grants no leases for now."""
        self.connected = False
        self.joins = 0
        self._address = address
        self._chain = chain
        self._run_id = chain.run_id
        self._identity = identity
        self._transport = transport
        self._directory = directory
        self._join = join
        self._changed = asyncio.Condition()
        self._takers: dict[str, Callable[[pb.Signed], None]] = {
            "Welcome": self._take_welcome,
            "Lease": self._take_lease,
            "RoundPlan": self._take_plan,
            "Seal": self._take_seal,
            "VersionManifest": self._take_manifest,
            "Notice": self._take_notice,
        }

    async def run(self) -> None:
        """Stay joined until cancelled. MismatchError if refused, UnreachableError after ten minutes of silence.

        BusyError if this identity joins from elsewhere.
        """
        loop = asyncio.get_running_loop()
        silent_since = loop.time()
        backoff = FIRST_BACKOFF
        while True:
            try:
                await self._follow()
            except WireError as error:
                log.debug("the session broke", reason=str(error))
            except UnreachableError as error:
                log.debug("the coordinator is out of reach", reason=str(error))
            if self.finished:
                return
            if self.connected:
                log.info("lost the coordinator; joining again")
                silent_since, backoff = loop.time(), FIRST_BACKOFF
                await self._set_connected(False)
            if loop.time() - silent_since > GIVE_UP_SECONDS:
                raise UnreachableError(
                    f"The coordinator at {self._address} has been out of reach for {GIVE_UP_SECONDS:.0f} s.",
                    "When it is back, or has a new address, start this peer again: it resumes from its home folder.",
                )
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)

    async def wait(self, condition: Callable[[], T | None]) -> T:
        """Sleep until `condition` returns something; the caller bounds the wait."""
        async with self._changed:
            while (result := condition()) is None:
                await self._changed.wait()
            return result

    async def touch(self) -> None:
        """Have waiting conditions evaluated again, after something else they depend on has changed."""
        async with self._changed:
            self._changed.notify_all()

    async def report(self, message: Message, while_true: Callable[[], bool]) -> pb.Ack | None:
        """Deliver a signed report, again and again while it still matters; None if it stopped to matter first."""
        signed = sign(self._identity, self._run_id, message).SerializeToString()
        assert len(signed) <= MAX_CALL_BYTES
        backoff = FIRST_BACKOFF
        while while_true():
            try:
                answer = await self._transport.call(self.coordinator, REPORT, signed)
                return parse(pb.Ack, answer)
            except WireError as error:
                log.debug("a report was not delivered", kind=message.DESCRIPTOR.name, reason=str(error))
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LAST_BACKOFF)
        return None

    async def tell(self, message: Message) -> None:
        """Send a report once; nothing happens if it is lost."""
        signed = sign(self._identity, self._run_id, message).SerializeToString()
        try:
            await self._transport.call(self.coordinator, REPORT, signed)
        except WireError as error:
            log.debug("a message was lost", kind=message.DESCRIPTOR.name, reason=str(error))

    async def _follow(self) -> None:
        await self._transport.connect([self._address])
        async with await self._transport.open_stream(self.coordinator, FOLLOW) as stream:
            await stream.send(sign(self._identity, self._run_id, self._join()).SerializeToString())
            ack = parse(pb.Ack, await stream.receive(MAX_CALL_BYTES))
            if not ack.accepted and ack.reason.startswith(FORK):
                log.error("the coordinator is older than this peer; waiting for a newer one", it=printable(ack.reason))
                raise StaleError("the coordinator lacks a version that it signed")
            if not ack.accepted:
                raise MismatchError(f"The coordinator refuses this peer: {printable(ack.reason)}.", REFUSED_HINT)
            await self._set_connected(True)
            while not self.finished:
                await self._take(stream)

    async def _take(self, stream: Stream) -> None:
        frame = await stream.receive(MAX_CALL_BYTES, timeout=PUSH_PATIENCE)
        try:
            signed = parse(pb.Signed, frame)
            taker = self._takers.get(signed.type)
            if taker is None:
                raise FrameError(f"a push of unknown type {signed.type[:40]!r}")
            async with self._changed:
                taker(signed)
                self._changed.notify_all()
        except WireError as error:
            name = type(error).__name__
            self._transport.rejected[name] = self._transport.rejected.get(name, 0) + 1
            log.warning("dropped a push from the coordinator", error=name, reason=str(error))

    def _open(self, signed: pb.Signed, kind: type[M]) -> Opened[M]:
        return open_signed(signed, self._run_id, kind, signer=self.coordinator)

    def _take_welcome(self, signed: pb.Signed) -> None:
        welcome = self._open(signed, pb.Welcome).message
        for holder in welcome.holders:
            check_addresses(holder.addresses)
        self._directory.learn(welcome.holders)

    def _take_lease(self, signed: pb.Signed) -> None:
        lease = self._open(signed, pb.Lease)
        check_lease(lease.message)
        if lease.message.peer != self._identity.peer_id:
            raise StaleError("a lease for another peer")
        self.lease = lease

    def _take_plan(self, signed: pb.Signed) -> None:
        plan = self._open(signed, pb.RoundPlan)
        check_plan(plan.message)
        if self.plan and _place(plan.message) < _place(self.plan.message):
            raise StaleError("a plan older than the current one")
        if self.plan and _place(plan.message) == _place(self.plan.message) and plan.digest != self.plan.digest:
            raise SignatureError(f"a second plan for attempt {plan.message.attempt} at version {plan.message.version}")
        self.plan = plan

    def _take_seal(self, signed: pb.Signed) -> None:
        seal = self._open(signed, pb.Seal)
        if self.plan is None or seal.message.plan != self.plan.digest:
            raise StaleError("a seal for another plan than the current one")
        check_seal(seal.message, self.plan.message)
        if self.seal and self.seal.message.plan == seal.message.plan and self.seal.digest != seal.digest:
            raise SignatureError("a second seal of the same plan")
        self.seal = seal

    def _take_manifest(self, signed: pb.Signed) -> None:
        manifest = self._chain.open_version(signed)
        check_manifest(manifest.message)
        version = manifest.message.version
        held = self._chain.entries[version].manifest if version <= self._chain.height else self.head
        if held is not None and held.message.version == version and held.digest != manifest.digest:
            raise SignatureError(f"a second version {version} under the coordinator's signature: the chain is forked")
        if self.head is not None and version < self.head.message.version:
            raise StaleError("a version older than the head")
        self.head = manifest

    def _take_notice(self, signed: pb.Signed) -> None:
        notice = self._open(signed, pb.Notice).message
        match notice.kind:
            case "finished":
                self.finished = True
            case "paused" | "resumed":
                self.paused = notice.kind == "paused"
            case "replaced":
                raise BusyError(
                    "This identity has joined the run from elsewhere, and takes part there from now on.",
                    "Run it in one place; a second machine, or a second --home, has an identity of its own.",
                )
            case _ if notice.kind == NOTICE:
                self.audit_seed = read_seed(notice)

    async def _set_connected(self, connected: bool) -> None:
        async with self._changed:
            self.connected = connected
            self.joins += connected
            self.paused = False
            self._changed.notify_all()


def _place(plan: pb.RoundPlan) -> tuple[int, int]:
    return (plan.version, plan.attempt)


REFUSED_HINT = "See docs/operations.md, section Joining, for what each refusal means."
