"""Which home a coordinator works in: the one that it is given, one whose run can go on, or a new one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hivegrpo.peer.inference.locate import BLOBS
from hivegrpo.protocol.blobstore import BlobStore
from hivegrpo.protocol.chainfile import RUN_FILE, ChainFile, count_entries
from hivegrpo.protocol.config import RunConfig
from hivegrpo.protocol.envelope import run_id_of
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import remove_temporaries, sync_folder, write_whole
from hivegrpo.protocol.homes import locked_home, run_folder, state_folder
from hivegrpo.protocol.identity import Identity

ROLE = "coordinator"
CONFIG_FILE = "config.json"
KEY_FILE = "identity.key"


@contextmanager
def open_home(config: RunConfig, home: Path | None, *, new: bool) -> Iterator[Path]:
    """Lock a home that holds a run of `config`; one is begun where there is none.

    Without `home`, the newest unfinished run of an equal config in the state folder goes on, unless `new`. ConfigError
    if `home` holds another config's run, or holds one and `new` is asked for; BusyError if another process has it.
    """
    root = home or (None if new else find_unfinished(config)) or begin_run(config)
    with locked_home(root):
        remove_temporaries(root)
        if not (root / RUN_FILE).is_file():
            _fill(config, root)
        elif home is not None:
            _check_given(config, root, new)
        yield root


def find_unfinished(config: RunConfig) -> Path | None:
    """The home of the newest run of an equal config that has versions to go."""
    begun = sorted(
        (state_folder() / "runs").glob(f"*/{ROLE}/{RUN_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    for home in (path.parent for path in begun):
        if _stored_config(home) == config.canonical_json() and count_entries(home) <= config.run.versions:
            return home
    return None


def begin_run(config: RunConfig) -> Path:
    """Prepare a new run in the state folder; the home appears there whole."""
    state = state_folder()
    state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=state, prefix=".new-run-") as scratch:
        staged = Path(scratch) / ROLE
        home = run_folder(_fill(config, staged)) / ROLE
        home.parent.mkdir(parents=True)
        staged.rename(home)
        sync_folder(home.parent)
    return home


def _fill(config: RunConfig, root: Path) -> str:
    """Everything that a run begins with; the manifest last, for it makes the folder a home. The run id."""
    from hivegrpo.cli.prepare import prepare_run

    identity = Identity.load_or_create(root / KEY_FILE)
    run = prepare_run(config, identity, BlobStore(root / BLOBS))
    write_whole(root / CONFIG_FILE, config.canonical_json().encode())
    ChainFile.create(root, run, identity.peer_id)
    return run_id_of(run.payload)


def _check_given(config: RunConfig, root: Path, new: bool) -> None:
    if new:
        raise ConfigError(f"The home {root} holds a run already.", "Give the new run an empty --home.")
    if _stored_config(root) != config.canonical_json():
        raise ConfigError(
            f"The home {root} holds a run with other settings.",
            "Give this run an empty --home, or go on with the run.toml that the other one began with.",
        )


def _stored_config(home: Path) -> str | None:
    path = home / CONFIG_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None
