"""Records of who holds versions: signed by whom they speak of, short-lived, few; and never more than hints."""

from collections.abc import Callable

import pytest

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import sign
from hivegrpo.protocol.errors import FrameError, SignatureError, StaleError, WireError
from hivegrpo.protocol.holders import LIFE_SECONDS, MAX_RECORDS, MAX_TAKEN, MAX_TOLD, SKEW_SECONDS, HolderBook
from hivegrpo.protocol.identity import Identity

RUN = "a" * 64
NOW = 1_800_000_000.0
ME, HOLDER, OTHER = (Identity.generate() for _ in range(3))


def address(of: Identity) -> str:
    return f"/ip4/10.0.0.1/tcp/4001/p2p/{of.peer_id}"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def book_of(identity: Identity, clock: Clock, learned: list[pb.Endpoint] | None = None) -> HolderBook:
    learn = (lambda endpoint: None) if learned is None else learned.append
    return HolderBook(RUN, identity, lambda: [address(identity)], learn, clock)


def test_a_record_says_where_a_holder_is_until_it_expires() -> None:
    clock, learned = Clock(), list[pb.Endpoint]()
    book = book_of(ME, clock, learned)
    book.take(book_of(HOLDER, clock).own(), signer=HOLDER.peer_id)
    assert book.known() == [HOLDER.peer_id]
    assert [(endpoint.peer, list(endpoint.addresses)) for endpoint in learned] == [(HOLDER.peer_id, [address(HOLDER)])]
    assert [record.signer for record in book.others(OTHER.peer_id)] == [HOLDER.peer_id]
    assert book.others(HOLDER.peer_id) == []
    clock.now += LIFE_SECONDS
    assert book.known() == book.others(OTHER.peer_id) == []


def _signed_by_another(holder: pb.Holder) -> pb.Signed:
    return sign(OTHER, RUN, holder)


def _of_another_run(holder: pb.Holder) -> pb.Signed:
    return sign(HOLDER, "b" * 64, holder)


def _of_another_type(holder: pb.Holder) -> pb.Signed:
    signed = sign(HOLDER, RUN, holder)
    signed.type = "Endpoint"
    return signed


def _tampered(holder: pb.Holder) -> pb.Signed:
    signed = sign(HOLDER, RUN, holder)
    signed.payload = signed.payload[:-1] + bytes([signed.payload[-1] ^ 1])
    return signed


def _expired(holder: pb.Holder) -> pb.Signed:
    holder.expires = int(NOW)
    return sign(HOLDER, RUN, holder)


def _for_ever(holder: pb.Holder) -> pb.Signed:
    holder.expires = int(NOW + LIFE_SECONDS + SKEW_SECONDS) + 1
    return sign(HOLDER, RUN, holder)


def _elsewhere(holder: pb.Holder) -> pb.Signed:
    holder.addresses[0] = address(OTHER)
    return sign(HOLDER, RUN, holder)


def _many_addresses(holder: pb.Holder) -> pb.Signed:
    holder.addresses.extend([address(HOLDER)] * 17)
    return sign(HOLDER, RUN, holder)


def _too_large(holder: pb.Holder) -> pb.Signed:
    signed = sign(HOLDER, RUN, holder)
    signed.signature = bytes(9000)
    return signed


@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (_signed_by_another, FrameError),
        (_of_another_run, SignatureError),
        (_of_another_type, SignatureError),
        (_tampered, SignatureError),
        (_expired, StaleError),
        (_for_ever, StaleError),
        (_elsewhere, FrameError),
        (_many_addresses, FrameError),
        (_too_large, FrameError),
    ],
)
def test_a_record_that_does_not_verify_is_not_kept(
    forge: Callable[[pb.Holder], pb.Signed], error: type[WireError]
) -> None:
    learned = list[pb.Endpoint]()
    book = book_of(ME, Clock(), learned)
    holder = pb.Holder(peer=HOLDER.peer_id, addresses=[address(HOLDER)], expires=int(NOW + LIFE_SECONDS))
    book.take(sign(HOLDER, RUN, holder))
    learned.clear()
    record = forge(holder)
    with pytest.raises(error):
        book.take(record)
    book.take_hints({HOLDER.peer_id: record.SerializeToString()})
    book.take_told([record])
    assert learned == []


def test_nobody_speaks_for_another() -> None:
    clock = Clock()
    book = book_of(ME, clock)
    with pytest.raises(SignatureError):
        book.take(book_of(HOLDER, clock).own(), signer=OTHER.peer_id)
    book.take_hints({OTHER.peer_id: book_of(HOLDER, clock).own().SerializeToString(), "x": b"\xff", "y": bytes(9000)})
    assert book.known() == []
    book.take(book_of(ME, clock).own())
    assert book.known() == [], "oneself is no other holder"


def test_there_is_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivegrpo.protocol.holders.MAX_RECORDS", 20)
    clock = Clock()
    book = book_of(ME, clock)
    crowd = [Identity.generate() for _ in range(MAX_TAKEN + 6)]
    hints = {one.peer_id: book_of(one, clock).own().SerializeToString() for one in crowd}
    book.take_hints(hints)
    taken = [one.peer_id for one in crowd[:MAX_TAKEN]]
    assert book.known() == taken[::-1][:20]
    assert len(book.others(ME.peer_id)) == MAX_TOLD < 20 < MAX_RECORDS
