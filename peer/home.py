"""A peer's home folder: identity, chain, blobs, own contributions, history."""

from dataclasses import dataclass
from pathlib import Path

from hivegrpo.protocol.homes import run_folder, state_folder

PEER_FOLDER = "peer"
CONTRIBUTIONS_FOLDER = "contributions"


@dataclass(frozen=True, slots=True)
class PeerHome:
    """Paths of one peer in one run."""

    root: Path

    @classmethod
    def of_run(cls, run_id: str, home: Path | None) -> "PeerHome":
        """`home` itself where the user names one, else runs/<run id>/peer in the state folder."""
        return cls(home or run_folder(run_id) / PEER_FOLDER)

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def contributions(self) -> Path:
        return self.root / CONTRIBUTIONS_FOLDER

    @property
    def feedback(self) -> Path:
        """What the encoding of own contributions has lost."""
        return self.root / "feedback"

    @property
    def history(self) -> Path:
        return self.root / "history.jsonl"

    @property
    def model(self) -> Path:
        return self.root / "model"


def identity_path(home: Path | None) -> Path:
    """Key of this node: in the home that the user names, else one for all runs in the state folder."""
    return (home or state_folder()) / "identity.key"
