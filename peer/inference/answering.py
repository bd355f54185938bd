"""A model that is ready to answer, wherever it comes from: a run's address, a run's folder, or an exported folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.peer.inference.origin import held_version, is_exported, read_origin
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.policy import choose_device
from hivegrpo.peer.learn.templates import TemplateRenderer
from hivegrpo.peer.learn.weights import Quantization, load_weights
from hivegrpo.protocol.config import DatasetSection, GrpoSection, RunConfig
from hivegrpo.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FILE = "adapter_config.json"
RUN_HINT = "Name the run in place of it: its folder, or its address."


@dataclass(frozen=True, slots=True)
class Answering:
    """A model, and how it wants to be asked."""

    title: str
    """Where it comes from, for people."""
    model: "PreTrainedModel"
    encoder: PromptEncoder
    """Of prompts, as they were encoded in training; it holds the tokenizer. A chat template runs in its process."""
    grpo: GrpoSection
    """Settings of the training's sampler; defaults for a model that says nothing of them."""
    trained: Trained | None
    """The run's policy, if it comes from a run."""

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the model is what the training began with. Only for one that was opened as `comparable`."""
        assert self.trained is not None
        with self.trained.policy.reference():
            yield

    def close(self) -> None:
        """End the chat template's process; another prompt would start it again."""
        self.encoder.close()


def open_answering(
    source: str | None,
    revision: str = "latest",
    device: str = "auto",
    *,
    quantize: Quantization | None = None,
    comparable: bool = False,
) -> Answering:
    """The model that `source` names: an exported folder, or as `load` takes it.

    quantize: holds its linear layers in fewer bits; a run's adapter stays apart from them, in float32, as when a run
    trains so: merged, the rounding to 4 bits would take most of what it changes. comparable: `base` is possible.
    Errors as `load`; ConfigError for a folder that holds no model which transformers implements, or another revision
    than the one in it, and where there is no base to compare with.
    """
    if source is not None and is_exported(source):
        if comparable:
            raise ConfigError(f"The folder {source} does not hold the base to compare with.", RUN_HINT)
        return _open_folder(Path(source).expanduser(), revision, device, quantize)
    if source is not None and (Path(source).expanduser() / ADAPTER_FILE).is_file():
        raise ConfigError(f"The folder {source} holds an adapter without its base.", RUN_HINT)
    if comparable and revision == "base":
        raise ConfigError("The base compared with itself says nothing.", "Leave out --revision, or give a version.")
    trained = load(source, revision, device, quantize)
    config = trained.run.config
    model = trained.policy.model if comparable else trained.answering()
    return Answering(trained.title, model, _encoder(trained.tokenizer, config.dataset), config.grpo, trained)


def _open_folder(folder: Path, revision: str, device: str, quantize: Quantization | None) -> Answering:
    origin = read_origin(folder)
    held = held_version(folder, origin, revision)
    grpo = RunConfig.from_json(json.dumps(origin["config"])).grpo if "config" in origin else GrpoSection()
    # Whatever the prompts were wrapped in is in the exported tokenizer's chat template.
    encoder = _encoder(load_tokenizer(folder), DatasetSection(path=Path("none.jsonl")))
    model = load_weights(folder, choose_device(device), quantize=quantize).eval()
    return Answering(f"{folder.resolve().name}, {held}", model, encoder, grpo, None)


def _encoder(tokenizer: "PreTrainedTokenizerBase", dataset: DatasetSection) -> PromptEncoder:
    """It renders a chat template as a peer does: in a process that can be killed, for the template is a program."""
    renderer = TemplateRenderer(tokenizer) if tokenizer.chat_template is not None else None
    return PromptEncoder(tokenizer, dataset, renderer)
