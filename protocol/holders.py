"""Who says that it holds versions of a run, or some pieces: signed, short-lived records. They are hints only.

They travel in the DHT, and between peers that fetch the same blob (`BlobRequest.holder`, `PieceMap.others`). Nobody can
speak for another peer, or for longer than minutes; a record that is false costs a dial in vain.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import structlog

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import MAX_ADDRESSES, check_addresses
from hivegrpo.protocol.envelope import open_signed, parse, sign
from hivegrpo.protocol.errors import FrameError, StaleError, WireError
from hivegrpo.protocol.identity import Identity

LIFE_SECONDS = 180.0
"""How long a record holds; it is made anew three times in that time."""

SKEW_SECONDS = 60.0
"""By how much clocks may differ."""

MAX_RECORD_BYTES = 8 << 10
MAX_RECORDS = 256
"""Records that are kept; the oldest are forgotten."""

MAX_TAKEN = 64
"""Records of one answer of the DHT that are looked at."""

MAX_TOLD = 16
"""Records that are passed on with one map of pieces."""

log = structlog.get_logger(__name__)


def holders_key(run_id: str) -> str:
    """Where a run's records are in the DHT."""
    return f"{run_id[:16]}/holders"


class HolderBook:
    """What one node knows of the holders of one run, and what it says of itself."""

    def __init__(
        self,
        run_id: str,
        identity: Identity,
        addresses: Callable[[], list[str]],
        learn: Callable[[pb.Endpoint], None] = lambda endpoint: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`learn` is told where a holder can be dialled; `clock` gives seconds since 1970."""
        self._run_id = run_id
        self._identity = identity
        self._addresses = addresses
        self._learn = learn
        self._clock = clock
        self._records: OrderedDict[str, tuple[pb.Signed, float]] = OrderedDict()

    def own(self) -> pb.Signed:
        """This node's record, from now on."""
        expires = int(self._clock() + LIFE_SECONDS)
        addresses = self._addresses()[:MAX_ADDRESSES]
        return sign(
            self._identity, self._run_id, pb.Holder(peer=self._identity.peer_id, addresses=addresses, expires=expires)
        )

    def take(self, signed: pb.Signed, signer: str | None = None) -> None:
        """Keep a record that verifies, in place of the peer's last one.

        WireError if it is too large, not signed by the peer it speaks of (who must be `signer`, if one is named), has
        addresses of somebody else, has expired, or claims to hold for longer than records do.
        """
        if signed.ByteSize() > MAX_RECORD_BYTES:
            raise FrameError(f"a record of {signed.ByteSize()} bytes; at most {MAX_RECORD_BYTES} are taken")
        opened = open_signed(signed, self._run_id, pb.Holder, signer=signer)
        holder, now = opened.message, self._clock()
        check_addresses(holder.addresses)
        if holder.peer != opened.signer or any(not at.endswith(f"/p2p/{holder.peer}") for at in holder.addresses):
            raise FrameError("a record that speaks of somebody else than its signer")
        if not now < holder.expires <= now + LIFE_SECONDS + SKEW_SECONDS:
            raise StaleError("a record that has expired, or holds for too long")
        if holder.peer == self._identity.peer_id:
            return
        self._records.pop(holder.peer, None)
        self._records[holder.peer] = signed, holder.expires
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        self._learn(pb.Endpoint(peer=holder.peer, addresses=holder.addresses))

    def take_told(self, records: Sequence[pb.Signed]) -> None:
        """Keep those that verify of what somebody tells of others."""
        for signed in records:
            held = self._records.get(signed.signer)
            if held is None or held[0] != signed:
                with suppress(WireError):
                    self.take(signed)

    def take_hints(self, hints: Mapping[str, bytes]) -> None:
        """Keep those of an answer of the DHT that verify: by the peer that each is said to come from."""
        for peer, value in list(hints.items())[:MAX_TAKEN]:
            try:
                if len(value) > MAX_RECORD_BYTES:
                    raise FrameError(f"a record of {len(value)} bytes")
                self.take(parse(pb.Signed, value), signer=peer)
            except WireError as error:
                log.debug("a hint in the DHT does not verify", peer=peer[:60], reason=str(error))

    def others(self, asking: str) -> list[pb.Signed]:
        """Records to tell `asking` of: of others, the newest first, not yet expired."""
        now = self._clock()
        told = [record for peer, (record, ends) in reversed(self._records.items()) if peer != asking and now < ends]
        return told[:MAX_TOLD]

    def known(self) -> list[str]:
        """Peers with a record that has not expired, the newest first."""
        now = self._clock()
        return [peer for peer, (_, ends) in reversed(self._records.items()) if now < ends]
