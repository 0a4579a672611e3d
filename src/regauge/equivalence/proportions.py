"""Paired accuracy: two classifiers on the same items, which are independent of each other.

Where the two seldom disagree, the variance measured is near zero however few the items, and a t-test would
find anything equivalent. The score test takes the variance that there would be at the margin instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scipy import optimize, stats


@dataclass(frozen=True)
class Pairs:
    """Items by who is right.

    Attributes:
        items: all of them.
        gained: b is right and a is wrong.
        lost: a is right and b is wrong.
    """

    items: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        """Accuracy of b minus accuracy of a."""
        return (self.gained - self.lost) / self.items


def score(pairs: Pairs, difference: float) -> float:
    """Tango's score for a true ``difference``: standard normal if it is the true one.

    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design", 1998, equations 6 to 9.
    """
    error = math.sqrt(variance(pairs, difference) / pairs.items)
    gap = pairs.difference - difference
    if error > 0:
        return gap / error
    return math.copysign(math.inf, gap) if gap else 0.0


def variance(pairs: Pairs, difference: float) -> float:
    """Variance of one item's difference, at its most likely value given the true ``difference``."""
    n, gained, lost = pairs.items, pairs.gained, pairs.lost
    linear = -gained - lost + (2 * n - gained + lost) * difference
    constant = -lost * difference * (1 - difference)
    root = math.sqrt(max(0.0, linear**2 - 8 * n * constant))
    losing = (root - linear) / (4 * n)  # share of items that only a has right
    return max(0.0, 2 * losing + difference * (1 - difference))


def p_equivalent(pairs: Pairs, margin: float) -> float:
    """p-value of "the accuracies differ by at least the margin"."""
    lower, upper = score(pairs, -margin), score(pairs, margin)
    return float(max(stats.norm.sf(lower), stats.norm.cdf(upper)))


def p_beyond(pairs: Pairs, margin: float) -> float:
    """p-value of "the accuracies differ by at most the margin"."""
    sign = 1.0 if pairs.difference >= 0 else -1.0
    nearer, farther = (sign * score(pairs, sign * end) for end in (margin, -margin))
    return float(stats.norm.sf(nearer) + stats.norm.sf(farther))


def interval(pairs: Pairs, level: float) -> tuple[float, float]:
    """The differences that neither one-sided score test at ``level`` rejects."""
    limit, ends = float(stats.norm.isf(level)), list[float]()
    for sign in (1.0, -1.0):

        def beyond(difference: float, sign: float = sign) -> float:
            return sign * score(pairs, difference) - limit

        far = -sign * (1 - 1e-9)
        end: Any = optimize.brentq(beyond, far, pairs.difference, xtol=1e-12) if beyond(far) > 0 else far
        ends.append(float(end))
    return ends[0], ends[1]


def mcnemar(pairs: Pairs) -> float:
    """Exact two-sided p-value of "neither is the better one" (McNemar, 1947, with binomial tails)."""
    apart = pairs.gained + pairs.lost
    return 1.0 if apart == 0 else float(stats.binomtest(pairs.gained, apart).pvalue)
