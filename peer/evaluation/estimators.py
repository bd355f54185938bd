"""What n samples of one problem say about k of them: pass@k and maj@k, averaged over all subsets of k, exactly.

Both are U-statistics: unbiased, and of the least variance that an unbiased estimate from n samples can have.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import comb, prod

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

MAX_SAMPLES = 512
"""Of a problem: counts of subsets, up to comb(512, 256), are within the range of float64."""

Vote = tuple[int, float]
"""How many samples give one answer, and the share of these that are solved."""


def pass_at_k(n: int, solved: int, k: int) -> float:
    """Probability that of k samples, taken from n without replacement, at least one is solved.

    1 - C(n - solved, k) / C(n, k), as the product 1 - prod_{i = n - solved + 1}^{n} (1 - k / i) of Chen et al.
    (arXiv:2107.03374, section 2.1), whose factors are in [0, 1]. Needs 0 <= solved <= n and 1 <= k <= n.
    """
    assert 0 <= solved <= n
    assert 1 <= k <= n
    if n - solved < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - solved + 1, n + 1))


def majority_at_k(answers: Sequence[Hashable | None], solved: Sequence[bool], k: int) -> float:
    """Probability that the answer which most of k samples give is right: self-consistency (Wang et al.,
    arXiv:2203.11171), called maj1@k by Lewkowycz et al. (arXiv:2206.14858, section 3.1).

    The k are taken from the samples without replacement. Answers that tie win with equal probability, and one of the
    winner's samples, drawn uniformly, is what counts: for a score that looks at more than the answer, samples with
    equal answers may differ. None is no answer: it has no vote. Needs 1 <= k <= len(answers) <= MAX_SAMPLES.
    """
    assert 1 <= k <= len(answers) == len(solved) <= MAX_SAMPLES
    counts = Counter(answer for answer in answers if answer is not None)
    right = Counter(answer for answer, good in zip(answers, solved, strict=True) if good and answer is not None)
    votes = sorted((count, right[answer] / count) for answer, count in counts.items())
    return _expected(tuple(votes), len(answers) - counts.total(), k)


@lru_cache(maxsize=1 << 16)
def _expected(votes: tuple[Vote, ...], silent: int, k: int) -> float:
    """As `majority_at_k`, from the tally: the sum over the number t of votes that wins.

    Answers of fewer than t samples can neither win nor tie: their samples are like silent ones. At most n pairs of an
    answer and a t are left, so the time is of the order of n k^2, whatever the answers are.
    """
    n = sum(count for count, _ in votes) + silent
    wins = 0.0
    for t in range(1, min(k, max((count for count, _ in votes), default=0)) + 1):
        rivals = [vote for vote in votes if vote[0] >= t]
        wins += _wins(rivals, n - sum(count for count, _ in rivals), k, t)
    return min(wins / comb(n, k), 1.0)


def _wins(rivals: Sequence[Vote], others: int, k: int, t: int) -> float:
    """Subsets of k in which the most votes for an answer are t, each times the mean share of the answers with t votes.

    ways[0, r, s] counts the subsets of s in which r answers have t votes and none has more: the coefficient of
    x^s y^r in (1 + x)^others * prod_i (sum_{u < t} C(m_i, u) x^u + C(m_i, t) x^t y). ways[1] counts each times the sum
    of the shares of these r answers. All terms are positive, so nothing cancels.
    """
    ways = np.zeros((2, min(len(rivals), k // t) + 1, t + k + 1))  # t columns of zeros come before s = 0
    ways[0, 0, t:] = [comb(others, s) for s in range(k + 1)]
    for number, (count, share) in enumerate(rivals, 1):
        # Less than `low` is not enough for k with the answers to come, `high` and more is not reached yet.
        low, high = max(0, k - t * (len(rivals) - number)), min(k, others + t * number) + 1
        if low >= high:
            return 0.0
        rows = ways[:, : number + 1]
        new = rows[:, :, t + low : t + high]
        ties = comb(count, t) * rows[:, :-1, low:high]
        if t > 1:
            fewer = np.array([comb(count, u) for u in range(t)], dtype=np.float64)
            new[:] = sliding_window_view(rows[:, :, low + 1 : high + t], t, axis=2) @ fewer[::-1]
        new[:, 1:] += ties
        new[1, 1:] += share * ties[0]
    ranks = np.arange(1, ways.shape[1])
    return float((ways[1, 1:, -1] / ranks).sum())
