"""The sampler's cache of keys and values. transformers' own copies all that it holds for each token, and whenever a row
ends; this one writes each token into spare room, and moves only the rows that take the places of others."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 64
"""Least room that is made at a time; half of what is there, if that is more."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not type-checked here
    """What a DynamicLayer holds, as views of tensors that are longer."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []
        """Keys and values, (rows, heads, tokens and room for more, width of a head)."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, tokens, width); everything so far is returned."""
        start = self.get_seq_length()
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            return self._show([key_states, value_states], key_states.shape[2])
        end = start + key_states.shape[2]
        room = self._room if end <= self._room[0].shape[2] else [_longer(old, start, end) for old in self._room]
        for whole, states in zip(room, (key_states, value_states), strict=True):
            whole[:, :, start:end] = states
        return self._show(room, end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As of a DynamicLayer."""
        tokens = self.get_seq_length()
        self._show([whole[:, :, :tokens].repeat_interleave(repeats, dim=0) for whole in self._room], tokens)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As of a DynamicLayer, at the cost of the rows that change their places."""
        tokens = self.get_seq_length()
        places = torch.arange(len(indices), device=indices.device)
        moved = places[indices != places]
        for whole in self._room:
            whole[moved, :, :tokens] = whole[indices[moved], :, :tokens]
        self._show([whole[: len(indices)] for whole in self._room], tokens)

    def _show(self, room: list[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
        self._room = room
        self.keys, self.values = (whole[:, :, :tokens] for whole in room)
        return self.keys, self.values


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model; layers with a window or a state of their own are transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _longer(old: Tensor, start: int, end: int) -> Tensor:
    """The first `start` tokens of a tensor in one that has room for more than `end`."""
    rows, heads, _, width = old.shape
    new = old.new_empty(rows, heads, end + max(SPARE_TOKENS, end // 2), width)
    new[:, :, :start] = old[:, :, :start]
    return new
