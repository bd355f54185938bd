"""Signing and opening of messages.

A signature covers, each part preceded by its length as 4 bytes big-endian:
"hivegrpo/1", the message's type, the run id, the payload. So no signature serves for another type or run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.errors import FrameError, SignatureError
from hivegrpo.protocol.identity import Identity, verify

PROTOCOL = "hivegrpo/1"
DIGEST_BYTES = 32

M = TypeVar("M", bound=Message)

Verify = Callable[[pb.Signed, str], None]
"""(envelope, run id) -> nothing; SignatureError if its signer did not sign it for that run, as of its type. Whether
these are the signer and the type that were due is for the caller to say. It leaves the envelope as it is."""


@dataclass(frozen=True, slots=True)
class Opened(Generic[M]):
    """A signed message whose signature has been verified."""

    message: M
    signer: str
    digest: bytes
    """SHA-256 of the payload: the name by which other messages refer to this one."""
    signed: pb.Signed


def digest_of(payload: bytes) -> bytes:
    """SHA-256 of a payload, 32 bytes."""
    return sha256(payload).digest()


def run_id_of(manifest_payload: bytes) -> str:
    """A run's id: the digest of its RunManifest, hex."""
    return digest_of(manifest_payload).hex()


def sign_payload(identity: Identity, run_id: str, type_name: str, payload: bytes) -> pb.Signed:
    """Envelope for an already serialized message; Ed25519 is deterministic, so signing again gives the same bytes."""
    signature = identity.sign(_signing_bytes(type_name, run_id, payload))
    return pb.Signed(type=type_name, payload=payload, signer=identity.peer_id, signature=signature)


def sign(identity: Identity, run_id: str, message: Message) -> pb.Signed:
    """Serialize and sign. The payload bytes are fixed from here on."""
    return sign_payload(identity, run_id, message.DESCRIPTOR.name, message.SerializeToString(deterministic=True))


def verify_envelope(signed: pb.Signed, run_id: str) -> None:
    """`Verify` by Ed25519 keys."""
    verify(signed.signer, signed.signature, _signing_bytes(signed.type, run_id, signed.payload))


def open_signed(
    envelope: pb.Signed | bytes, run_id: str, kind: type[M], signer: str | None = None, verify: Verify = verify_envelope
) -> Opened[M]:
    """Verify and parse. A simulation, whose peers have no keys, brings its own `verify`.

    SignatureError if the type, the signer (where one is required) or the signature is not as expected;
    FrameError if the bytes do not parse.
    """
    signed = parse(pb.Signed, envelope) if isinstance(envelope, bytes) else envelope
    payload = verified_payload(signed, run_id, kind.DESCRIPTOR.name, signer, verify)
    return Opened(parse(kind, payload), signed.signer, digest_of(payload), signed)


def verified_payload(
    signed: pb.Signed, run_id: str, type_name: str, signer: str | None = None, verify: Verify = verify_envelope
) -> bytes:
    """The payload of an envelope, not parsed yet; SignatureError as for `open_signed`."""
    payload = signed.payload
    if signed.type != type_name:
        raise SignatureError(f"expected a signed {type_name}, got {signed.type[:40]!r}")
    if signer is not None and signed.signer != signer:
        raise SignatureError(f"{type_name} is signed by {signed.signer[:60]!r}, not by {signer}")
    verify(signed, run_id)
    return payload


def open_run(envelope: pb.Signed, coordinator: str) -> Opened[pb.RunManifest]:
    """Verify a run manifest against the peer id in the run's address; its own digest is the run id it is signed for."""
    opened = open_signed(envelope, run_id_of(envelope.payload), pb.RunManifest, signer=coordinator)
    if opened.message.coordinator != coordinator:
        raise SignatureError("the run manifest names another coordinator than its signer")
    return opened


def parse(kind: type[M], data: bytes) -> M:
    """Parse a bounded byte string; FrameError if it is not such a message."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise FrameError(f"not a {kind.DESCRIPTOR.name}: {error}") from None


def _signing_bytes(type_name: str, run_id: str, payload: bytes) -> bytes:
    return b"".join((_signing_prefix(type_name, run_id), len(payload).to_bytes(4, "big"), payload))


@lru_cache(maxsize=64)
def _signing_prefix(type_name: str, run_id: str) -> bytes:
    """What all messages of a type have in common."""
    parts = (PROTOCOL.encode(), type_name.encode(), run_id.encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
