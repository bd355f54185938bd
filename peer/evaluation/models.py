"""Which model was measured, so that samples of one are never taken for those of another."""

import json
from dataclasses import dataclass
from pathlib import Path

from hivegrpo.peer.inference.answering import Answering
from hivegrpo.peer.inference.origin import read_origin
from hivegrpo.peer.inference.provenance import BASE_PARTS, identity_of
from hivegrpo.peer.learn.digests import model_digests
from hivegrpo.protocol.config import RunConfig


@dataclass(frozen=True, slots=True)
class Measured:
    """A model that was measured."""

    revision: str
    """As it was asked for."""
    title: str
    identity: dict[str, str]
    """As of `identity_of`; of a folder the digests of its parts."""


def identify(answering: Answering, source: str | None, revision: str) -> Measured:
    """The identity of a model that `open_answering` gave for a source."""
    trained = answering.trained
    if trained is None:
        assert source is not None
        parts = model_digests(Path(source).expanduser())
        return Measured(revision, answering.title, {part: parts[part].hex() for part in BASE_PARTS})
    return Measured(revision, answering.title, identity_of(trained.run, trained.version))


def training_of(answering: Answering, source: str | None) -> RunConfig | None:
    """The settings that a model was trained under, if it says so. MismatchError if a newer hivegrpo wrote them."""
    if answering.trained is not None:
        return answering.trained.run.config
    assert source is not None
    origin = read_origin(Path(source).expanduser())
    return RunConfig.from_json(json.dumps(origin["config"])) if "config" in origin else None
