"""What is served: exported folders. A run's versions are exported into its cache, by a process of its own.

    python -m hivegrpo.peer.serving.releases RUN REVISION FOLLOW

tells each release as a line of JSON, the first at once; RUN "" is the latest run here, FOLLOW the seconds between two
looks for a newer version, or "" for one look. It takes torch, memory for a whole model, and the time of a thread that
answers requests: so it has a process that ends, and can be ended.
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hivegrpo.peer.inference.origin import MODEL_FILE, held_version, read_origin
from hivegrpo.protocol.errors import BusyError, ConfigError, HiveError, UnreachableError
from hivegrpo.protocol.files import read_object
from hivegrpo.protocol.homes import latest_run
from hivegrpo.protocol.text import printable

AGAIN = "Get the model again."
EXPORTS = "exports"
REFUSED = ("*.bin", "*.pt", "*.pth", "adapter_config.json")
"""Pickles, and what names another model to be loaded."""
STALE_SECONDS = 86_400.0
"""After which what a killed export left half written is removed."""
MAX_FAILURES = 10
"""Looks in a row that may fail, other than because nobody answers, before no other is taken."""


@dataclass(frozen=True, slots=True)
class Release:
    """A model that can be served."""

    folder: Path
    name: str
    version: str
    """For people: a version's number, "base", or that of a folder from elsewhere."""


def folder_release(folder: Path, revision: str = "latest") -> Release:
    """An exported folder, or a model's folder from elsewhere.

    ConfigError if it is damaged, of another revision, or has what the engine would load otherwise than as plain data.
    """
    folder = folder.expanduser().resolve()
    require_plain(folder)
    origin = read_origin(folder)
    version = held_version(folder, origin, revision)
    return Release(folder, str(origin.get("run", folder.name)), version)


def require_plain(folder: Path) -> None:
    """ConfigError unless it is a built-in model in safetensors: the engine would load pickles and adapters too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from hivegrpo.peer.learn.base import require_built_in

    require_built_in(folder)
    hint = "Serve a folder that `hivegrpo export` wrote, or convert the model to *.safetensors."
    found = sorted(path.name for pattern in REFUSED for path in folder.glob(pattern))
    if found:
        raise ConfigError(f"The folder {folder} has {printable(found[0])}, which is not loaded here.", hint)
    weights = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
    if not weights:
        raise ConfigError(f"The folder {folder} has no *.safetensors.", hint)
    architectures = read_object(folder / MODEL_FILE, AGAIN).get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if named not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(f"The architecture {printable(str(named))} is not a causal language model's.", hint)
    for index in folder.glob("*.safetensors.index.json"):
        shards = read_object(index, AGAIN).get("weight_map")
        if not isinstance(shards, dict) or not set(map(str, shards.values())) <= set(weights):
            raise ConfigError(f"{index} names files that are no *.safetensors of its folder.", hint)


def export_release(run: str, revision: str) -> Release:
    """RUN's `revision`, exported into the cache of the run's folder unless it is there; older ones are removed.

    Errors as those of `peer.inference.load.load`.
    """
    from hivegrpo.peer.inference.export import export
    from hivegrpo.peer.inference.load import find_run
    from hivegrpo.peer.inference.locate import CACHE
    from hivegrpo.peer.inference.states import choose, parse_revision

    wanted = parse_revision(revision)
    found = find_run(run, wanted)
    version = "base" if wanted == "base" else str(choose(found, wanted))
    exports = found.folder / CACHE / EXPORTS
    to = exports / f"{found.chain.run_id[:16]}-{version}"
    if not to.is_dir():
        try:
            export(str(found.folder), to, version)
        except ConfigError:
            if not to.is_dir():  # or another process was faster
                raise
    prune(exports, to)
    return Release(to.resolve(), found.config.run.name, version)


def prune(exports: Path, newest: Path) -> None:
    """Remove exports that nobody holds, and remains of those that were not finished."""
    for folder in exports.iterdir():
        unfinished = folder.name.startswith(".")
        if folder == newest or (unfinished and time.time() - folder.stat().st_mtime < STALE_SECONDS):
            continue
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder from being pruned, by this or any other process. ConfigError if it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"The model's folder cannot be read: {error}.", "Export it again.") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def main(run: str, revision: str, follow: str) -> int:
    """Tell releases, and what goes wrong, once; the exit code if there is nothing more to tell.

    A run that cannot be reached for a while is looked for again, however long that takes.
    """
    told: Release | None = None
    trouble, failures = "", 0
    while True:
        try:
            run = run or str(latest_run())
            release = export_release(run, revision)
        except HiveError as error:
            failures += not isinstance(error, UnreachableError | BusyError)
            if str(error) != trouble:
                trouble = str(error)
                _tell({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
            if told is None or failures == MAX_FAILURES:
                return error.exit_code
        else:
            trouble, failures = "", 0
            if release != told:
                _tell({**asdict(release), "folder": str(release.folder)})
                told = release
        if not follow:
            return 0
        time.sleep(float(follow))


def _tell(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
