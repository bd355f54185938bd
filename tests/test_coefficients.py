"""By how much contributions are multiplied: shares, and clipping by exact norms."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivegrpo.protocol.coefficients import coefficients, norm_bytes, planned_rule
from hivegrpo.protocol.scalars import fp32_bits, fp32_from_bits

norms = st.integers(0, 1 << 400)
sealed = st.lists(st.tuples(st.integers(1, 1 << 40), norms), min_size=1, max_size=9)


def values(rule: str, weights: list[int], norms_squared: list[int]) -> list[float]:
    return [fp32_from_bits(bits) for bits in coefficients(rule, weights, norms_squared)]


def test_a_mean_takes_shares_of_the_weight() -> None:
    assert values("mean", [1, 3, 4], [0, 1, 1 << 400]) == [0.125, 0.375, 0.5]


def test_clip_scales_down_to_three_times_the_lower_median() -> None:
    # Norms 1, 2, 4, 12: the lower median is 2, the limit 6, and 12 is halved.
    assert values("clip", [1, 1, 1, 1], [1, 4, 16, 144]) == [0.25, 0.25, 0.25, 0.125]
    assert values("clip", [1, 1], [0, 1]) == [0.5, 0.0]  # more than half are zero: so is the limit
    assert values("clip", [5], [0]) == [1.0]


@settings(max_examples=200, deadline=None)
@given(sealed)
def test_nobody_moves_the_result_further_than_its_share_of_three_medians(peers: list[tuple[int, int]]) -> None:
    weights, squares = map(list, zip(*peers, strict=True))
    median = sorted(squares)[(len(squares) - 1) // 2]
    for coefficient, weight, square in zip(values("clip", weights, squares), weights, squares, strict=True):
        share = Fraction(weight, sum(weights))
        # coefficient^2 |x|^2 <= share^2 9 m^2, but for the rounding of the share to double and of the product to fp32,
        # by 2^-24 at most: (1 + 2^-24)^2 < 1 + 2^-22. Below 2^-126 fp32 rounds by 2^-150 instead, which is no share.
        if coefficient > 2.0**-126:
            assert Fraction(coefficient) ** 2 * square <= share**2 * 9 * median * (1 + Fraction(1, 1 << 22)) or (
                square <= 9 * median
            )
        if square <= 9 * median:
            assert fp32_bits(coefficient) == fp32_bits(weight / sum(weights))


@pytest.mark.parametrize(
    ("rule", "contributors", "planned"),
    [("auto", 1, "mean"), ("auto", 3, "mean"), ("auto", 4, "clip"), ("mean", 9, "mean"), ("clip", 1, "clip")],
)
def test_auto_clips_from_four_contributors_on(rule: str, contributors: int, planned: str) -> None:
    assert planned_rule(rule, contributors) == planned


@given(norms)
def test_norms_travel_as_short_as_possible(norm: int) -> None:
    data = norm_bytes(norm)
    assert int.from_bytes(data, "big") == norm
    assert not data.startswith(b"\x00")
