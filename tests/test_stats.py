from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose
from scipy.stats import binomtest, mannwhitneyu

from headscope.stats import (
    MINIMUM_UNITS,
    Estimate,
    PairSums,
    Ranking,
    bootstrap_ratio,
    clustered_auc,
    resampled,
    unit_draws,
    wilson,
)


# -------------------------------------------------------------------------------------------------------------- wilson
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    successes, n = counts
    estimate = wilson(successes, n)
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert estimate.value == successes / n
    assert_allclose([estimate.low, estimate.high], [expected.low, expected.high], rtol=1e-10, atol=1e-12)


def test_wilson_of_nothing_is_the_whole_range() -> None:
    estimate = wilson(0, 0)
    assert np.isnan(estimate.value)
    assert (estimate.low, estimate.high) == (0.0, 1.0)


# ----------------------------------------------------------------------------------------------------------- bootstrap
@given(
    hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0.1, 1e3)),
    st.floats(-100, 100, allow_subnormal=False),
)
def test_a_constant_ratio_has_no_spread(denominator: np.ndarray, ratio: float) -> None:
    estimate = bootstrap_ratio(ratio * denominator, denominator, n_samples=50)
    assert_allclose([estimate.value, estimate.low, estimate.high], [ratio] * 3, rtol=1e-12, atol=1e-12)


def test_the_bootstrap_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        denominator = rng.uniform(1, 3, 80)
        numerator = 0.7 * denominator + rng.normal(0, 0.5, 80)
        estimate = bootstrap_ratio(numerator, denominator, n_samples=400, seed=seed)
        assert estimate.low <= estimate.value <= estimate.high
        covered += estimate.low <= 0.7 <= estimate.high
    interval = wilson(covered, 300)
    assert interval.low <= 0.95 <= interval.high + 0.02  # percentile intervals of 80 blocks run a little narrow


def test_the_bootstrap_resamples_whole_blocks() -> None:
    rng = np.random.default_rng(1)
    numerator, denominator = rng.normal(size=25), rng.uniform(1, 2, 25)
    draws = np.random.default_rng(3).multinomial(25, np.full(25, 1 / 25), size=200)
    ratios = [np.repeat(numerator, counts).sum() / np.repeat(denominator, counts).sum() for counts in draws]
    low, high = np.percentile(ratios, [2.5, 97.5])
    estimate = bootstrap_ratio(numerator, denominator, n_samples=200, seed=3)
    assert_allclose([estimate.low, estimate.high], [low, high], rtol=1e-10)


def test_the_bootstrap_is_decided_by_its_seed() -> None:
    a, b = np.arange(10.0), np.arange(1.0, 11.0)
    assert bootstrap_ratio(a, b, seed=1) == bootstrap_ratio(a, b, seed=1)
    assert bootstrap_ratio(a, b, seed=1) != bootstrap_ratio(a, b, seed=2)


def test_a_ratio_over_nothing_is_nan_without_a_warning() -> None:
    estimate = bootstrap_ratio(np.zeros(4), np.zeros(4))
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()


def test_an_estimate_prints_its_interval() -> None:
    assert str(Estimate(0.91234, 0.9081, 0.9163)) == "0.9123 [0.9081, 0.9163]"


def test_an_interval_by_resampling_is_that_of_drawing_whole_units() -> None:
    rng = np.random.default_rng(1)
    sums = rng.uniform(1, 2, (25, 2))
    draws = unit_draws(25, n_samples=200, seed=3)
    assert (draws.sum(1) == 25).all()
    drawn = [np.repeat(sums, counts.astype(int), axis=0).sum(0) for counts in draws]
    expected = np.percentile([a / b for a, b in drawn], [2.5, 97.5])
    assert_allclose(resampled(lambda s: s[:, 0] / s[:, 1], sums, draws), expected, rtol=1e-10)


