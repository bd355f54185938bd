"""Aggregation rules: their values beside plain float64 ones, and what they promise against a minority."""

from collections.abc import Callable, Sequence
from math import isqrt

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hivegrpo.peer.floats import keep_subnormals
from hivegrpo.peer.swarm.codecs.bits import norm_squared
from hivegrpo.peer.swarm.rules.base import Rule
from hivegrpo.peer.swarm.rules.centered_clip import ITERATIONS, CenteredClip
from hivegrpo.peer.swarm.rules.order import median, order_keys
from hivegrpo.peer.swarm.rules.registry import RULES, get_rule
from hivegrpo.peer.swarm.rules.trimmed_mean import TrimmedMean
from hivegrpo.protocol.chunks import CHUNK_VALUES
from hivegrpo.protocol.coefficients import coefficients
from hivegrpo.protocol.errors import ConfigError
from hivegrpo.protocol.scalars import fp32_from_bits

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

quickly = settings(max_examples=60, deadline=None)

ordinary = st.floats(-(2.0**60), 2.0**60, width=32)
"""What a reducer takes: beyond 2^60 it refuses."""


def shares(weights: Sequence[int]) -> list[float]:
    """The coefficients that a seal has for these weights."""
    return [fp32_from_bits(bits) for bits in coefficients("trimmed_mean", weights, [0] * len(weights))]


def reduce(rule: Rule, peers: Sequence[Sequence[Tensor]], weights: Sequence[int]) -> list[Tensor]:
    """The chunks of the result of the span's chunks by peer."""
    count = len(peers[0])
    chunks = rule.reduce(range(count), lambda index: [peer[index].clone() for peer in peers], shares(weights))
    return list(chunks)


