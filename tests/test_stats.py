import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose
from scipy.stats import binomtest

from headscope.stats import Estimate, bootstrap_ratio, wilson


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
