"""Statistics of equivalence: error rates by simulation, and references computed in another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from regauge.equivalence import Finding, Terms, decide, decide_accuracy, proportions, tost
from regauge.equivalence.paired import (
    Vector,
    bootstrap_interval,
    cluster_mean,
    sign_flip_test,
)
from regauge.errors import BadInput

DRAWS = 2500
LEVEL = 0.05
NOISE = 3.3 * math.sqrt(LEVEL * (1 - LEVEL) / DRAWS)
"""A rate of LEVEL seen in DRAWS draws is larger by more than this once in two thousand times."""

MARGIN = 0.8

Noise = Callable[[np.random.Generator, tuple[int, int]], Vector]


def normal(generator: np.random.Generator, shape: tuple[int, int]) -> Vector:
    return generator.normal(size=shape)


def heavy(generator: np.random.Generator, shape: tuple[int, int]) -> Vector:
    return generator.standard_t(3, size=shape)


def estimates(noise: Noise, clusters: int, unequal: float, true: float, seed: int) -> list[tost.Estimate]:
    """One for each draw: cluster means about ``true``, and sizes that vary by a factor e**unequal."""
    generator = np.random.default_rng(seed)
    shape = (DRAWS, clusters)
    sizes = np.ceil(20 * np.exp(unequal * generator.normal(size=shape)))
    sums = sizes * (true + noise(generator, shape))
    return [
        tost.Estimate(found.mean, found.standard_error, found.df, clusters)
        for found in map(cluster_mean, sums, sizes)
    ]


@pytest.mark.parametrize("unequal", [0.0, 0.8], ids=["equal sizes", "unequal sizes"])
@pytest.mark.parametrize("noise", [normal, heavy])
@pytest.mark.parametrize("clusters", [6, 30])
def test_a_difference_of_exactly_the_margin_is_misjudged_at_most_at_the_level(
    noise: Noise, clusters: int, unequal: float
) -> None:
    found = estimates(noise, clusters, unequal, -MARGIN, seed=1)
    equivalent = np.mean([tost.p_equivalent(estimate, MARGIN) <= LEVEL for estimate in found])
    different = np.mean([tost.p_beyond(estimate, MARGIN) <= LEVEL for estimate in found])
    assert equivalent <= LEVEL + NOISE
    assert different <= LEVEL + NOISE


def test_with_normal_clusters_of_one_size_the_rates_are_the_level_itself() -> None:
    found = estimates(normal, 25, 0.0, MARGIN, seed=2)
    for p in (tost.p_equivalent, tost.p_beyond):
        assert np.mean([p(estimate, MARGIN) <= LEVEL for estimate in found]) == pytest.approx(
            LEVEL, abs=NOISE
        )


def test_tokens_of_one_document_are_no_independent_evidence() -> None:
    """Twenty equal tokens a document: a test that counts tokens errs far more often than the level."""
    generator = np.random.default_rng(3)
    sums = 20 * (MARGIN + generator.normal(size=(DRAWS, 8)))
    found = [cluster_mean(row, np.full(8, 20.0)) for row in sums]
    errors = [
        tost.p_equivalent(tost.Estimate(x.mean, x.standard_error, x.df, 8), MARGIN) <= LEVEL for x in found
    ]
    tokens = [x.standard_error / math.sqrt(20) for x in found]
    naive = [
        stats.t.cdf((x.mean - MARGIN) / error, 159) <= LEVEL for x, error in zip(found, tokens, strict=True)
    ]
    assert np.mean(errors) <= LEVEL + NOISE
    assert np.mean(naive) > 0.3


@pytest.mark.parametrize(("true", "margin"), [(0.0, 0.5), (0.2, 0.5), (0.9, 0.5)])
def test_the_number_of_clusters_needed_gives_the_power_asked(true: float, margin: float) -> None:
    pilot = tost.Estimate(true, 1 / math.sqrt(10), 9.0, 10)  # clusters of deviation 1
    needed = tost.clusters_needed(pilot, true, margin=margin, level=LEVEL, wanted=0.8)
    assert needed is not None
    found = estimates(normal, needed, 0.0, true, seed=4)
    p = tost.p_equivalent if true < margin else tost.p_beyond
    assert np.mean([p(estimate, margin) <= LEVEL for estimate in found]) == pytest.approx(0.8, abs=0.035)


def test_for_clusters_of_one_size_it_is_the_t_test_of_their_means() -> None:
    means = np.random.default_rng(5).normal(0.3, 1, size=12)
    found = cluster_mean(7 * means, np.full(12, 7.0))
    estimate = tost.Estimate(found.mean, found.standard_error, found.df, 12)
    assert found.df == pytest.approx(11)
    assert found.spread == pytest.approx(means.std(ddof=1))
    lower = stats.ttest_1samp(means, -0.5, alternative="greater").pvalue
    upper = stats.ttest_1samp(means, 0.5, alternative="less").pvalue
    assert tost.p_equivalent(estimate, 0.5) == pytest.approx(max(lower, upper))
    both = stats.ttest_1samp(means, 0.0)
    assert tost.p_beyond(estimate, 0.0) == pytest.approx(both.pvalue)
    interval = both.confidence_interval(0.9)
    assert tost.interval(estimate, 0.05) == pytest.approx((interval.low, interval.high))


def test_the_standard_error_is_that_of_leaving_out_one_cluster_and_its_df_that_of_the_quadratic_form() -> (
    None
):
    generator = np.random.default_rng(6)
    sizes = np.ceil(generator.pareto(1.5, size=9) * 10 + 1)
    sums = sizes * generator.normal(size=9)
    found = cluster_mean(sums, sizes)
    without = np.array([np.delete(sums, i).sum() / np.delete(sizes, i).sum() for i in range(9)])
    assert found.standard_error == pytest.approx(math.sqrt(8 / 9 * ((without - found.mean) ** 2).sum()))
    share = sizes / sizes.sum()
    centred = np.eye(9) - np.outer(np.ones(9), share)
    form = centred.T @ np.diag(8 / 9 * (share / (1 - share)) ** 2) @ centred
    assert found.df == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))
    assert found.df < 8


def test_sign_flips_are_every_sign_once_where_there_are_few_and_agree_with_draws_where_many() -> None:
    sums = np.random.default_rng(7).normal(0.5, 1, size=9)
    every = [
        abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=9)
    ]
    assert sign_flip_test(sums) == np.mean(every)
    assert sign_flip_test(sums, draws=400, seed=1) == pytest.approx(float(np.mean(every)), abs=0.06)
    assert sign_flip_test(np.zeros(40)) == 1.0
    assert sign_flip_test(sums, draws=400, seed=1) == sign_flip_test(sums, draws=400, seed=1)


def test_the_bootstrap_interval_is_that_of_scipy_and_covers() -> None:
    generator = np.random.default_rng(8)
    means = generator.exponential(size=60)
    ours = bootstrap_interval(means, np.ones(60), coverage=0.9, draws=8000)
    theirs = stats.bootstrap(
        (means,), np.mean, confidence_level=0.9, n_resamples=8000, method="BCa", rng=generator
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert bootstrap_interval(np.full(5, 2.0), np.ones(5), coverage=0.9) == (2.0, 2.0)
    hits = 0
    for seed in range(150):
        sizes = generator.integers(5, 40, size=40).astype(np.float64)
        low, high = bootstrap_interval(
            sizes * (1 + generator.normal(size=40)), sizes, coverage=0.9, seed=seed, draws=400
        )
        hits += low < 1 < high
    assert hits / 150 == pytest.approx(0.9, abs=0.08)


@pytest.mark.parametrize("disagree", [0.12, 0.3])
def test_accuracies_that_differ_by_the_margin_are_misjudged_at_most_at_the_level(disagree: float) -> None:
    generator, items, margin = np.random.default_rng(9), 300, 0.1
    gained = (disagree - margin) / 2
    counts = generator.multinomial(items, [gained, gained + margin, 1 - disagree], size=DRAWS)
    pairs = [proportions.Pairs(items, int(up), int(down)) for up, down, _ in counts]
    for p in (proportions.p_equivalent, proportions.p_beyond):
        assert np.mean([p(pair, margin) <= LEVEL for pair in pairs]) <= LEVEL + NOISE + 0.01  # discrete


def test_the_variance_of_paired_proportions_is_the_most_likely_one() -> None:
    pairs, difference = proportions.Pairs(40, 7, 3), -0.15

    def likelihood(lost: float) -> float:
        gained = lost + difference
        return 7 * math.log(gained) + 3 * math.log(lost) + 30 * math.log(1 - lost - gained)

    grid = np.linspace(0.1501, 0.574, 40001)
    lost = float(grid[np.argmax([likelihood(x) for x in grid])])
    expected = 2 * lost + difference - difference**2
    assert proportions.variance(pairs, difference) == pytest.approx(expected, abs=1e-4)
    low, high = proportions.interval(pairs, 0.05)
    assert proportions.score(pairs, low) == pytest.approx(stats.norm.isf(0.05))
    assert proportions.score(pairs, high) == pytest.approx(-stats.norm.isf(0.05))
    assert proportions.mcnemar(pairs) == pytest.approx(2 * stats.binom.cdf(3, 10, 0.5))


def test_classifiers_that_agree_on_a_few_items_are_not_yet_equivalent() -> None:
    few, many = (
        decide_accuracy(*[np.ones(20)] * 2, Terms(0.05)),
        decide_accuracy(*[np.ones(200)] * 2, Terms(0.05)),
    )
    assert (few.finding, many.finding) == (Finding.UNDECIDED, Finding.EQUIVALENT)
    assert few.needs is not None
    assert few.needs[0].documents is not None
    assert 20 < few.needs[0].documents < 200


def test_the_three_findings_and_the_smallest_margin() -> None:
    apart = np.random.default_rng(10).normal(0.02, 0.05, size=30)
    ones = np.ones(30)
    found = decide(apart, ones, Terms(0.1))
    assert found.finding is Finding.EQUIVALENT
    assert found.needs is None
    assert decide(apart, ones, Terms(found.smallest_margin * 1.001)).finding is Finding.EQUIVALENT
    assert decide(apart, ones, Terms(found.smallest_margin * 0.999)).finding is Finding.UNDECIDED
    assert decide(apart + 1, ones, Terms(0.1)).finding is Finding.DIFFERENT
    assert decide(-apart - 1, ones, Terms(0.1)).finding is Finding.DIFFERENT
    # Surely not zero, but not surely beyond the margin either.
    middle = decide(apart + 0.09, ones, Terms(0.1))
    assert middle.finding is Finding.UNDECIDED
    assert middle.low > 0
    assert middle.p_zero is not None
    assert middle.p_zero < 0.05
    assert decide(np.zeros(3), np.ones(3), Terms(1e-9)).finding is Finding.EQUIVALENT


def test_more_documents_are_needed_for_more_power_a_smaller_margin_and_a_larger_difference() -> None:
    estimate = tost.Estimate(0.02, 0.05, 9.0, 10)

    def needed(true: float, margin: float, power: float) -> int | None:
        return tost.clusters_needed(estimate, true, margin=margin, level=LEVEL, wanted=power)

    base = needed(0.02, 0.1, 0.8)
    assert base is not None
    others = [needed(0.05, 0.1, 0.8), needed(0.02, 0.05, 0.8), needed(0.02, 0.1, 0.95)]
    assert all(other is not None and other > base for other in others)
    assert needed(0.1, 0.1, 0.8) is None


@pytest.mark.parametrize(
    "terms", [Terms(0.0), Terms(-1.0), Terms(math.nan), Terms(1, level=0.5), Terms(1, power=1.0)]
)
def test_terms_that_make_no_sense_are_refused(terms: Terms) -> None:
    with pytest.raises(BadInput, match="makes no sense"):
        decide(np.ones(3), np.ones(3), terms)


def test_one_document_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BadInput, match="too few documents"):
        decide(np.ones(1), np.ones(1), Terms(1.0))
    with pytest.raises(BadInput, match="not finite"):
        decide(np.array([1.0, math.nan]), np.ones(2), Terms(1.0))
