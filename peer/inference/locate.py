"""Which run RUN means, and what this machine holds of it.

A run's folder holds the homes of its coordinator, its peers, and a cache of what was fetched from an address. All keep
the same signed chain and content-addressed blobs, so they are read as one: the longest chain, every home's blobs.
"""

from dataclasses import dataclass
from pathlib import Path

from hivegrpo.protocol.blobs import BlobRef
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chain import Chain
from hivegrpo.protocol.chainfile import RUN_FILE, ChainFile
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.errors import ChainError, CommitmentError, ConfigError, MismatchError, WireError
from hivegrpo.protocol.homes import latest_run

BLOBS = "blobs"
CACHE = "cache"


@dataclass(frozen=True, slots=True)
class LocalRun:
    """A verified chain, and the blobs of the homes beside it."""

    chain: Chain
    stores: tuple[BlobStore, ...]
    folder: Path
    """Where the homes are; `cache` in it takes what is derived or fetched."""

    @property
    def config(self) -> RunConfig:
        """The run's settings; MismatchError if they come from a newer hivegrpo."""
        return RunConfig.from_json(self.chain.manifest.message.config)

    def has(self, ref: BlobRef) -> bool:
        """Whether some home holds the blob whole."""
        return any(store.has(ref) for store in self.stores)

    def read(self, ref: BlobRef, what: str) -> bytes:
        """A blob's content, checked against its root.

        MismatchError if it is damaged in every home that has it; ConfigError if none has it (a running peer may have
        let go of it just now).
        """
        damaged = None
        for store in self.stores:
            try:
                return store.read(ref)
            except FileNotFoundError:
                continue
            except CommitmentError:
                damaged = store.folder / ref.root.hex()
        if damaged is None:
            raise ConfigError(f"{what.capitalize()} is not on this machine.", FETCH_HINT)
        raise MismatchError(
            f"{what.capitalize()} is damaged: {damaged} does not have the content that its name stands for.",
            f"Remove that file and try again. {FETCH_HINT}",
        )


def is_address(run: str) -> bool:
    """Whether RUN is a coordinator's multiaddr rather than a folder."""
    return run.startswith(("/ip4/", "/ip6/", "/dns")) and not Path(run).exists()


def open_run(run: Path | None) -> LocalRun:
    """The run in a folder: a run's folder or a home in it; the latest run here if None.

    ConfigError if there is none, or more than one; ChainError if its chain does not verify.
    """
    folder = run if run is not None else latest_run()
    homes = [path for path in (folder, *sorted(folder.glob("*"))) if (path / RUN_FILE).is_file()]
    if not homes:
        problem = "holds no run" if folder.is_dir() else "does not exist"
        raise ConfigError(f"The folder {folder} {problem}.", WHERE_HINT)
    chains = [read_chain(home) for home in homes]
    if len({chain.run_id for chain in chains}) > 1:
        raise ConfigError(f"The folder {folder} holds more than one run.", WHERE_HINT)
    stores = tuple(BlobStore(home / BLOBS) for home in homes)
    return LocalRun(max(chains, key=lambda chain: chain.height), stores, folder)


def read_chain(home: Path) -> Chain:
    """The verified chain in a home, which a daemon may be adding to; ChainError if it does not verify."""
    try:
        return ChainFile.open(home).chain
    except WireError as error:
        raise ChainError(f"{home / RUN_FILE} is damaged: {error}.", f"Move {home} away. {FETCH_HINT}") from error


WHERE_HINT = (
    "Name a run's folder (runs/<id> in the state folder), the home of a coordinator or peer, or the run's address; "
    "without a name, the latest run on this machine is taken."
)
FETCH_HINT = "The run's address, in place of its folder, fetches what is missing, while its coordinator runs."
