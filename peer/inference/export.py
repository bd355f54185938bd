"""Write the trained model as a Hugging Face folder: merged into the base, or the adapter alone for PEFT."""

import json
import os
import stat
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hivegrpo.peer.inference.card import Form, model_card
from hivegrpo.peer.inference.chat_template import adopt_training_template
from hivegrpo.peer.inference.evaluated import Results, Row
from hivegrpo.peer.inference.license import base_license
from hivegrpo.peer.inference.load import load
from hivegrpo.peer.inference.merge import merge
from hivegrpo.peer.inference.origin import ORIGIN_FILE
from hivegrpo.peer.inference.provenance import Provenance, identity_of, provenance_of
from hivegrpo.peer.learn.base import CARD
from hivegrpo.peer.learn.encoding import end_token_ids
from hivegrpo.peer.learn.policy import Policy
from hivegrpo.protocol.config import GrpoSection
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.files import sync_folder, write_whole

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Options:
    """How to write an export."""

    adapter: bool = False
    """Only the adapter, for PEFT."""
    dtype: str | None = None
    """Precision of merged weights; the run's base's if left out."""
    license: str | None = None
    """Identifier; what the base's card says if left out."""
    evaluation: Results | None = None
    """For the card: of the same model."""


def export(run: str | None, to: Path, revision: str = "latest", options: Options | None = None) -> Path:
    """Write RUN's policy at `revision` into the folder `to`, whole or not at all; `to` itself is returned.

    ConfigError if `to` holds something already, an adapter is asked for where there is none, or in a precision, or the
    evaluation is of another model; else as `load`.
    """
    options = options or Options()
    if options.adapter and options.dtype is not None:
        raise ConfigError("An adapter is as it was trained, in float32.", "Leave out --dtype, or --adapter.")
    require_free(to)
    trained = load(run, revision, device="cpu")
    if options.adapter and trained.version is None:
        raise ConfigError("The base has no adapter.", "Leave out --adapter, or choose another --revision.")
    origin = provenance_of(trained.run, trained.version)
    measured = options.evaluation
    tables = measured.tables(identity_of(trained.run, trained.version)) if measured is not None else ()
    write_policy(to, origin, trained.policy, trained.tokenizer, trained.base, options, tables)
    return to


def require_free(to: Path) -> None:
    """ConfigError if a folder cannot be written at `to` without touching what is there."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already, and is not an empty folder.", "Choose another --to.")


def write_policy(
    to: Path,
    origin: Provenance,
    policy: Policy,
    tokenizer: "PreTrainedTokenizerBase",
    base: Path,
    options: Options,
    measured: Sequence[Sequence[Row]] = (),
) -> None:
    """Write a policy's folder with all that belongs to it; uses the policy up.

    base: folder of the base model. measured: tables for the card. ConfigError as `export`.
    """
    config = origin.config
    sampling = generation_config(policy.model.generation_config, tokenizer, config.grpo)
    tokenizer = deepcopy(tokenizer)  # the policy's encoder has it, too
    reproduced = adopt_training_template(tokenizer, config.dataset)
    dtype, rounding = options.dtype or config.model.dtype, None
    if options.adapter:
        model, saving = _portable_adapter(origin, policy), {"save_embedding_layers": False}
    else:
        merged = merge(policy, getattr(torch, dtype), with_adapter=origin.version is not None)
        model, rounding, saving = merged.model, merged.rounding, {}
    form = Form(
        adapter=options.adapter,
        dtype=dtype,
        rounding=rounding,
        prompts_reproduced=reproduced,
        license=options.license or base_license(base),
        evaluation=measured,
    )
    files = {CARD: model_card(origin, form), ORIGIN_FILE: json.dumps(origin.origin(), indent=1)}
    _write(to, [(model, saving), (tokenizer, {}), (sampling, {})], files)


def generation_config(
    base: "GenerationConfig | None", tokenizer: "PreTrainedTokenizerBase", grpo: GrpoSection
) -> "GenerationConfig":
    """The training's sampling, in place of the base's own: a repetition penalty in there was none of the training's."""
    from transformers import GenerationConfig

    ends = sorted(end_token_ids(tokenizer, base))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    return GenerationConfig(
        do_sample=True,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        top_k=grpo.top_k,
        max_new_tokens=grpo.max_completion_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=padding,
    )


def _write(to: Path, saved: Sequence[tuple[Any, dict[str, Any]]], texts: dict[str, str]) -> None:
    """Make a folder of what has a `save_pretrained` (with options of it) and some texts, whole or not at all."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as scratch:
            folder = Path(scratch) / to.name
            for one, options in saved:
                one.save_pretrained(folder, **options)
            for name, text in texts.items():
                write_whole(folder / name, text.encode())
            mode = stat.S_IMODE((folder / ORIGIN_FILE).stat().st_mode)
            for path in filter(Path.is_file, folder.rglob("*")):
                path.chmod(mode)  # safetensors leaves its files private, whatever the umask says
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            require_free(to)
            folder.rename(to)
        sync_folder(to.parent)
    except OSError as error:
        raise ConfigError(f"{to} cannot be written: {error}.", "Choose another --to, or make room.") from None


def _portable_adapter(origin: Provenance, policy: Policy) -> Any:
    """The policy's PEFT model, without a trace of this machine's folders."""
    model, settings = policy.adapted, origin.config.model
    if model is None:
        raise ConfigError("This run trains every parameter: there is no adapter.", "Leave out --adapter.")
    model.peft_config["default"].base_model_name_or_path = settings.name or ""
    model.peft_config["default"].revision = settings.revision
    return model
