"""Write the trained model as a Hugging Face folder: merged into the base, or the adapter alone for PEFT."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.protocol.config import ModelSection, RunConfig
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import sync_folder, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"


def export(run: str | None, to: Path, revision: str = "latest", adapter: bool = False) -> Path:
    """Write RUN's policy at `revision` into the folder `to`, whole or not at all; `to` itself is returned.

    ConfigError if `to` holds something already, or the base is asked for as an adapter; else as `load`.
    """
    require_free(to)
    trained = load(run, revision, device="cpu")
    if adapter and trained.version is None:
        raise ConfigError("The base has no adapter.", "Leave out --adapter, or choose another --revision.")
    card = model_card(trained, adapter)
    if adapter:
        model = _portable_adapter(trained)
        write_model(to, model, trained.tokenizer, card, save_embedding_layers=False)
    else:
        write_model(to, trained.merged(), trained.tokenizer, card)
    return to


def require_free(to: Path) -> None:
    """ConfigError if a folder cannot be written at `to` without touching what is there."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already, and is not an empty folder.", "Choose another --to.")


def write_model(to: Path, model: Any, tokenizer: "PreTrainedTokenizerBase", card: str, **options: Any) -> None:
    """Write a model's folder, whole or not at all; ConfigError if `to` is not free, or cannot be written.

    options: of the model's `save_pretrained`.
    """
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as scratch:
            folder = Path(scratch) / to.name
            model.save_pretrained(folder, **options)
            tokenizer.save_pretrained(folder)
            write_whole(folder / CARD, card.encode())
            for path in folder.iterdir():
                path.chmod(0o644)  # safetensors leaves its files private
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            require_free(to)
            folder.rename(to)
        sync_folder(to.parent)
    except OSError as error:
        raise ConfigError(f"{to} cannot be written: {error}.", "Choose another --to, or make room.") from None


def model_card(trained: Trained, adapter: bool) -> str:
    """Where the weights come from, so that anyone can make them again from the run's chain."""
    chain = trained.run.chain
    facts = [("run id", chain.run_id), ("coordinator", chain.coordinator)]
    if trained.version is not None:
        root = chain.entries[trained.version].manifest.message.state.root.hex()
        facts += [("policy version", str(trained.version)), ("state root", root)]
    what = "LoRA adapter of" if adapter else "Merged weights of"
    title = "the base model" if trained.version is None else "a policy trained by collective GRPO with hivegrpo"
    return describe_weights(trained.run.config, f"{what} {title}.", facts)


def describe_weights(config: RunConfig, sentence: str, facts: Iterable[tuple[str, str]]) -> str:
    """A model card: a sentence, and a table of the run, its base, and further facts."""
    rows = [("run", config.run.name), ("base", _base(config.model)), *facts]
    head = [f"---\nbase_model: {config.model.name}\n---\n"] if config.model.name else []
    table = ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows)]
    return "\n".join([*head, f"# {config.run.name}\n", f"{sentence}\n", *table]) + "\n"


def _portable_adapter(trained: Trained) -> Any:
    """The policy's PEFT model, without a trace of this machine's folders."""
    model, settings = trained.policy.adapted, trained.run.config.model
    if model is None:
        raise ConfigError("This run trains every parameter: there is no adapter.", "Leave out --adapter.")
    model.peft_config["default"].base_model_name_or_path = settings.name or ""
    model.peft_config["default"].revision = settings.revision
    return model


def _base(model: ModelSection) -> str:
    base = model.name or "the model that came with the run"
    return f"{base} at revision {model.revision}" if model.revision is not None else base
