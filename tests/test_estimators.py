"""pass@k, maj@k and their intervals against what they are defined as, by enumeration."""

import random
from collections import Counter
from itertools import combinations, product
from math import comb, isqrt, prod, sqrt
from statistics import fmean
from time import process_time

import numpy as np
import pytest

from hivegrpo.peer.evaluation.estimators import MAX_SAMPLES, majority_at_k, pass_at_k
from hivegrpo.peer.evaluation.intervals import Estimate, Z, mean_interval, paired_interval, wilson

SMALL = [(n, k) for n in range(1, 9) for k in range(1, n + 1)]
ANSWERS = (None, "a", "b", "c")


@pytest.mark.parametrize(("n", "k"), SMALL)
def test_pass_at_k_is_the_share_of_subsets_with_a_solved_sample(n: int, k: int) -> None:
    for solved in range(n + 1):
        subsets = list(combinations(range(n), k))
        assert pass_at_k(n, solved, k) == pytest.approx(fmean(min(subset) < solved for subset in subsets), abs=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_pass_at_k_is_unbiased(p: float) -> None:
    """Its mean over all outcomes of n samples is 1 - (1 - p)^k; that of the naive 1 - (1 - c/n)^k is less."""
    for n, k in SMALL:
        chances = [comb(n, c) * p**c * (1.0 - p) ** (n - c) for c in range(n + 1)]
        expected = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert expected == pytest.approx(1.0 - (1.0 - p) ** k, abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_beyond_floats() -> None:
    n, solved, k = 5000, 3, 2500
    assert pass_at_k(n, solved, k) == pytest.approx(float(1 - comb(n - solved, k) / comb(n, k)), rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)


def vote(answers: list[str | None], solved: list[bool]) -> float:
    """One vote, by its definition."""
    counts = Counter(answer for answer in answers if answer is not None)
    winners = [answer for answer in counts if counts[answer] == max(counts.values())]
    shares = [fmean(good for own, good in zip(answers, solved, strict=True) if own == answer) for answer in winners]
    return fmean(shares) if shares else 0.0


def test_majority_at_k_is_the_mean_of_the_votes_of_all_subsets() -> None:
    draws = random.Random(0)
    for _ in range(300):
        n = draws.randint(1, 9)
        k = draws.randint(1, n)
        answers = [draws.choice((*ANSWERS, "d")) for _ in range(n)]
        solved = [draws.random() < 0.5 for _ in answers]
        votes = [vote([answers[i] for i in own], [solved[i] for i in own]) for own in combinations(range(n), k)]
        assert majority_at_k(answers, solved, k) == pytest.approx(fmean(votes), abs=1e-12), (answers, solved, k)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 3), (5, 4)])
def test_majority_at_k_is_unbiased(n: int, k: int) -> None:
    """Over all outcomes of n independent samples its mean is that of one vote of k."""
    chances = dict(zip(ANSWERS, (0.1, 0.3, 0.4, 0.2), strict=True))

    def mean(size: int) -> float:
        total = 0.0
        for answers in product(ANSWERS, repeat=size):
            chance = 1.0
            for answer in answers:
                chance *= chances[answer]
            total += chance * majority_at_k(answers, [answer == "a" for answer in answers], k)
        return total

    assert mean(n) == pytest.approx(mean(k), abs=1e-12)


def test_majority_at_k_holds_at_the_most_samples() -> None:
    n = MAX_SAMPLES
    assert majority_at_k(list(range(n)), [place == 3 for place in range(n)], n // 2) == pytest.approx(1 / n)
    tied = ["a", "b"] * (n // 2)
    assert majority_at_k(tied, [answer == "a" for answer in tied], n) == pytest.approx(0.5)
    assert majority_at_k([None] * n, [True] * n, n // 2) == 0.0


def test_majority_at_k_takes_a_bounded_time_whatever_the_answers_are() -> None:
    """As many distinct answers as there may be: once about n^5 steps, that is minutes."""
    n = MAX_SAMPLES
    began = process_time()
    for answers in (list(range(n)), [place // 2 for place in range(n)], [isqrt(2 * place) for place in range(n)]):
        assert 0.0 < majority_at_k(answers, [answer % 2 == 0 for answer in answers], n // 2 + 1) < 1.0
    assert process_time() - began < 10.0


@pytest.mark.parametrize(
    ("solved", "problems", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (500, 500, 0.9924, 1.0)],
)
def test_wilson(solved: int, problems: int, low: float, high: float) -> None:
    """81 of 263 is the example of Newcombe (Statistics in Medicine 17, 1998, table I)."""
    found = wilson(solved, problems)
    assert (found.value, found.low, found.high) == pytest.approx((solved / problems, low, high), abs=5e-5)


@pytest.mark.parametrize(("solved", "problems"), [(0, 500), (1, 500), (3, 20), (250, 500), (500, 500)])
def test_of_zeros_and_ones_the_mean_s_interval_is_agresti_and_coull_s(solved: int, problems: int) -> None:
    found, score = mean_interval([1.0] * solved + [0.0] * (problems - solved)), wilson(solved, problems)
    n = problems + Z * Z
    p = (solved + Z * Z / 2) / n
    half = Z * sqrt(p * (1 - p) / n)
    assert (found.low, found.high) == pytest.approx((max(0.0, p - half), min(1.0, p + half)))
    assert found.low <= score.low + 1e-12
    assert score.high <= found.high + 1e-12


def test_of_zeros_and_ones_the_paired_interval_is_agresti_and_min_s() -> None:
    both, first, second, neither = 30, 20, 5, 45
    values = [1.0] * both + [1.0] * first + [0.0] * second + [0.0] * neither
    against = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    b, c, n = first + 0.5, second + 0.5, len(values) + 2
    half = Z * sqrt((b + c) - (b - c) ** 2 / n) / n
    found = paired_interval(values, against)
    assert (found.value, found.low, found.high) == pytest.approx((0.15, (b - c) / n - half, (b - c) / n + half))


def covers(interval: Estimate, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 5.0), (0.3, 0.7), (2.0, 2.0), (20.0, 20.0)])
def test_intervals_have_their_level(alpha: float, beta: float) -> None:
    """Problems drawn from a population whose chances to be solved follow a beta distribution, 16 samples of each.

    Of 400 intervals of level 95 %, fewer than 367 hold the truth once in more than 300 times.
    """
    draws = np.random.default_rng(1)
    n, k, problems, repeats = 16, 4, 80, 400
    truth = 1.0 - prod((beta + i) / (alpha + beta + i) for i in range(k))  # 1 - E[(1 - p)^k]
    hits = differences = 0
    for _ in range(repeats):
        chances = draws.beta(alpha, beta, problems)
        one, other = ([pass_at_k(n, int(c), k) for c in draws.binomial(n, chances)] for _ in range(2))
        hits += covers(mean_interval(one), truth)
        differences += covers(paired_interval(one, other), 0.0)
    assert hits >= 367
    assert differences >= 367
