"""A model that is ready to answer, wherever it comes from: a run's address, a run's folder, or an exported folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.peer.learn.encoding import PromptEncoder, load_tokenizer
from hivegrpo.peer.learn.policy import choose_device
from hivegrpo.peer.learn.templates import TemplateRenderer
from hivegrpo.peer.learn.weights import Quantization, load_weights
from hivegrpo.protocol.config import DatasetSection, GrpoSection, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.text import visible_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORIGIN_FILE = "hivegrpo.json"
"""In an exported folder: where the weights come from, and the settings that they were trained under."""
MODEL_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
MOST_CHARACTERS = 64
"""Of a run's name, and of what is said to be its version."""
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


def is_exported(source: str | None) -> bool:
    """Whether a source is a model's folder, as `export` writes it or from elsewhere, rather than a run."""
    return source is not None and (Path(source).expanduser() / MODEL_FILE).is_file()


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
    held = str(origin.get("version", "latest"))
    if revision not in ("latest", held):
        raise ConfigError(
            f"The folder {folder} holds one version: {held}.", "Leave out --revision, or name a run in place of it."
        )
    grpo = RunConfig.from_json(json.dumps(origin["config"])).grpo if "config" in origin else GrpoSection()
    # Whatever the prompts were wrapped in is in the exported tokenizer's chat template.
    encoder = _encoder(load_tokenizer(folder), DatasetSection(path=Path("none.jsonl")))
    model = load_weights(folder, choose_device(device), quantize=quantize).eval()
    return Answering(f"{folder.resolve().name}, {held}", model, encoder, grpo, None)


def _encoder(tokenizer: "PreTrainedTokenizerBase", dataset: DatasetSection) -> PromptEncoder:
    """It renders a chat template as a peer does: in a process that can be killed, for the template is a program."""
    renderer = TemplateRenderer(tokenizer) if tokenizer.chat_template is not None else None
    return PromptEncoder(tokenizer, dataset, renderer)


def read_origin(folder: Path) -> dict[str, Any]:
    """The content of an exported folder's `hivegrpo.json`; empty if it has none. ConfigError if it is damaged.

    The folder may come from strangers: "run" and "version", which are shown, are one short line each.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return {}
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Export the model again.") from None
    if not isinstance(origin, dict):
        raise ConfigError(f"{path} is not a JSON object.", "Export the model again.")
    for name, kinds in (("run", (str,)), ("version", (str, int))):
        if name in origin and (type(origin[name]) not in kinds or not 0 < len(str(origin[name])) <= MOST_CHARACTERS):
            raise ConfigError(f"{path} has no usable {name}.", "Export the model again.")
    shown = {name: visible_line(origin[name]) for name in ("run", "version") if isinstance(origin.get(name), str)}
    return origin | shown
