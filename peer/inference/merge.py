"""A policy as one model: the adapter added to the base's weights, with a single rounding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hivegrpo.peer.learn.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Merged:
    """A model in one precision."""

    model: "PreTrainedModel"
    rounding: float | None
    """Norm of what rounding has changed in the weights with an adapter, over the norm of what the adapter has.

    Frobenius norms, over all of these weights; 0 in float32. None if there is no adapter.
    """


@torch.no_grad()
def merge(policy: Policy, dtype: torch.dtype, *, with_adapter: bool = True) -> Merged:
    """W + (alpha / r) B A for each W with an adapter, added in float32 and rounded to `dtype` once.

    Uses the policy up. A base in 4 bits is taken as the numbers that it stands for, so that the model is the one that
    was trained; without the adapter, the model is the base.
    """
    if policy.adapted is None:
        return Merged(policy.model.to(dtype), None)
    from peft.tuners.lora import LoraLayer

    adapters = {name: module for name, module in policy.model.named_modules() if isinstance(module, LoraLayer)}
    model: PreTrainedModel = policy.adapted.unload()
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=torch.float32)
    if not with_adapter:
        return Merged(model.to(dtype), None)
    changed = rounded = 0.0
    for name, adapter in adapters.items():
        linear = model.get_submodule(name)
        change = adapter.get_delta_weight("default").float()
        exact = linear.weight.float() + change
        weight = exact.to(dtype)
        changed += float(change.double().square().sum())
        rounded += float((weight.float() - exact).double().square().sum())
        if linear is model.get_output_embeddings():
            model.config.tie_word_embeddings = False  # the embeddings have no adapter: they stay as they are
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return Merged(model.to(dtype), (rounded / changed) ** 0.5 if changed else 0.0)
