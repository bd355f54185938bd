"""Who computes which span again: drawn from a seed that nobody but the coordinator knows before the spans are fixed.

The seed is told once a quorum has voted for the spans: a reducer that knew beforehand what is audited would lie where
nobody looks. It follows from the seal and the coordinator's secret, so it is the same after a restart. Everybody draws
the same from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_digest
from hivegrpo.protocol.errors import FrameError

MAX_AUDITS = 2
"""Agreeing audits of one span, at most, before it is committed: with two, no single auditor can cover a reducer."""

TURNS = 3
"""Further turns that a span's auditors get, one peer each, before the attempt is given up."""

MAX_PROOF_BYTES = 64 << 20
"""Largest proof of fault: one chunk of each of 3,700 contributors in an 8-bit codec, or of 960 in fp32."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A span that has to be audited."""

    span: int
    needed: int
    """Auditors that must agree."""
    order: tuple[str, ...]
    """The roster without the span's reducer, by lot: the first `needed` begin at once, then one peer after another."""

    def starts(self, rank: int, seconds: float) -> float:
        """When the turn of the auditor with this rank begins, seconds after the seed, if turns take `seconds`."""
        return max(0, rank - self.needed + 1) * seconds


NOTICE = "audit"
"""Kind of the Notice that tells the seed."""


def seed_of(secret: bytes, seal: bytes) -> bytes:
    """SHA-256("audits" | secret | digest of the seal)."""
    return sha256(b"audits" + secret + seal).digest()


def seed_notice(seal: bytes, seed: bytes) -> bytes:
    """The payload of the Notice that tells the roster the seed of a seal."""
    return pb.Notice(kind=NOTICE, text=f"{seal.hex()} {seed.hex()}").SerializeToString(deterministic=True)


def read_seed(notice: pb.Notice) -> tuple[bytes, bytes]:
    """Digest of the seal, and the seed. FrameError if the notice does not have them."""
    try:
        seal, seed = map(bytes.fromhex, notice.text.split(" "))
    except ValueError:
        raise FrameError("a notice of audits without a seal and a seed") from None
    check_digest(seal, "the notice's seal")
    check_digest(seed, "the notice's seed")
    return seal, seed


def draw(plan: pb.RoundPlan, seed: bytes, rate: float) -> tuple[Draw, ...]:
    """The spans that are audited under this seed: each with probability `rate`.

    Of those, the same share needs a second auditor. A third of the roster may be silent, as with votes, so no more are
    needed than the others; one at least, where there is anybody but the reducer.
    """
    drawn = []
    roster = [contributor.peer for contributor in plan.contributors]
    for span, reducer in enumerate(plan.reducers):
        begin, lots = b"audit" + seed + span.to_bytes(4, "big"), 0
        while lots < MAX_AUDITS and _lot(begin, str(lots)) < int(rate * 2**64):
            lots += 1
        if not lots:
            continue
        others = [peer for peer in roster if peer != reducer.peer]
        if others:
            most = max(1, len(others) - len(roster) // 3)
            drawn.append(Draw(span, min(lots, most), _by_lot(others, begin)))
    return tuple(drawn)


def receipt_of(plan: bytes, seal: bytes, span: int, content: pb.Blob) -> bytes:
    """The payload of a SpanReceipt, as its reducer signs it and as whoever knows the content makes it again."""
    content = pb.Blob(root=content.root, size=content.size)
    return pb.SpanReceipt(plan=plan, seal=seal, span=span, content=content).SerializeToString(deterministic=True)


def _by_lot(peers: Sequence[str], begin: bytes) -> tuple[str, ...]:
    return tuple([peer for _, peer in sorted([(_lot(begin, peer), peer) for peer in peers])])


def _lot(begin: bytes, name: str) -> int:
    """The first 64 bits of SHA-256(begin | name), where `begin` is "audit" | seed | span, 4 bytes."""
    return int.from_bytes(sha256(begin + name.encode()).digest()[:8], "big")
