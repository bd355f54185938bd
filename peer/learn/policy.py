"""The policy: a model whose trainable parameters, an adapter's or its own, are one flat vector."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hivegrpo.peer.learn.base import require_built_in
from hivegrpo.peer.learn.weights import ONE_AT_A_TIME, Quantization, load_weights
from hivegrpo.protocol.config import LoraSection, ModelSection
from hivegrpo.protocol.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Layout = list[tuple[str, tuple[int, ...]]]
"""Name and shape of each trainable parameter, in the order in which they follow each other in the vector."""


class Policy:
    """Owns the model. Not thread-safe. Nothing in it is random: dropout is off in every mode."""

    def __init__(
        self, base: "PreTrainedModel", lora: LoraSection | None, *, gradient_checkpointing: bool = False
    ) -> None:
        """Put an adapter on `base`, with values that mean nothing until `load_vector`; None trains all of it."""
        self.adapted = _with_adapter(base, lora) if lora is not None else None
        self.model: PreTrainedModel = base
        if lora is None:
            base.requires_grad_(True)
        _switch_off_dropout(base)
        if gradient_checkpointing:
            # transformers has renamed it, and warns under the old name.
            enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self._checkpointing = gradient_checkpointing
        base.eval()
        owner = self.adapted if self.adapted is not None else base
        named = [(name, value) for name, value in owner.named_parameters() if value.requires_grad]
        self.parameters: list[nn.Parameter] = [value for _, value in named]
        self.layout: Layout = [(_file_name(name), tuple(value.shape)) for name, value in named]
        self.size = sum(value.numel() for value in self.parameters)
        self.device = self.parameters[0].device
        self.body: Any = getattr(base, base.base_model_prefix, None)
        self.head = find_head(base)
        self._base = None if lora is not None or self.device.type == "meta" else self.flatten()
        self._reference: Tensor | None = self._base

    @classmethod
    def load(
        cls,
        folder: Path,
        model: ModelSection,
        lora: LoraSection,
        device: str,
        *,
        gradient_checkpointing: bool = False,
        quantize: Quantization | None = None,
    ) -> "Policy":
        """The policy on a local base model, as the run's [model] and [lora] sections say.

        quantize: holds the base in fewer bits than [model] says. ConfigError if it is no such model, or this machine
        cannot hold it so.
        """
        _require_bfloat16(model, device)
        base = load_weights(
            folder,
            device,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            quantize=quantize or model.quantize,
        )
        adapter = lora if model.trainable == "lora" else None
        return cls(base, adapter, gradient_checkpointing=gradient_checkpointing)

    def flatten(self) -> Tensor:
        """What is trained, as one vector on the CPU, (size,)."""
        return torch.cat([value.detach().flatten() for value in self.parameters]).cpu()

    @torch.no_grad()
    def load_vector(self, vector: Tensor) -> None:
        """Copy a vector of `size` values into the model; MismatchError if it is longer or shorter."""
        if vector.shape != (self.size,):
            raise MismatchError(
                f"The policy has {self.size} trainable parameters, the vector {vector.numel()} values.",
                "Check that [model] and [lora] are those of the run.",
            )
        for value, part in zip(self.parameters, self._parts(vector), strict=True):
            value.copy_(part)

    def load_reference(self, vector: Tensor | None) -> None:
        """Take a vector for the KL reference; None is version 0, the base."""
        self._reference = self._base if vector is None else vector.clone()

    @contextmanager
    def flat_gradient(self) -> Iterator[Tensor]:
        """Inside, backward passes add up in the yielded vector (size,), which starts at zero."""
        gradient = torch.zeros(self.size, dtype=self.parameters[0].dtype, device=self.device)
        for value, part in zip(self.parameters, self._parts(gradient), strict=True):
            value.grad = part
        if self._checkpointing:
            self.model.train()  # transformers keeps all activations in any other mode
        try:
            yield gradient
        finally:
            self.model.eval()
            for value in self.parameters:
                value.grad = None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is the reference; no second one is held, only its vector."""
        if self._reference is None:
            assert self.adapted is not None
            with self.adapted.disable_adapter():
                yield
            return
        current = torch.cat([value.detach().flatten() for value in self.parameters])
        self.load_vector(self._reference)
        try:
            yield
        finally:
            self.load_vector(current)

    def _parts(self, vector: Tensor) -> Iterator[Tensor]:
        """Views of the vector in the parameters' shapes."""
        parts = torch.split(vector, [value.numel() for value in self.parameters])
        return (part.view(value.shape) for part, value in zip(parts, self.parameters, strict=True))


def describe_layout(folder: Path, model: ModelSection, lora: LoraSection) -> Layout:
    """The layout that `Policy.load` will have, without loading a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    require_built_in(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        with ONE_AT_A_TIME:
            base = AutoModelForCausalLM.from_config(config)
        return Policy(base, lora if model.trainable == "lora" else None).layout


@torch.no_grad()
def find_head(model: "PreTrainedModel") -> nn.Linear | None:
    """The layer that makes the logits from the last hidden states, if nothing else does anything to them.

    Some architectures scale or cap the logits. So it is tried out: the answer is None unless the layer, applied to what
    the model's body gives, has exactly the model's logits.
    """
    head, body = model.get_output_embeddings(), getattr(model, model.base_model_prefix, None)
    if type(head) is not nn.Linear or body is None or body is model or head.weight.device.type == "meta":
        return None
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0) % head.out_features
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    return head if torch.equal(head(hidden), logits) else None


def choose_device(device: str) -> str:
    """`auto` takes a GPU if there is one. ConfigError if there is none and one was asked for."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no GPU that torch can use.", "Use --device cpu, or auto.")
    return device


def _switch_off_dropout(model: nn.Module) -> None:
    """Of layers, and of attention functions, whose rate is a module's attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _require_bfloat16(model: ModelSection, device: str) -> None:
    if model.dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            "The run's base model is in bfloat16, which this machine's GPU cannot compute with.",
            'Take part with --device cpu, or in a run with dtype = "float32".',
        )


def _with_adapter(base: "PreTrainedModel", lora: LoraSection) -> "PeftModel":
    # peft imports bitsandbytes if it is there, which warns of a kernel for processors with AVX512-BF16: it is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
