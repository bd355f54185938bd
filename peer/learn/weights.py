"""A causal language model out of its folder: whole, as precise as is asked for, and without code of its own."""

import importlib.util
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hivegrpo.peer.learn.base import damages, require_built_in, unusable
from hivegrpo.protocol.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["nf4", "int8"]
"""How bitsandbytes holds linear layers: in 4 bits (QLoRA, arXiv:2305.14314) or in 8 (LLM.int8(), arXiv:2208.07339)."""

ONE_AT_A_TIME = threading.Lock()
"""transformers patches its own functions while it makes a model: two threads at once would leave them patched."""

BITS = {"nf4": 4, "int8": 8}


def load_weights(
    folder: Path,
    device: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantize: Quantization | None = None,
) -> "PreTrainedModel":
    """The model in a folder, on a device; dtype "auto" is the one it is stored in.

    ConfigError if transformers does not implement it, its files are damaged or lack a tensor, it does not fit into
    memory, or bitsandbytes is needed and not installed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    require_built_in(folder)
    disable_progress_bar()  # stderr is a daemon's log
    try:
        with ONE_AT_A_TIME:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                quantization_config=_settings(quantize),
                device_map=device if quantize is not None else None,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if quantize is None:
            model = model.to(device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"The model in {folder} does not fit into the memory of this machine's GPU.", "Use --device cpu."
        ) from None
    except damages() as error:
        raise unusable("model", folder, error) from None
    if report["missing_keys"]:
        # transformers would draw them at random.
        raise unusable("model", folder, f"its files lack {', '.join(sorted(report['missing_keys'])[:3])}")
    if quantize is not None:
        _compute_as_stored(model)
    loaded: PreTrainedModel = model
    return loaded


def _settings(quantize: Quantization | None) -> Any:
    """What transformers is told of bitsandbytes; None if nothing is quantized."""
    if quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"No model can be held in {BITS[quantize]} bits here: bitsandbytes is not installed.",
            "pip install 'hivegrpo[quantize]'",
        )
    # It warns of kernels that are not used, and of each product that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=False)


def _compute_as_stored(base: "PreTrainedModel") -> None:
    """Let layers in 4 bits compute in the precision of what is not quantized.

    That keeps bitsandbytes from its path for processors with AVX512-BF16, too, which repacks the weights whenever no
    gradient is wanted, fails where a layer's width is no multiple of the block size, and computes in bfloat16: the
    sampler would have other log-probabilities than the loss, and than other machines.
    """
    for module in base.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = base.dtype
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
