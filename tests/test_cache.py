"""The sampler's cache against transformers', and the order in which rows go on."""

import pytest
import torch
from transformers import MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hivegrpo.peer.learn.cache import SPARE_TOKENS, RoomyLayer, make_cache
from hivegrpo.peer.learn.sampler import _close_ranks

PROMPT = 5
COPIES = 3


@pytest.mark.parametrize("widths", [(4, 4), (6, 2)], ids=str)
def test_it_holds_what_a_dynamic_layer_holds(widths: tuple[int, int]) -> None:
    """Over a prompt, its copies, rows that end at random, and so many tokens that room is made three times."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RoomyLayer(), DynamicLayer()
    rows = 4

    def states(tokens: int) -> list[torch.Tensor]:
        return [torch.randn(rows, 2, tokens, width, generator=generator) for width in widths]

    def compare(tokens: int) -> None:
        given = states(tokens)
        for mine, expected in zip(ours.update(*given), theirs.update(*map(torch.clone, given)), strict=True):
            assert torch.equal(mine, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)

    compare(PROMPT)
    for layer in (ours, theirs):
        layer.batch_repeat_interleave(COPIES)
    rows *= COPIES
    for token in range(4 * SPARE_TOKENS):
        compare(1)
        if token % 20 == 7 and rows > 1:
            kept = torch.randperm(rows, generator=generator)[: rows - 1]
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
            rows -= 1
    assert rows == 1


def test_tokens_are_written_into_room_that_is_there() -> None:
    layer = RoomyLayer()
    layer.update(torch.zeros(2, 1, PROMPT, 4), torch.zeros(2, 1, PROMPT, 4))
    layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    place = layer.keys.data_ptr()
    for _ in range(SPARE_TOKENS):
        layer.update(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
        layer.batch_select_indices(torch.tensor([0, 1]))
    assert layer.keys.data_ptr() == place
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.keys.data_ptr() == place


def test_layers_with_a_window_stay_transformers_own() -> None:
    assert {type(layer) for layer in make_cache(Qwen2Config(num_hidden_layers=2)).layers} == {RoomyLayer}
    windowed = make_cache(MistralConfig(num_hidden_layers=2, sliding_window=8))
    assert {type(layer) for layer in windowed.layers} == {DynamicSlidingWindowLayer}


@pytest.mark.parametrize(
    ("ended", "order"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([0, 1, 0, 0], [0, 3, 2]),
        ([1, 0, 1, 0, 0], [3, 1, 4]),
        ([0, 0, 1, 1], [0, 1]),
        ([1, 1, 1], []),
    ],
)
def test_the_last_rows_fill_the_gaps(ended: list[int], order: list[int]) -> None:
    assert _close_ranks(torch.tensor(ended, dtype=torch.bool)).tolist() == order
