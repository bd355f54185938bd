"""Who may sign which version: the run manifest's coordinator, then those whom the run key named in its place."""

from collections.abc import Sequence

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.checks import check_digest
from hivegrpo.protocol.envelope import Opened, open_signed
from hivegrpo.protocol.errors import (
    ChainError,
    ForgedError,
    ForkError,
    FrameError,
    GapError,
    ReplayError,
    SignatureError,
    WireError,
)
from hivegrpo.protocol.identity import public_key_of

MAX_SUCCESSIONS = 64


class Line:
    """The coordinators of one run, in turn. It only grows."""

    def __init__(self, run_id: str, manifest: pb.RunManifest) -> None:
        self._run_id = run_id
        self._run_key = manifest.run_key
        self._begun_by = manifest.coordinator
        self.successions: list[Opened[pb.Succession]] = []

    @property
    def current(self) -> str:
        """The peer that signs what is to come."""
        return self.successions[-1].message.coordinator if self.successions else self._begun_by

    def signer_of(self, version: int) -> str:
        """The only peer whose signature counts on a version, its plan and its seal."""
        named = self.naming(version)
        return self._begun_by if named is None else named.message.coordinator

    def naming(self, version: int) -> Opened[pb.Succession] | None:
        """The succession that says who signs a version; None if the run manifest does."""
        for succession in reversed(self.successions):
            if succession.message.first <= version:
                return succession
        return None

    def coordinated(self, peer: str) -> bool:
        """Whether a peer is, or ever was, the coordinator."""
        return peer == self._begun_by or any(peer == item.message.coordinator for item in self.successions)

    def open(self, signed: pb.Signed) -> Opened[pb.Succession] | None:
        """Verify the succession that comes next; None if it is one that is known already.

        ForgedError if the run key did not sign it for this run, GapError if one before it is missing, ForkError for a
        second one of its number, ReplayError if it names a version before the last one did.
        """
        if not self._run_key:
            raise ForgedError("This run has no run key: nobody can name another coordinator.", SUCCESSION_HINT)
        try:
            opened = open_signed(signed, self._run_id, pb.Succession, signer=self._run_key)
            check_succession(opened.message)
        except SignatureError as error:
            raise ForgedError(f"A succession does not verify: {error}.", SUCCESSION_HINT) from error
        except WireError as error:
            raise ChainError(f"A succession makes no sense: {error}.", SUCCESSION_HINT) from error
        number, expected = opened.message.number, len(self.successions) + 1
        if number > min(expected, MAX_SUCCESSIONS):
            raise GapError(f"Expected succession {expected}, got {number}.", SUCCESSION_HINT)
        if number < expected:
            if self.successions[number - 1].digest == opened.digest:
                return None
            raise ForkError(f"There is a second succession {number} under the run key.", SUCCESSION_HINT)
        if self.successions and opened.message.first < self.successions[-1].message.first:
            raise ReplayError(
                f"Succession {number} is for version {opened.message.first}, an earlier one than the last.",
                SUCCESSION_HINT,
            )
        return opened


def check_succession(succession: pb.Succession) -> None:
    """A number, a peer id and a digest."""
    if succession.number < 1:
        raise FrameError("successions are counted from 1")
    check_digest(succession.parent, "the succession's parent")
    try:
        public_key_of(succession.coordinator)
    except SignatureError as error:
        raise FrameError(error.message) from None


def check_count(successions: Sequence[pb.Signed]) -> None:
    """FrameError for more than any run has."""
    if len(successions) > MAX_SUCCESSIONS:
        raise FrameError(f"{len(successions)} successions; at most {MAX_SUCCESSIONS} are read")


SUCCESSION_HINT = (
    "Ask whoever launched the run for its address and id; if they are right, somebody forges, or has the run key: do "
    "not contribute, and report this message."
)
