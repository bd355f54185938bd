"""The frozen base model: a local folder, or one from the hub. Code that comes with a model is never run."""

from pathlib import Path
from typing import Any

from hivegrpo.protocol.config import ModelSection
from hivegrpo.protocol.errors import ConfigError, UnreachableError
from hivegrpo.protocol.files import read_object
from hivegrpo.protocol.text import printable

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SETTINGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
CHAT_TEMPLATE = ("chat_template*",)
CARD = "README.md"
"""Tells the licence; nothing is computed from it, and no digest covers it."""


def resolve_model(model: ModelSection) -> Path:
    """The folder with the base model's files; a hub model is downloaded to the Hugging Face cache first.

    ConfigError if there is no such model, or it is not one that can be trained here; UnreachableError if the hub does
    not answer and the cache does not have it.
    """
    folder = model.path if model.path is not None else _download(str(model.name), str(model.revision))
    require_built_in(folder)
    return folder


def model_files(folder: Path, patterns: tuple[str, ...] = WEIGHTS + SETTINGS + TOKENIZER + CHAT_TEMPLATE) -> list[Path]:
    """Files of a base model that match, sorted by name: what is digested, and what travels."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def require_built_in(folder: Path) -> None:
    """ConfigError unless the folder is a causal language model that transformers itself implements."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = printable(str(_json(folder / "config.json").get("model_type")))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"The model in {folder} is of type {kind}, which is not a causal language model of transformers.",
            "Code that comes with a model is never run here: choose a built-in architecture.",
        )


def damages() -> tuple[type[Exception], ...]:
    """What transformers raises on a model's files that are damaged, or do not belong together."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    wrong = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    return (OSError, *wrong, SafetensorError, StrictDataclassError)


def unusable(what: str, folder: Path, reason: Exception | str) -> ConfigError:
    """What such files end in. `what` is the model, or its tokenizer."""
    text = reason if isinstance(reason, str) else f"{type(reason).__name__}: {reason}"
    return ConfigError(
        f"The {what} in {folder} cannot be loaded: {printable(' '.join(text.split())).rstrip('.')}.",
        "Is the folder complete? Get it again.",
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"There is no model in {path.parent}.",
            "A base model is a folder with config.json, tokenizer files and *.safetensors.",
        )
    return read_object(path, "Download the model again.")


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*WEIGHTS, *SETTINGS, *TOKENIZER, *CHAT_TEMPLATE, CARD]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise UnreachableError(
            f"The model {name} at {revision} is not in the Hugging Face cache, and the hub does not answer.",
            "Connect this machine, or download the model elsewhere and give [model] path.",
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"The hub has no model {name} at {revision} for you: {reason}.",
            "Check name and revision, and `hf auth login` if it is gated.",
        ) from None
