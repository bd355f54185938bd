"""Where things live: runs/<run id>/coordinator and runs/<run id>/peer under the state folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_state_path

from hivegrpo.protocol.errors import BusyError, ConfigError


def state_folder() -> Path:
    """$HIVEGRPO_HOME, or the platform's state folder for hivegrpo."""
    override = os.environ.get("HIVEGRPO_HOME")
    return Path(override).expanduser() if override else user_state_path("hivegrpo")


def run_folder(run_id: str, state: Path | None = None) -> Path:
    """The folder of one run, named by the first 16 hex digits of its id."""
    return (state or state_folder()) / "runs" / run_id[:16]


def latest_run(state: Path | None = None) -> Path:
    """The run folder touched last; ConfigError if there is none."""
    base = (state or state_folder()) / "runs"
    runs = [path for path in base.glob("*") if path.is_dir()] if base.is_dir() else []
    if not runs:
        raise ConfigError(f"There is no run under {base}.", "Start one with `hivegrpo demo`, or name a run's folder.")
    return max(runs, key=lambda path: path.stat().st_mtime)


@contextmanager
def locked_home(home: Path, flag: str = "--home") -> Iterator[Path]:
    """Hold a home folder for this process; BusyError if another one has it. The lock ends with the process.

    flag: of the command, which names another folder.
    """
    home.mkdir(parents=True, exist_ok=True)
    handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"The home folder {home} is in use by another process.",
                f"Stop that process, or give this one a folder of its own with {flag}.",
            ) from None
        yield home
    finally:
        os.close(handle)
