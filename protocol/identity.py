"""A node's identity: one Ed25519 key, whose public half is the libp2p peer id itself.

Two encodings of libp2p (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), each with one valid form:

    key file    08 01 12 40 | private key, 32 bytes | public key, 32 bytes     PrivateKey{Type: Ed25519, Data}
    peer id     00 24 | 08 01 12 20 | public key, 32 bytes, in base58          identity multihash of PublicKey
"""

from functools import lru_cache
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hivegrpo.protocol.errors import ConfigError, SignatureError
from hivegrpo.protocol.files import write_whole

KEY_FILE_PREFIX = b"\x08\x01\x12\x40"
PEER_ID_PREFIX = b"\x00\x24\x08\x01\x12\x20"
KEY_BYTES = 32
PEER_ID_CHARS = 52
"""Base58 of 38 bytes that begin with PEER_ID_PREFIX: always 12D3Koo..., always this long."""


class Identity:
    """Signs as one peer id."""

    peer_id: str
    """Base58, 12D3KooW..."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer_id = base58.b58encode(PEER_ID_PREFIX + key.public_key().public_bytes_raw()).decode("ascii")

    @classmethod
    def generate(cls) -> Self:
        """A fresh identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """The identity in the file `path`, which is written first (mode 0600) if it is not there."""
        try:
            return cls.from_bytes(path.read_bytes())
        except FileNotFoundError:
            identity = cls.generate()
        except ValueError as error:
            raise ConfigError(
                f"{path} is not a key file: {error}.",
                "Restore it from a backup; or move it away, and a new identity is made on the next start.",
            ) from None
        except OSError as error:
            raise ConfigError(f"The key file {path} cannot be read: {error.strerror}.", "Check its owner.") from None
        try:
            write_whole(path, identity.to_bytes(), mode=0o600)
        except OSError as error:
            raise ConfigError(
                f"The key file {path} cannot be written: {error.strerror}.", "Choose another home folder."
            ) from None
        return identity

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse a key file's content; ValueError unless it has exactly the one valid form."""
        if len(data) != len(KEY_FILE_PREFIX) + 2 * KEY_BYTES:
            raise ValueError(f"it has {len(data)} bytes, not {len(KEY_FILE_PREFIX) + 2 * KEY_BYTES}")
        if not data.startswith(KEY_FILE_PREFIX):
            raise ValueError("it does not hold an Ed25519 key")
        private, public = data[-2 * KEY_BYTES : -KEY_BYTES], data[-KEY_BYTES:]
        key = Ed25519PrivateKey.from_private_bytes(private)
        if key.public_key().public_bytes_raw() != public:
            raise ValueError("its two halves do not belong together")
        return cls(key)

    def to_bytes(self) -> bytes:
        """The key file's content: secret, and what p2pd reads."""
        return KEY_FILE_PREFIX + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes, Ed25519 (RFC 8032)."""
        return self._key.sign(data)


@lru_cache(maxsize=4096)
def public_key_of(peer_id: str) -> Ed25519PublicKey:
    """The key that `peer_id` inlines; SignatureError for anything but the canonical text of an Ed25519 peer id."""
    if len(peer_id) != PEER_ID_CHARS:
        raise SignatureError(f"a peer id has {PEER_ID_CHARS} characters, this one {len(peer_id)}")
    try:
        data = base58.b58decode(peer_id)
    except ValueError:
        raise SignatureError("this peer id is not base58") from None
    if len(data) != len(PEER_ID_PREFIX) + KEY_BYTES or not data.startswith(PEER_ID_PREFIX):
        raise SignatureError("this peer id does not hold an Ed25519 key")
    return Ed25519PublicKey.from_public_bytes(data[len(PEER_ID_PREFIX) :])


def verify(peer_id: str, signature: bytes, data: bytes) -> None:
    """SignatureError unless `signature` is the signature by `peer_id` over `data`."""
    try:
        public_key_of(peer_id).verify(signature, data)
    except InvalidSignature:
        raise SignatureError(f"not signed by {peer_id}") from None
