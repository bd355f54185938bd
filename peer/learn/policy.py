"""The policy: a frozen base with a LoRA adapter whose parameters are one flat vector."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hivegrpo.peer.learn.base import require_built_in
from hivegrpo.protocol.config import LoraSection
from hivegrpo.protocol.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Layout = list[tuple[str, tuple[int, ...]]]
"""Name and shape of each trainable parameter, in the order in which they follow each other in the vector."""


class Policy:
    """Owns the model. Not thread-safe; never in training mode, for there is nothing in it that should be random."""

    def __init__(self, base: "PreTrainedModel", lora: LoraSection) -> None:
        """Put an adapter on `base`, with values that mean nothing until `load_vector`."""
        self.model = _with_adapter(base, lora).eval()
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        self.parameters: list[nn.Parameter] = [value for _, value in named]
        self.layout: Layout = [(_file_name(name), tuple(value.shape)) for name, value in named]
        self.size = sum(value.numel() for value in self.parameters)
        self.device = self.parameters[0].device

    @classmethod
    def load(cls, folder: Path, *, dtype: str, attn_implementation: str, lora: LoraSection, device: str) -> "Policy":
        """The policy on a local base model, as the run's [model] and [lora] sections say; ConfigError if it is none."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        require_built_in(folder)
        disable_progress_bar()  # stderr is the daemon's log
        try:
            base = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"The model in {folder} cannot be loaded: {error}", "Is the folder complete?") from None
        return cls(base.to(device), lora)

    def flatten(self) -> Tensor:
        """The adapter as one vector on the CPU, (size,)."""
        return torch.cat([value.detach().flatten() for value in self.parameters]).cpu()

    @torch.no_grad()
    def load_vector(self, vector: Tensor) -> None:
        """Copy a vector of `size` values into the adapter; MismatchError if it is longer or shorter."""
        if vector.shape != (self.size,):
            raise MismatchError(
                f"The adapter has {self.size} parameters, the vector {vector.numel()} values.",
                "Check that [model] and [lora] are those of the run.",
            )
        for value, part in zip(self.parameters, self._parts(vector), strict=True):
            value.copy_(part)

    @contextmanager
    def flat_gradient(self) -> Iterator[Tensor]:
        """Inside, backward passes add up in the yielded vector (size,), which starts at zero."""
        gradient = torch.zeros(self.size, dtype=self.parameters[0].dtype, device=self.device)
        for value, part in zip(self.parameters, self._parts(gradient), strict=True):
            value.grad = part
        try:
            yield gradient
        finally:
            for value in self.parameters:
                value.grad = None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is reference version 0: the base with the adapter off."""
        with self.model.disable_adapter():
            yield

    def _parts(self, vector: Tensor) -> Iterator[Tensor]:
        """Views of the vector in the parameters' shapes."""
        parts = torch.split(vector, [value.numel() for value in self.parameters])
        return (part.view(value.shape) for part, value in zip(parts, self.parameters, strict=True))


def describe_layout(folder: Path, lora: LoraSection) -> Layout:
    """The layout that `Policy.load` will have, without loading a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    require_built_in(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        return Policy(base, lora).layout


def choose_device(device: str) -> str:
    """`auto` takes a GPU if there is one. ConfigError if there is none and one was asked for."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no GPU that torch can use.", "Use --device cpu, or auto.")
    return device


def _with_adapter(base: "PreTrainedModel", lora: LoraSection) -> "PeftModel":
    from peft import LoraConfig, get_peft_model  # here: this import takes seconds

    target: Any = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=target, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    base.requires_grad_(False)
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            return get_peft_model(base, settings)
        except ValueError as error:
            raise ConfigError(
                f"[lora] target_modules do not fit the model: {error}", 'Use "all-linear", or names of its modules.'
            ) from None


def _file_name(name: str) -> str:
    """A parameter's name in a PEFT adapter file, which does not have the adapter's own name in it."""
    return name.replace(".default.", ".")
