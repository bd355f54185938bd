"""What n samples of one problem say about k of them: pass@k and maj@k, averaged over all subsets of k, exactly.

Both are U-statistics: unbiased, and of the least variance that an unbiased estimate from n samples can have.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

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
    """As `majority_at_k`, from the tally: the sum over answers, and over the votes t with which each wins.

    The subsets of k in which answer j has t votes and ties with r others, while the rest have fewer, are counted by
    C(m_j, t) times the coefficient of x^(k - t) y^r in (1 + x)^silent * prod_{i != j} (sum_{s < t} C(m_i, s) x^s +
    C(m_i, t) x^t y). The answer then wins with probability 1 / (r + 1).
    """
    total = comb(sum(count for count, _ in votes) + silent, k)
    expected = 0.0
    for place, (count, share) in enumerate(votes):
        if share == 0.0:
            continue
        others = [other for other, _ in (*votes[:place], *votes[place + 1 :])]
        for t in range(1, min(count, k) + 1):
            ways = _subsets(others, silent, k - t, t)
            chances = 1.0 / np.arange(1, len(ways) + 1)
            expected += share * comb(count, t) * float(ways @ chances) / total
    return min(expected, 1.0)


def _subsets(others: Sequence[int], silent: int, size: int, most: int) -> NDArray[np.float64]:
    """(size // most + 1,): subsets of `size` in which no other answer has more than `most` votes, by how many have it.

    All terms are positive, so nothing cancels.
    """
    ways = np.zeros((size // most + 1, size + 1))
    ways[0, : silent + 1] = [comb(silent, s) for s in range(min(silent, size) + 1)]
    for count in others:
        extended = ways.copy()
        for s in range(1, min(count, most - 1, size) + 1):
            extended[:, s:] += comb(count, s) * ways[:, :-s]
        if most <= min(count, size):
            extended[1:, most:] += comb(count, most) * ways[:-1, :-most]
        ways = extended
    return np.asarray(ways[:, size])