def test_no_interval_of_few_units_of_what_often_does_not_exist_or_never_moves() -> None:
    def ratio(s: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return s[:, 0] / s[:, 1]

    def interval(sums: np.ndarray) -> tuple[float, float] | None:
        return resampled(ratio, sums, unit_draws(len(sums), n_samples=200, seed=0))

    varied = np.random.default_rng(0).uniform(1, 2, (MINIMUM_UNITS, 2))
    assert interval(varied) is not None
    assert interval(varied[1:]) is None
    assert interval(varied * np.eye(MINIMUM_UNITS)[:, :1]) is None  # all of it in one unit
    assert interval(np.ones((20, 2))) is None


# ----------------------------------------------------------------------------------------------------------- pair sums
def dense(n_tokens: int, seed: int, share_active: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations of all tokens, zeros included and with ties, a mask, and the unit of each."""
    rng = np.random.default_rng(seed)
    f = np.round(rng.gamma(2, 1, n_tokens), 1) * (rng.random(n_tokens) < share_active)
    y = rng.random(n_tokens) < 0.2 + 0.3 * (f > 1)
    return f, y, np.sort(rng.integers(0, 4, n_tokens))


def pair_sums(f: np.ndarray, y: np.ndarray, unit: np.ndarray, n_units: int, shift: float) -> PairSums:
    active = f > 0
    silent = np.bincount(unit[~active], minlength=n_units)
    silent_true = np.bincount(unit[~active & y], minlength=n_units)
    return PairSums.of(unit[active], f[active], y[active], silent, silent_true, shift=shift)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])


@given(st.integers(2, 300), st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_pair_sums_say_what_numpy_says_of_all_tokens(n: int, seed: int, share: float) -> None:
    f, y, unit = dense(n, seed, share)
    sums = pair_sums(f, y, unit, 4, float(f.mean()))
    for of, total in [(np.ones(n, bool), sums.total())] + [
        (unit == u, PairSums(sums.values[u : u + 1])) for u in range(4)
    ]:
        a, b = f[of], y[of]
        expected = {
            "n": len(a),
            "true": b.sum(),
            "active": (a > 0).sum(),
            "both": (b & (a > 0)).sum(),
            "mass": a.sum(),
            "mass_true": a[b].sum(),
        }
        for name, value in expected.items():
            assert_allclose(total[name], value, rtol=1e-12, atol=1e-12)
        for found, on, other in ((total.precision(), a > 0, b), (total.recall(), b, a > 0)):
            assert_allclose(found, other[on].mean() if on.any() else np.nan, rtol=1e-12)
        assert_allclose(total.mass_share(), a[b].sum() / a.sum() if a.sum() else np.nan, rtol=1e-12, atol=1e-12)
    if 0 < y.sum() < n and (f > 0).any() and f.min() < f.max():
        assert_allclose(sums.total().pearson(), correlation(f, y), atol=1e-10)
    if 0 < y.sum() < n and 0 < (f > 0).sum() < n:
        assert_allclose(sums.total().phi(), correlation(f > 0, y), atol=1e-10)
    elif n:
        assert np.isnan(sums.total().phi())


@given(st.integers(2, 200), st.integers(0, 1000), st.lists(st.integers(0, 200), max_size=5))
def test_sums_of_unequal_parts_add_up_to_those_of_the_whole(n: int, seed: int, cuts: list[int]) -> None:
    f, y, unit = dense(n, seed)
    whole = pair_sums(f, y, unit, 4, 0.3).values
    ends = [0, *sorted(min(c, n) for c in cuts), n]
    parts = [pair_sums(f[a:b], y[a:b], unit[a:b], 4, 0.3).values for a, b in pairwise(ends)]
    assert_allclose(sum(parts), whole, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e6, 3e38])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlation_at_any_scale_and_far_from_zero(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.random(4000) < 0.3
    f = (offset + rng.random(4000) + y) * scale
    found = pair_sums(f, y, np.zeros(4000, int), 1, float(f.mean())).total().pearson()
    assert_allclose(found, correlation((f - f.mean()) / scale, y), rtol=1e-9)


# ------------------------------------------------------------------------------------------------------------- ranking
def ranking(f: np.ndarray, y: np.ndarray) -> Ranking:
    order = np.argsort(-f, kind="stable")
    order = order[f[order] > 0]
    return Ranking.of(f[order], y[order], int((f == 0).sum()), int(y[f == 0].sum()))


@given(st.integers(2, 120), st.integers(0, 1000), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_areas_equal_those_counted_pair_by_pair_and_point_by_point(n: int, seed: int, share: float) -> None:
    f, y, _ = dense(n, seed, share)
    found = ranking(f, y)
    if y.all() or not y.any():
        assert np.isnan(found.auc())
    else:
        a, b = f[y][:, None], f[~y][None]
        assert_allclose(found.auc(), ((a > b) + 0.5 * (a == b)).mean(), rtol=1e-12)
        by_scipy = mannwhitneyu(f[y], f[~y]).statistic / (y.sum() * (~y).sum())
        assert_allclose(found.auc(), by_scipy, rtol=1e-12)
        for placements, own in zip(found.placements(), (y, ~y), strict=True):
            at = [placements[found.threshold == v].item() for v in f[own]]
            assert_allclose(np.mean(at), found.auc(), rtol=1e-12)
    area, before = 0.0, 0.0
    for threshold in np.unique(f)[::-1]:
        above = f >= threshold
        if y.any():
            now = y[above].sum() / y.sum()
            area += (now - before) * y[above].mean()
            before = now
    if y.any():
        assert_allclose(found.average_precision(), area, rtol=1e-12)
    else:
        assert np.isnan(found.average_precision())


def auc_interval(f: np.ndarray, y: np.ndarray, unit: np.ndarray, n_units: int) -> tuple[float, float] | None:
    found = ranking(f, y)
    of = [np.flatnonzero(found.threshold == v).item() for v in f]
    above, below = (p[of] for p in found.placements())
    sums = [np.bincount(unit[own], p[own], minlength=n_units) for own, p in ((y, above), (~y, below))]
    counts = [np.bincount(unit[own], minlength=n_units) for own in (y, ~y)]
    return clustered_auc(found.auc(), *sums, *counts)


def test_of_independent_tokens_the_interval_of_the_auc_is_delongs() -> None:
    f, y, _ = dense(200, 5, 0.6)
    a, b = f[y][:, None], f[~y][None]
    wins = (a > b) + 0.5 * (a == b)
    variance = wins.mean(1).var(ddof=1) / y.sum() + wins.mean(0).var(ddof=1) / (~y).sum()
    low, high = auc_interval(f, y, np.arange(200), 200)
    assert_allclose([low, high], wins.mean() + np.array([-1, 1]) * 1.959963984540054 * variance**0.5, rtol=1e-10)


def test_the_interval_of_an_auc_covers_it_when_tokens_of_a_document_are_alike() -> None:
    rng = np.random.default_rng(0)
    n_units, size = 60, 20
    unit = np.repeat(np.arange(n_units), size)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        y = rng.random(n_units * size) < np.repeat(rng.beta(1, 2, n_units), size)
        f = np.maximum(0, rng.normal(size=len(y)) + y + np.repeat(rng.normal(size=n_units), size))
        return f, y

    truth = np.mean([ranking(*draw()).auc() for _ in range(400)])
    intervals = [auc_interval(*draw(), unit, n_units) for _ in range(200)]
    covered = wilson(int(sum(i is not None and i[0] <= truth <= i[1] for i in intervals)), 200)
    assert covered.low <= 0.95 <= covered.high + 0.02


def test_no_interval_of_an_auc_of_few_documents_or_of_one() -> None:
    f, y, unit = dense(200, 5, 0.6)
    assert auc_interval(f, y, unit, 4) is None
    assert auc_interval(y.astype(float), y, np.arange(200), 200) is None
