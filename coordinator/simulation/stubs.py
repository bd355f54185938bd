"""What a simulation has in place of keys and of the canonical step: values that are as good, and cost nothing."""

from collections.abc import Sequence
from hashlib import sha256

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import SIGNATURE_BYTES
from hivegrpo.protocol.errors import SignatureError

SIGNATURE = b"s" * SIGNATURE_BYTES
"""What everybody signs with; a forged signature is any other."""

GENESIS_ROOT = sha256(b"version 0").digest()


def envelope(kind: str, payload: bytes, signer: str) -> pb.Signed:
    """As `protocol.envelope.sign_payload`, with the stub signature."""
    return pb.Signed(type=kind, payload=payload, signer=signer, signature=SIGNATURE)


def verify(signed: pb.Signed, run_id: str) -> None:
    """As `protocol.envelope.verify_envelope`, of the stub signature, which is the same for all."""
    if signed.signature != SIGNATURE:
        raise SignatureError(f"not signed by {signed.signer}")


def state_root(parent: bytes, plan: bytes, seal: bytes) -> bytes:
    """The state that sealed contributions lead to from the state before: the canonical step."""
    return sha256(b"state" + parent + plan + seal).digest()


def span_root(plan: bytes, seal: bytes, index: int) -> bytes:
    """What the rule makes of the sealed chunks of a span."""
    return sha256(b"span" + plan + seal + index.to_bytes(4, "big")).digest()


def proof_against(peer: str) -> bytes:
    """Root of the blob that proves a fault of this peer."""
    return sha256(b"proof against" + peer.encode()).digest()


def guilty_by(root: bytes, faulty: Sequence[str]) -> list[str]:
    """Who of those that did wrong is proved guilty by a blob."""
    return [peer for peer in faulty if proof_against(peer) == root]
