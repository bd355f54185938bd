"""95 % confidence intervals of means over problems, taking the problems for a sample of all that could be asked.

Where almost all problems have the same value (none is solved, or all), a normal interval from the values alone has no
width, and neither has the bootstrap: unseen problems of another kind are the uncertainty then. So all three forms are
those of proportions that are made for this, two of them carried over to values between the ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from statistics import NormalDist

LEVEL = 0.95
Z = NormalDist().inv_cdf((1.0 + LEVEL) / 2.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and the interval around it."""

    value: float
    low: float
    high: float


def wilson(solved: int, problems: int) -> Estimate:
    """Share of problems that are solved, each or not: Wilson's score interval.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), which keeps its level near 0 and 1, and for few problems
    (Brown, Cai & DasGupta, "Interval estimation for a binomial proportion", Statistical Science 16, 2001).
    """
    assert 0 <= solved <= problems
    assert problems > 0
    p, ratio = solved / problems, Z * Z / problems
    middle, half = p + ratio / 2.0, Z * sqrt(p * (1.0 - p) / problems + ratio / (4.0 * problems))
    # At 0 and 1 the limit is exactly that, but for rounding.
    low = 0.0 if solved == 0 else (middle - half) / (1.0 + ratio)
    high = 1.0 if solved == problems else (middle + half) / (1.0 + ratio)
    return Estimate(p, low, high)


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean of one value a problem, each in [0, 1], such as pass@k.

    The normal interval over problems (Miller, arXiv:2411.00640, section 2) after adding z^2/2 problems of value 0 and
    as many of value 1. For values of 0 and 1 it is that of Agresti & Coull ("Approximate is better than exact", The
    American Statistician 52, 1998), which contains Wilson's.
    """
    assert values
    return _normal(values, ends=Z * Z / 2.0, least=0.0, middle=0.0)


def paired_interval(values: Sequence[float], against: Sequence[float]) -> Estimate:
    """Mean difference of two models on the same problems, values in [0, 1].

    Pairing takes out how hard a problem is, which both have in common (Miller, section 4.2): that two intervals overlap
    says little about the difference. The normal interval over the differences, after adding half a problem of
    difference -1, half a one of 1, and one of 0: for values of 0 and 1 that of Agresti & Min ("Simple improved
    confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005).
    """
    differences = [value - other for value, other in zip(values, against, strict=True)]
    assert differences
    return _normal(differences, ends=0.5, least=-1.0, middle=1.0)


def _normal(values: Sequence[float], ends: float, least: float, middle: float) -> Estimate:
    """The normal interval with so many more problems of value `least`, as many of value 1, and of value 0."""
    count = len(values) + 2.0 * ends + middle
    mean = (fsum(values) + ends * (least + 1.0)) / count
    variance = (fsum(value * value for value in values) + ends * (least * least + 1.0)) / count - mean * mean
    half = Z * sqrt(max(variance, 0.0) / count)
    return Estimate(fsum(values) / len(values), max(least, mean - half), min(1.0, mean + half))
