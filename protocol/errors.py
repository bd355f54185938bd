"""Every error that hivegrpo raises on purpose.

    HiveError
    ├── ConfigError            78  the user's configuration or arguments are wrong
    ├── UnreachableError       69  nobody answers at an address
    ├── BusyError              75  a port or a home folder is in use; try again later
    ├── MismatchError          76  protocol, digest or known-answer test differs
    │   └── ChainError         76  a version chain that does not verify
    │       ├── ForgedError    76  changed, or not signed by who alone may sign it
    │       ├── GapError       76  not the version that comes next
    │       ├── ForkError      76  a second history under the same signature
    │       └── ReplayError    76  older than what was verified before
    ├── NumericsError           1  this machine does not compute the canonical numbers
    └── WireError               -  something that came from the network is wrong: dropped, counted, shown
        ├── FrameError             oversized, truncated or malformed frame or message
        ├── SignatureError         signature missing, wrong, of another type, run or signer
        ├── RosterError            sender, span or size that the signed plan does not name
        ├── StaleError             for another version or attempt than the current one
        ├── CommitmentError        bytes that contradict what was committed to
        └── RemoteError            the other side failed, refused, or went away

`HiveError`s end a command with `exit_code`; a `WireError` never ends a daemon.
The message says what happened, `hint` what to do next.
"""


class HiveError(Exception):
    """Base of all; `exit_code` follows sysexits.h."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(HiveError):
    """The user's configuration or arguments are wrong."""

    exit_code = 78


class UnreachableError(HiveError):
    """Nobody answers at an address."""

    exit_code = 69


class BusyError(HiveError):
    """A port, a home folder or an identity is in use by another process."""

    exit_code = 75


class MismatchError(HiveError):
    """The two sides do not agree on protocol, content or arithmetic."""

    exit_code = 76


class ChainError(MismatchError):
    """A version chain that does not verify: bad signature, gap, fork or wrong content."""


class ForgedError(ChainError):
    """A part of a chain that was changed, or that somebody else signed than who alone may."""


class GapError(ChainError):
    """A version that is not the one that comes next."""


class ForkError(ChainError):
    """A second history under the same signature: another version of a number, or one with another parent."""


class ReplayError(ChainError):
    """Something that was in order once, offered where newer has been verified."""


class NumericsError(HiveError):
    """This machine does not reproduce the canonical numbers, or computes some that are not finite."""


class WireError(HiveError):
    """Something that came from the network is wrong."""


class FrameError(WireError):
    """Oversized, truncated or malformed frame or message."""


class SignatureError(WireError):
    """Signature missing, wrong, or of another type, run or signer."""


class RosterError(WireError):
    """Sender, span or size that the signed plan does not name."""


class StaleError(WireError):
    """For another version or attempt than the current one."""


class CommitmentError(WireError):
    """Bytes that contradict what was committed to."""


class RemoteError(WireError):
    """The other side failed, refused, or went away."""
