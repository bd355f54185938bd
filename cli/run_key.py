"""`hivegrpo run-key`: the key that names a run's next coordinator, on whatever machine it is kept."""

import base64
import sys
from pathlib import Path

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.address import check_run_id
from hivegrpo.protocol.envelope import parse, sign
from hivegrpo.protocol.errors import ConfigError, FrameError
from hivegrpo.protocol.files import write_whole
from hivegrpo.protocol.identity import Identity
from hivegrpo.protocol.succession import check_succession


def create(file: Path) -> None:
    """Write a new key; print what run.toml has to say of it. ConfigError if the file is there."""
    if file.exists():
        raise ConfigError(f"{file} is there already.", "Name another file: a key that is overwritten is lost.")
    key = Identity.generate()
    write_whole(file, key.to_bytes(), mode=0o600)
    print(f'key = "{key.peer_id}"')
    print(
        f"Put this line into [run] of run.toml before the run begins, and keep {file} where no coordinator runs: "
        "who has it can take the run over, and without it nobody can.",
        file=sys.stderr,
    )


def sign_succession(file: Path, *, run_id: str, number: int, coordinator: str, first: int, parent: str) -> None:
    """Print a signed succession as text. ConfigError for a file that is no key, or values that make no sense."""
    check_run_id(run_id)
    if not file.is_file():
        raise ConfigError(f"There is no key file {file}.", "Name the file that `hivegrpo run-key create` wrote.")
    key = Identity.load_or_create(file)
    try:
        succession = pb.Succession(number=number, coordinator=coordinator, first=first, parent=bytes.fromhex(parent))
        check_succession(succession)
    except (ValueError, FrameError) as error:
        raise ConfigError(f"This is no succession: {error}.", SIGN_HINT) from None
    print(to_text(sign(key, run_id, succession)))
    print(
        f"Signed: in run {run_id[:16]}, {coordinator} signs from version {first} on, and nobody else.", file=sys.stderr
    )


def to_text(signed: pb.Signed) -> str:
    """One line that can be pasted."""
    return base64.b64encode(signed.SerializeToString(deterministic=True)).decode("ascii")


def from_text(text: str) -> pb.Signed:
    """Inverse of `to_text`; ConfigError if it is not such a line."""
    try:
        return parse(pb.Signed, base64.b64decode(text.strip(), validate=True))
    except (ValueError, FrameError) as error:
        raise ConfigError(f"This is no signed succession: {error}.", SIGN_HINT) from None


SIGN_HINT = "Paste the whole line; `hivegrpo coordinator succeed HOME` prints the command that makes it."
