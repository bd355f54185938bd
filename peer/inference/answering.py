"""A model that is ready to answer, wherever it comes from: a run's address, a run's folder, or an exported folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.peer.learn.base import require_built_in
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.policy import choose_device
from hivegrpo.protocol.config import DatasetSection, GrpoSection, RunConfig
from hivegrpo.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORIGIN_FILE = "hivegrpo.json"
"""In an exported folder: where the weights come from, and the settings that they were trained under."""
MODEL_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Answering:
    """A model, and how it wants to be asked."""

    title: str
    """Where it comes from, for people."""
    model: "PreTrainedModel"
    encoder: PromptEncoder
    """Of prompts, as they were encoded in training; it holds the tokenizer."""
    grpo: GrpoSection
    """Settings of the training's sampler; defaults for a model that says nothing of them."""
    trained: Trained | None
    """The run's policy, if it comes from a run."""


def is_exported(source: str | None) -> bool:
    """Whether a source is a model's folder, as `export` writes it or from elsewhere, rather than a run."""
    return source is not None and (Path(source).expanduser() / MODEL_FILE).is_file()


def open_answering(source: str | None, revision: str = "latest", device: str = "auto") -> Answering:
    """The model that `source` names: an exported folder, or as `load` takes it.

    Errors as `load`; ConfigError for a folder that holds no model which transformers implements, or another revision
    than the one in it.
    """
    if source is not None and is_exported(source):
        return _open_folder(Path(source).expanduser(), revision, device)
    trained = load(source, revision, device)
    config = trained.run.config
    encoder = PromptEncoder(trained.tokenizer, config.dataset)
    return Answering(trained.title, trained.answering(), encoder, config.grpo, trained)


def _open_folder(folder: Path, revision: str, device: str) -> Answering:
    from transformers import AutoModelForCausalLM

    origin = read_origin(folder)
    held = str(origin.get("version", "latest"))
    if revision not in ("latest", held):
        raise ConfigError(
            f"The folder {folder} holds one version: {held}.", "Leave out --revision, or name a run in place of it."
        )
    require_built_in(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"The model in {folder} cannot be loaded: {error}", "Export it again.") from None
    # Whatever the prompts were wrapped in is in the exported tokenizer's chat template.
    encoder = PromptEncoder(load_tokenizer(folder), DatasetSection(path=Path("none.jsonl")))
    config = RunConfig.from_json(json.dumps(origin["config"])) if "config" in origin else None
    grpo = config.grpo if config is not None else GrpoSection()
    return Answering(f"{folder.name}, {held}", model.to(choose_device(device)).eval(), encoder, grpo, None)


def read_origin(folder: Path) -> dict[str, Any]:
    """The content of an exported folder's `hivegrpo.json`; empty if it has none. ConfigError if it is damaged."""
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return {}
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Export the model again.") from None
    if not isinstance(origin, dict):
        raise ConfigError(f"{path} is not a JSON object.", "Export the model again.")
    return origin
