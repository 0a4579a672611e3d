"""From paired measurements to *equivalent within the margin*, *different* or *not enough data*.

- *equivalent*: both one-sided tests reject at the level: the interval of confidence 1 - 2 level lies inside
  (-margin, +margin). Two functions that differ by the margin or more get it at most at the rate of the level.
- *different*: the difference is shown to exceed the margin, at the same level: the interval lies outside. Two
  functions that differ by less get it at most at that rate.
- *not enough data*: neither. A difference that is surely not zero, but not surely beyond the margin either,
  belongs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from regauge.equivalence import proportions, tost
from regauge.equivalence.paired import Vector, bootstrap_interval, cluster_mean, sign_flip_test
from regauge.errors import BadInput


class Finding(StrEnum):
    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    UNDECIDED = "not enough data"


@dataclass(frozen=True)
class Terms:
    """What is asked.

    Attributes:
        margin: the largest difference that counts as none, in the unit measured.
        level: error rate of either test.
        power: wanted of the data that are still missing.
        seed: of the bootstrap and the permutations.
    """

    margin: float
    level: float = 0.05
    power: float = 0.8
    seed: int = 0

    def check(self) -> None:
        """Raises ``BadInput`` if a number makes no sense."""
        for name, value, low, high in (
            ("margin", self.margin, 0.0, math.inf),
            ("level", self.level, 0.0, 0.5),
            ("power", self.power, 0.5, 1.0),
        ):
            if not low < value < high:
                raise BadInput(
                    f"this {name} makes no sense",
                    expected=f"between {low:g} and {high:g}",
                    found=f"{value:g}",
                )


@dataclass(frozen=True)
class Need:
    """Data with which the tests would decide, at the power asked.

    Attributes:
        difference: assumed to be the true one.
        documents, members: how much it takes in all, those measured included; None if out of reach.
    """

    difference: float
    documents: int | None
    members: int | None


@dataclass(frozen=True)
class Decision:
    """The finding, and every number behind it. A difference is b minus a.

    Attributes:
        finding: see the top of this module.
        documents, members: number of clusters, and of their members.
        mean: of the difference, over all members.
        standard_error, df: of ``mean``; ``df`` is None where the normal distribution is used.
        low, high: interval of confidence 1 - 2 level; it decides.
        p_equivalent: of the two one-sided tests, the larger p-value.
        p_beyond: p-value of "the difference is at most the margin".
        p_zero: of no difference at all: sign flips by document, or the exact McNemar test. None where the
            measurement cannot be negative.
        bootstrap_low, bootstrap_high: BCa interval of the same confidence, by document.
        effect: ``mean`` in standard deviations of the documents' own means; None if these are all equal.
        smallest_margin: the least margin at which these data show equivalence.
        needs: None if decided; else for the difference seen, and for none.
    """

    finding: Finding
    documents: int
    members: int
    mean: float
    standard_error: float
    df: float | None
    low: float
    high: float
    p_equivalent: float
    p_beyond: float
    p_zero: float | None
    bootstrap_low: float
    bootstrap_high: float
    effect: float | None
    smallest_margin: float
    needs: tuple[Need, ...] | None


def decide(sums: Vector, sizes: Vector, terms: Terms, *, signed: bool = True) -> Decision:
    """Judge a mean difference measured on documents.

    Args:
        sums: float64 (documents,): differences b - a of the members of each, added up.
        sizes: float64 (documents,): number of members of each.
        terms: margin, level, power and seed.
        signed: whether a difference may be negative; a distance may not.

    Raises:
        BadInput: fewer than two documents, or a number that makes no sense.
    """
    terms.check()
    found = cluster_mean(sums, sizes)
    estimate = tost.Estimate(found.mean, found.standard_error, found.df, found.clusters)
    low, high = tost.interval(estimate, terms.level)
    return _decision(
        estimate,
        terms,
        members=found.members,
        ends=(low, high),
        p_values=(tost.p_equivalent(estimate, terms.margin), tost.p_beyond(estimate, terms.margin)),
        p_zero=sign_flip_test(sums, seed=terms.seed) if signed else None,
        bootstrap=bootstrap_interval(sums, sizes, coverage=1 - 2 * terms.level, seed=terms.seed),
        effect=found.effect,
    )


def decide_accuracy(right_a: Vector, right_b: Vector, terms: Terms) -> Decision:
    """Judge the difference of two accuracies on the same items.

    Args:
        right_a, right_b: float64 (items,): 1 where the classifier is right, else 0.
        terms: margin (a share of the items), level, power and seed.

    Raises:
        BadInput: fewer than two items, or a number that makes no sense.
    """
    terms.check()
    sums, ones = right_b - right_a, np.ones(len(right_a))
    found = cluster_mean(sums, ones)
    pairs = proportions.Pairs(len(sums), int((sums > 0).sum()), int((sums < 0).sum()))
    ends = proportions.interval(pairs, terms.level)
    at_margin = max(proportions.variance(pairs, sign * terms.margin) for sign in (1.0, -1.0))
    estimate = tost.Estimate(found.mean, math.sqrt(at_margin / len(sums)), math.inf, len(sums))
    return _decision(
        estimate,
        terms,
        members=len(sums),
        ends=ends,
        p_values=(
            proportions.p_equivalent(pairs, terms.margin),
            proportions.p_beyond(pairs, terms.margin),
        ),
        p_zero=proportions.mcnemar(pairs),
        bootstrap=bootstrap_interval(sums, ones, coverage=1 - 2 * terms.level, seed=terms.seed),
        effect=found.effect,
    )


def _decision(
    estimate: tost.Estimate,
    terms: Terms,
    *,
    members: float,
    ends: tuple[float, float],
    p_values: tuple[float, float],
    p_zero: float | None,
    bootstrap: tuple[float, float],
    effect: float | None,
) -> Decision:
    inside, beyond = p_values
    if inside <= terms.level:
        finding = Finding.EQUIVALENT
    elif beyond <= terms.level:
        finding = Finding.DIFFERENT
    else:
        finding = Finding.UNDECIDED
    needs = None
    if finding is Finding.UNDECIDED:
        each = members / estimate.clusters
        needs = tuple(_need(estimate, true, each, terms) for true in (estimate.mean, 0.0))
    return Decision(
        finding=finding,
        documents=estimate.clusters,
        members=int(members),
        mean=estimate.mean,
        standard_error=estimate.standard_error,
        df=None if math.isinf(estimate.df) else estimate.df,
        low=ends[0],
        high=ends[1],
        p_equivalent=inside,
        p_beyond=beyond,
        p_zero=p_zero,
        bootstrap_low=bootstrap[0],
        bootstrap_high=bootstrap[1],
        effect=effect,
        smallest_margin=max(abs(end) for end in ends),
        needs=needs,
    )


def _need(estimate: tost.Estimate, true: float, each: float, terms: Terms) -> Need:
    documents = tost.clusters_needed(
        estimate, true, margin=terms.margin, level=terms.level, wanted=terms.power
    )
    return Need(true, documents, None if documents is None else math.ceil(documents * each))