def plain_trimmed_mean(values: Array, weights: Array) -> Array:
    order = np.argsort(values, axis=0, kind="stable")[len(values) // 4 : len(values) - len(values) // 4]
    kept, by = np.take_along_axis(values, order, 0), weights[order]
    result: Array = (kept * by).sum(0) / by.sum(0)
    return result


def plain_centered_clip(values: Array, weights: Array) -> Array:
    centre: Array = np.median(values, axis=0)
    radius = np.sort(np.linalg.norm(values - centre, axis=1))[(len(values) - 1) // 2]
    for _ in range(3):
        distances = np.linalg.norm(values - centre, axis=1)
        factors = np.minimum(1.0, np.divide(radius, distances, out=np.ones_like(distances), where=distances > 0))
        centre = centre + ((weights / weights.sum() * factors)[:, None] * (values - centre)).sum(0)
    return centre


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize(
    ("rule", "plain"),
    [(TrimmedMean(), plain_trimmed_mean), (CenteredClip(), plain_centered_clip)],
    ids=["trimmed_mean", "centered_clip"],
)
def test_values_are_those_of_plain_float64(rule: Rule, plain: Callable[[Array, Array], Array], count: int) -> None:
    generator = np.random.default_rng(count)
    sizes = [16_384, 16_384, 777]
    values = generator.standard_normal((count, sum(sizes))).astype(np.float32)
    values[-1] *= 5  # beyond the radius
    weights = generator.integers(1, 50, count)
    peers = [list(torch.split(torch.from_numpy(row), 16_384)) for row in values]
    got = torch.cat(reduce(rule, peers, weights.tolist())).double().numpy()
    exact = plain(values.astype(np.float64), weights.astype(np.float64))
    # Some fifty roundings of 2^-24 each, of numbers below 32.
    assert np.abs(got - exact).max() < 50 * 2.0**-24 * 32
    assert np.linalg.norm(got - exact) <= 1e-6 * np.linalg.norm(exact)


def test_trimmed_mean_worked_by_hand() -> None:
    # Of 4, one is left out at either end: of 9, 1, 5, -7 remain 1 (weight 2) and 5 (weight 6), and (2 + 30) / 8 = 4.
    # Of four equal values the first and the last are left out. Of -0 and 0, -0 is the smaller.
    peers = [[torch.tensor(row)] for row in ([9.0, 3.0, 0.0], [1.0, 3.0, -0.0], [5.0, 3.0, -0.0], [-7.0, 3.0, -0.0])]
    (result,) = reduce(TrimmedMean(), peers, [1, 2, 6, 1])
    assert result.tolist() == [4.0, 3.0, 0.0]
    assert str(result[2].item()) == "-0.0"


@quickly
@given(ordinary, st.lists(st.integers(1, 1 << 30), min_size=1, max_size=12))
@example(2.0**-149, [1, 1, 1])
@example(0.1, [1, 2, 4])
def test_where_all_agree_the_trimmed_mean_agrees_bit_for_bit(value: float, weights: list[int]) -> None:
    """However the products and the shares were rounded."""
    (result,) = reduce(TrimmedMean(), [[torch.tensor([value])] for _ in weights], weights)
    assert torch.equal(result.view(torch.int32), torch.tensor([value]).view(torch.int32))


def test_centered_clip_worked_by_hand() -> None:
    # Median 1, distances 1, 0, 99: r = 1. From 1: (0 - 1 + 0 + 99 * 1/99) / 3 = 0 twice and ever again.
    peers = [[torch.tensor([value])] for value in (0.0, 1.0, 100.0)]
    assert [chunk.tolist() for chunk in reduce(CenteredClip(), peers, [1, 1, 1])] == [[1.0]]
    # With weights 1, 2, 1 and values 0, 1, 5: distances 1, 0, 4, r = 1, steps -1/4 + 1/4: 1 again. Weights 2, 1, 1:
    # -1/2 + 1/4 gives 3/4; then -3/4 / 2 + 1/4 / 4 + 1/4 = -1/16 gives 11/16; -11/32 + 5/64 + 1/4 = -1/64: 43/64.
    peers = [[torch.tensor([value])] for value in (0.0, 1.0, 5.0)]
    assert [chunk.tolist() for chunk in reduce(CenteredClip(), peers, [1, 2, 1])] == [[1.0]]
    assert [chunk.tolist() for chunk in reduce(CenteredClip(), peers, [2, 1, 1])] == [[43 / 64]]


def test_a_span_is_clipped_as_a_whole() -> None:
    """A distance in one chunk clips what the same peer has in the others."""
    near = [torch.zeros(16_384), torch.zeros(5)]
    far = [torch.zeros(16_384), torch.full((5,), 64.0)]
    beside = [torch.ones(16_384), torch.zeros(5)]
    results = reduce(CenteredClip(), [near, near, far, beside, near], [1] * 5)
    alone = reduce(CenteredClip(), [[chunks[0]] for chunks in (near, near, far, beside, near)], [1] * 5)
    assert not results[0].any()  # the radius is 0: three of five agree
    assert torch.equal(alone[0], results[0])
    others = [near, near, far, beside, [torch.full((16_384,), 0.01), torch.zeros(5)]]
    both = reduce(CenteredClip(), [*others, others[-1]], [1] * 6)
    first = reduce(CenteredClip(), [[chunks[0]] for chunks in (*others, others[-1])], [1] * 6)
    assert not torch.equal(both[0], first[0])


@st.composite
def attacked(draw: st.DrawFn, share: int) -> tuple[Tensor, Tensor, list[int], int]:
    """Honest contributions [n - f, d], faulty ones [f, d], everyone's weight, and where the faulty are put in.

    f is as many as `share` allows: a quarter (4), or fewer than half (2).
    """
    count = draw(st.integers(3 if share == 2 else 4, 12))
    faulty = count // 4 if share == 4 else (count - 1) // 2
    width = draw(st.integers(1, 6))
    row = st.lists(ordinary, min_size=width, max_size=width)
    honest = torch.tensor(draw(st.lists(row, min_size=count - faulty, max_size=count - faulty)))
    wrong = torch.tensor(draw(st.lists(row, min_size=faulty, max_size=faulty)))
    weights = draw(st.lists(st.integers(1, 1 << 30), min_size=count, max_size=count))
    return honest, wrong, weights, draw(st.integers(0, count - faulty))


@quickly
@given(attacked(share=4))
def test_a_quarter_moves_no_coordinate_of_a_trimmed_mean_out_of_the_range_of_the_others(
    case: tuple[Tensor, Tensor, list[int], int],
) -> None:
    honest, wrong, weights, place = case
    peers = [[row] for row in torch.cat([honest[:place], wrong, honest[place:]])]
    (result,) = reduce(TrimmedMean(), peers, weights)
    assert (result >= honest.amin(0)).all()
    assert (result <= honest.amax(0)).all()


@quickly
@given(attacked(share=2))
def test_a_minority_moves_a_centered_clip_no_further_than_three_honest_distances(
    case: tuple[Tensor, Tensor, list[int], int],
) -> None:
    honest, wrong, weights, place = case
    rows = list(torch.cat([honest[:place], wrong, honest[place:]]))
    keep_subnormals()
    centre = median(rows)
    assert (centre >= honest.amin(0)).all()
    assert (centre <= honest.amax(0)).all()
    furthest = max(norm_squared(row - centre) for row in honest)
    (result,) = reduce(CenteredClip(), [[row] for row in rows], weights)
    moved = np.linalg.norm(result.double().numpy() - centre.double().numpy())
    # Steps are added to a centre whose own magnitude bounds what rounding adds: 3 steps of up to 12 sums of 2^-24 each,
    # and a subnormal's worth where all is small.
    rounding = 40 * 2.0**-24 * (centre.abs().max().item() + moved) + 1e-40
    assert moved <= ITERATIONS * (isqrt(furthest) + 1) * 2.0**-149 * (1 + 2.0**-20) + rounding * len(centre)


@quickly
@given(st.lists(ordinary, min_size=1, max_size=9))
def test_a_median_is_the_middle_value_or_between_the_two(values: list[float]) -> None:
    keep_subnormals()
    got = median([torch.tensor([value]) for value in values]).item()
    ordered = sorted(values)
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    assert low <= got <= high
    # Halves, then their sum; a subnormal's half is rounded to 2^-150.
    assert got == pytest.approx((low + high) / 2, rel=2.0**-22, abs=max(abs(low), abs(high)) * 2.0**-22 + 2.0**-148)


@quickly
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40))
def test_keys_are_ordered_as_the_values_are(values: list[float]) -> None:
    chunk = torch.tensor(values)
    keys = order_keys(chunk)
    assert [values[place] for place in torch.argsort(keys, stable=True).tolist()] == sorted(values)
    assert torch.equal(order_keys(keys), chunk.view(torch.int32))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_chunk_of_an_elementwise_rule_depends_on_that_chunk_alone(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    # Several times more in the second chunk, whose distances then decide.
    peers = [[torch.randn(100, generator=generator), torch.randn(50, generator=generator) * 9] for _ in range(5)]
    whole = reduce(rule, peers, [1, 2, 3, 4, 5])
    alone = reduce(rule, [[peer[0]] for peer in peers], [1, 2, 3, 4, 5])
    assert torch.equal(whole[0], alone[0]) == rule.elementwise


@pytest.mark.parametrize("rule", [get_rule("mean"), get_rule("clip")], ids=["mean", "clip"])
def test_how_many_chunks_are_in_a_part_does_not_change_a_bit(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    assert rule.most_chunks > 1
    peers = [torch.randn(rule.most_chunks, CHUNK_VALUES, generator=generator) for _ in range(5)]
    together = reduce(rule, [[peer.view(-1)] for peer in peers], [1, 2, 3, 4, 5])
    apart = reduce(rule, [list(peer) for peer in peers], [1, 2, 3, 4, 5])
    assert torch.equal(torch.cat(together).view(torch.int32), torch.cat(apart).view(torch.int32))


def test_an_unknown_rule_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"no aggregation rule 'krum'.*centered_clip, clip, mean, trimmed_mean"):
        get_rule("krum")
