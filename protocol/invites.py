"""Invites as text: what whoever launched a run hands to those who may join, to be pasted.

    hive_ | base58( signature, 64 bytes | Invite, serialized )

The coordinator signs it like any of its messages, so it serves for one run only. Base58 has no character at which a
double click, a shell or a mail program would cut it; it comes to about 130 characters.
"""

import base58

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import SIGNATURE_BYTES
from hivegrpo.protocol.envelope import open_signed, parse, sign
from hivegrpo.protocol.errors import FrameError, SignatureError, StaleError
from hivegrpo.protocol.identity import Identity

PREFIX = "hive_"
MAX_TOKEN = 256
"""Characters; decoding takes time that is quadratic in them."""

ID_BYTES = 8
RUN_BYTES = 8
MAX_USES = (1 << 32) - 1


def make_token(identity: Identity, run_id: str, invite_id: str, expires: int, uses: int) -> str:
    """The token of an invite under the coordinator's key; `invite_id` is 16 hex digits, `expires` Unix time."""
    run, id_bytes = bytes.fromhex(run_id)[:RUN_BYTES], bytes.fromhex(invite_id)
    assert len(id_bytes) == ID_BYTES
    signed = sign(identity, run_id, pb.Invite(run=run, id=id_bytes, expires=expires, uses=uses))
    text = base58.b58encode(signed.signature + signed.payload).decode("ascii")
    return f"{PREFIX}{text}"


def open_token(token: str, run_id: str, coordinator: str) -> pb.Invite:
    """The invite of a token for this run.

    FrameError if it is no token, or not a whole one; StaleError if it is for another run; SignatureError if the
    coordinator did not sign it.
    """
    if len(token) > MAX_TOKEN or not token.startswith(PREFIX):
        raise FrameError(f"a token begins with {PREFIX} and has at most {MAX_TOKEN} characters")
    try:
        data = base58.b58decode(token.removeprefix(PREFIX))
    except ValueError:
        raise FrameError("it has characters that no token has") from None
    signature, payload = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
    invite = parse(pb.Invite, payload)
    if len(invite.id) != ID_BYTES or len(invite.run) != RUN_BYTES:
        raise FrameError("a part of it is missing")
    if invite.run != bytes.fromhex(run_id)[:RUN_BYTES]:
        raise StaleError(f"it is for run {invite.run.hex()}, and this is run {run_id[: 2 * RUN_BYTES]}")
    signed = pb.Signed(type="Invite", payload=payload, signer=coordinator, signature=signature)
    try:
        return open_signed(signed, run_id, pb.Invite, signer=coordinator).message
    except SignatureError:
        raise SignatureError("this run's coordinator did not sign it") from None
