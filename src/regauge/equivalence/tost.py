"""Two one-sided tests, their reverse, and the number of clusters that they need.

Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
equivalence of average bioavailability", 1987.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special, stats

MOST = 10**12
"""More clusters than this are out of reach."""


@dataclass(frozen=True)
class Estimate:
    """A mean that is normal or t distributed about the truth.

    Attributes:
        mean: the estimate.
        standard_error: its standard deviation.
        df: degrees of freedom of ``standard_error``; infinite for a normal distribution.
        clusters: what it was measured on.
    """

    mean: float
    standard_error: float
    df: float
    clusters: int


def p_equivalent(estimate: Estimate, margin: float) -> float:
    """p-value of "the difference is at least the margin, one way or the other" (the larger of the two)."""
    lower = _below(-_ratio(estimate.mean + margin, estimate.standard_error), estimate.df)
    upper = _below(_ratio(estimate.mean - margin, estimate.standard_error), estimate.df)
    return max(lower, upper)


def p_beyond(estimate: Estimate, margin: float) -> float:
    """p-value of "the difference is at most the margin": how often one that is exactly the margin would
    look as large as this."""
    size = abs(estimate.mean)
    nearer = _below(-_ratio(size - margin, estimate.standard_error), estimate.df)
    farther = _below(-_ratio(size + margin, estimate.standard_error), estimate.df)
    return nearer + farther


def interval(estimate: Estimate, level: float) -> tuple[float, float]:
    """The interval that holds the difference with confidence 1 - 2 level."""
    half = float(stats.t.isf(level, estimate.df)) * estimate.standard_error
    return estimate.mean - half, estimate.mean + half


def power(true: float, deviation: float, clusters: float, margin: float, level: float, df: float) -> float:
    """The chance that a difference of ``true`` is shown to be within, or if it is larger beyond, the margin.

    Args:
        true: the difference that is there.
        deviation: standard error times the square root of the number of clusters.
        clusters: how many there will be.
        margin, level: of the tests.
        df: degrees of freedom there will be.

    Returns:
        by the shifted t distribution, as Hauschke, Steinijans and Pigeot ("Bioequivalence studies in drug
        development", 2007, chapter 5) for TOST; never below 0.
    """
    error = deviation / math.sqrt(clusters)
    quantile = float(stats.t.isf(level, df))
    if abs(true) < margin:
        ends = (_ratio(margin - true, error) - quantile, _ratio(margin + true, error) - quantile)
        return max(0.0, sum(_below(end, df) for end in ends) - 1)
    return _below(_ratio(abs(true) - margin, error) - quantile, df)


def clusters_needed(
    estimate: Estimate, true: float, *, margin: float, level: float, wanted: float
) -> int | None:
    """The least number of clusters like these with which :func:`power` reaches ``wanted``.

    Args:
        estimate: tells how much clusters vary, and how many degrees of freedom each brings.
        true: the difference that is assumed.
        margin, level: of the tests.
        wanted: power, between 0.5 and 1.

    Returns:
        at least 2; None if there would have to be more than ``MOST``.
    """
    deviation = estimate.standard_error * math.sqrt(estimate.clusters)
    share = 1.0 if math.isinf(estimate.df) else estimate.df / (estimate.clusters - 1)

    def enough(clusters: int) -> bool:
        df = math.inf if math.isinf(estimate.df) else max(1.0, share * (clusters - 1))
        return power(true, deviation, clusters, margin, level, df) >= wanted

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _below(quantile: float, df: float) -> float:
    """The t distribution up to a quantile; the normal one for infinite df."""
    return float(special.ndtr(quantile) if math.isinf(df) else special.stdtr(df, quantile))


def _ratio(difference: float, error: float) -> float:
    if error > 0:
        return difference / error
    return math.copysign(math.inf, difference) if difference else 0.0
