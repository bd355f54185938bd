"""The prompts that a model was trained on, as far as this machine can get them."""

import io
import json
from collections.abc import Iterator
from typing import IO

from hivegrpo.peer.inference.locate import LocalRun
from hivegrpo.peer.learn.data import PROMPT, canonical_rows
from hivegrpo.peer.learn.messages import Prompt
from hivegrpo.peer.materials import read_rows
from hivegrpo.peer.swarm.versions import ref_of
from hivegrpo.protocol.blobstore import leaves_of
from hivegrpo.protocol.config import DatasetSection, RunConfig
from hivegrpo.protocol.errors import ConfigError, MismatchError
from hivegrpo.protocol.merkle import merkle_root

HINT = "Name the training rows in a table [training] of evaluate.toml."


def training_prompts(run: LocalRun | None, config: RunConfig | None, given: DatasetSection | None) -> Iterator[Prompt]:
    """Of the rows that are given, else of the run's dataset; `config` is that of a run which is not here.

    ConfigError if they are not to be had, UnreachableError if a hub does not answer, MismatchError if they are not
    those that the run was launched with.
    """
    if given is not None:
        yield from _prompts(io.BytesIO(canonical_rows(given)))
    elif run is None:
        if config is None or config.dataset.path is not None:
            raise ConfigError("The training rows are not with the model.", HINT)
        yield from _prompts(io.BytesIO(canonical_rows(config.dataset)))
    elif run.chain.manifest.message.dataset.name:
        yield from _stored(run)
    else:
        manifest = run.chain.manifest.message
        rows = read_rows(manifest.dataset, manifest.digests["dataset"], run.config.dataset, None, run.stores[0])
        yield from _prompts(io.BytesIO(rows))


def _stored(run: LocalRun) -> Iterator[Prompt]:
    """From the file that a home here holds, without reading it whole."""
    ref = ref_of(run.chain.manifest.message.dataset.blob)
    path = next((path for store in run.stores if (path := store.path(ref)) is not None), None)
    if path is None:
        raise ConfigError("The run's training rows are not on this machine.", HINT)
    if merkle_root(leaves_of(path)) != ref.root:
        raise MismatchError(f"The training rows in {path} are damaged.", "Remove that file, and start the peer again.")
    with path.open("rb") as file:
        yield from _prompts(file)


def _prompts(rows: IO[bytes]) -> Iterator[Prompt]:
    return (json.loads(line)[PROMPT] for line in rows)
