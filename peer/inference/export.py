"""Write the trained model as a Hugging Face folder: merged into the base, or the adapter alone for PEFT."""

import os
import tempfile
from pathlib import Path

from hivegrpo.peer.inference.load import Trained, load
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import sync_folder, write_whole

CARD = "README.md"


def export(run: str | None, to: Path, revision: str = "latest", adapter: bool = False) -> Path:
    """Write RUN's policy at `revision` into the folder `to`, whole or not at all; `to` itself is returned.

    ConfigError if `to` holds something already, or the base is asked for as an adapter; else as `load`.
    """
    _check_target(to)
    trained = load(run, revision, device="cpu")
    if adapter and trained.version is None:
        raise ConfigError("The base has no adapter.", "Leave out --adapter, or choose another --revision.")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as scratch:
            folder = Path(scratch) / to.name
            _write(trained, folder, adapter)
            _check_target(to)
            folder.rename(to)
        sync_folder(to.parent)
    except OSError as error:
        raise ConfigError(f"{to} cannot be written: {error}.", "Choose another --to, or make room.") from None
    return to


def _check_target(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already, and is not an empty folder.", "Choose another --to.")


def _write(trained: Trained, folder: Path, adapter: bool) -> None:
    card = model_card(trained, adapter)
    if adapter:
        model = trained.policy.model
        settings = trained.run.config.model
        model.peft_config["default"].base_model_name_or_path = settings.name or ""  # not this machine's folder
        model.peft_config["default"].revision = settings.revision
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        trained.merged().save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    write_whole(folder / CARD, card.encode())
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors leaves its files private
        with path.open("rb") as file:
            os.fsync(file.fileno())


def model_card(trained: Trained, adapter: bool) -> str:
    """Where the weights come from, so that anyone can make them again from the run's chain."""
    config, chain = trained.run.config, trained.run.chain
    base = config.model.name or "the model that came with the run"
    if config.model.revision is not None:
        base += f" at revision {config.model.revision}"
    rows = [("run", config.run.name), ("run id", chain.run_id), ("coordinator", chain.coordinator), ("base", base)]
    if trained.version is not None:
        root = chain.entries[trained.version].manifest.message.state.root.hex()
        rows += [("policy version", str(trained.version)), ("state root", root)]
    what = "LoRA adapter of" if adapter else "Merged weights of"
    head = [f"---\nbase_model: {config.model.name}\n---\n"] if config.model.name else []
    table = ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows)]
    title = "the base model" if trained.version is None else "a policy trained by collective GRPO with hivegrpo"
    return "\n".join([*head, f"# {config.run.name}\n", f"{what} {title}.\n", *table]) + "\n"
