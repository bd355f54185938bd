"""The secret that audits are drawn by: it follows from the key that began the run, and outlives it."""

from pathlib import Path

from hivegrpo.protocol.envelope import digest_of
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.identity import Identity

FILE = "audit.secret"


def audit_secret(home: Path, identity: Identity) -> bytes:
    """32 bytes; `identity` is asked for them in a home that has not kept any."""
    path = home / FILE
    return path.read_bytes() if path.is_file() else digest_of(identity.sign(b"hivegrpo audits"))


def keep_audit_secret(home: Path, identity: Identity) -> None:
    """For a run whose key may be replaced: what is in its log was drawn by this, and is drawn again at each start."""
    if not (home / FILE).is_file():
        write_whole(home / FILE, audit_secret(home, identity), mode=0o600)
