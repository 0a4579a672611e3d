"""The mean of a paired difference over clusters: its standard error, an interval, a permutation test.

Nothing here knows of models. A cluster is a unit drawn on its own, such as a document; its members, such as
tokens, need not be independent of each other. Clusters may be of unequal size. The estimate is the sum of all
differences divided by the number of all members (a ratio of two sums over clusters): a long document counts
for more than a short one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from regauge.errors import BadInput

Vector = NDArray[np.float64]

BOOTSTRAP = 4000
"""Draws of the bootstrap."""

FLIPS = 9999
"""Draws of the sign-flip test; where there are fewer ways to choose signs, all are taken."""

_CHUNK = 1 << 21
"""Entries of a table of draws that are held at once."""


@dataclass(frozen=True)
class ClusterMean:
    """The mean over all members, with what is known of its error.

    Attributes:
        mean: sum of all differences / number of all members.
        standard_error: of ``mean``, by the jackknife that leaves out one cluster at a time.
        df: degrees of freedom of ``standard_error``, at most the number of clusters - 1.
        clusters: their number.
        members: their sizes added up.
        spread: standard deviation of the means of the clusters about ``mean``, weighted by size.
    """

    mean: float
    standard_error: float
    df: float
    clusters: int
    members: float
    spread: float

    @property
    def effect(self) -> float | None:
        """``mean`` in units of ``spread``; None where there is no spread."""
        return self.mean / self.spread if self.spread > 0 else None


def cluster_mean(sums: Vector, sizes: Vector) -> ClusterMean:
    """The mean with a standard error that is robust to dependence inside clusters.

    The variance is the delete-one-cluster jackknife (MacKinnon, Nielsen and Webb, "Fast and reliable
    jackknife and bootstrap methods for cluster-robust inference", 2023, CV3J), which for clusters of one
    size is the textbook variance of the mean of the cluster means. Its degrees of freedom are those of
    Bell and McCaffrey ("Bias reduction in standard errors for linear regression with multi-stage samples",
    2002) under the model that all members of a cluster share one difference; for one size they are
    the number of clusters - 1.

    Args:
        sums: float64 (clusters,): the differences of each cluster, added up.
        sizes: float64 (clusters,): the number of its members, positive.

    Raises:
        BadInput: fewer than two clusters, a size that is not positive, or a value that is not finite.
    """
    _check(sums, sizes)
    count, total = len(sums), float(sizes.sum())
    mean = float(sums.sum()) / total
    share = sizes / total
    apart = sums / sizes - mean  # of a cluster's own mean
    factor = (count - 1) / count * (share / (1 - share)) ** 2
    variance = float((factor * apart**2).sum())
    spread = float((share * apart**2).sum()) * count / (count - 1)
    return ClusterMean(
        mean, float(np.sqrt(variance)), _freedom(factor, share), count, total, float(np.sqrt(spread))
    )


def _freedom(factor: Vector, share: Vector) -> float:
    """``trace(M)^2 / trace(M^2)`` for M = P' diag(factor) P and P = 1 - 1 share', in linear time.

    If every cluster mean has one variance, the estimate of the variance is the quadratic form M in them.
    """
    total = float(factor.sum())
    cross = float((share * factor).sum())
    squares = float((share**2).sum())
    trace = total - 2 * cross + total * squares
    # M = diag(f) - s f' - f s' + total s s'
    diagonal = float((factor**2).sum())
    between = float((factor * (-2 * share * factor + total * share**2)).sum())
    rest = (
        2 * squares * diagonal + 2 * cross**2 + total**2 * squares**2 - 4 * total * squares * cross
    )  # the sum of squares of everything but diag(f)
    return min(trace**2 / (diagonal + 2 * between + rest), len(factor) - 1.0)


def bootstrap_interval(
    sums: Vector, sizes: Vector, *, coverage: float, seed: int = 0, draws: int = BOOTSTRAP
) -> tuple[float, float]:
    """A BCa bootstrap interval of the mean; whole clusters are drawn with replacement.

    Bias-corrected and accelerated (Efron, "Better bootstrap confidence intervals", 1987), with the
    acceleration from the jackknife over clusters. With few clusters it is too short; the verdict does not
    rest on it.

    Args:
        sums, sizes: as in :func:`cluster_mean`.
        coverage: wanted, between 0 and 1.
        seed: of the draws; the same seed, the same interval.
        draws: number of resamples.

    Raises:
        BadInput: as :func:`cluster_mean`.
    """
    _check(sums, sizes)
    count = len(sums)
    generator = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for start, stop in _chunks(draws, count):
        times = generator.multinomial(count, np.full(count, 1 / count), size=stop - start)
        drawn[start:stop] = (times @ sums) / (times @ sizes)
    mean = sums.sum() / sizes.sum()
    scale = float(np.abs(drawn - mean).max())
    if scale <= 1e-12 * abs(float(mean)):
        return float(mean), float(mean)
    below = (np.count_nonzero(drawn < mean) + 0.5 * np.count_nonzero(drawn == mean)) / draws
    bias = float(stats.norm.ppf(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)))
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    off = without.mean() - without
    acceleration = float((off**3).sum() / (6 * (off**2).sum() ** 1.5)) if off.any() else 0.0
    ends: list[float] = []
    for tail in ((1 - coverage) / 2, (1 + coverage) / 2):
        z = bias + float(stats.norm.ppf(tail))
        level = float(stats.norm.cdf(bias + z / (1 - acceleration * z)))
        ends.append(float(np.quantile(drawn, level)))
    return ends[0], ends[1]


def sign_flip_test(sums: Vector, *, seed: int = 0, draws: int = FLIPS) -> float:
    """Two-sided p-value of no difference: each cluster's sum might as well have had the other sign.

    Exact for any sizes and tails where that holds. All signs are tried where there are at most ``draws``
    ways; otherwise they are drawn, and the observed ones count as one draw.

    Args:
        sums: float64 (clusters,).
        seed, draws: of the random signs.
    """
    count = len(sums)
    observed = abs(float(sums.sum())) * (1 - 1e-12)
    if count < 60 and 2**count <= draws:
        numbers = np.arange(2**count)
        signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(count)) & 1)
        return float(np.mean(np.abs(signs @ sums) >= observed))
    generator, hits = np.random.default_rng(seed), 0
    for start, stop in _chunks(draws, count):
        signs = 1.0 - 2.0 * generator.integers(0, 2, size=(stop - start, count), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(signs @ sums) >= observed))
    return (1 + hits) / (1 + draws)


def _chunks(draws: int, count: int) -> Generator[tuple[int, int]]:
    step = max(1, _CHUNK // max(1, count))
    for start in range(0, draws, step):
        yield start, min(start + step, draws)


def _check(sums: Vector, sizes: Vector) -> None:
    if len(sums) != len(sizes) or len(sums) < 2:
        raise BadInput(
            "there are too few documents to tell how they vary",
            expected="at least 2",
            found=str(len(sums)),
            way_out="more text, or a rule that cuts it into more documents",
        )
    if not (np.isfinite(sums).all() and np.isfinite(sizes).all() and (sizes > 0).all()):
        raise BadInput("a paired difference is not finite, or a document is empty")
