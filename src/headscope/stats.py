"""Estimates with intervals, and the sums they are computed from; numpy only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import nan

import numpy as np
from jaxtyping import Bool, Float, Int, Real, Shaped

MINIMUM = 30
"""Minimum number of tokens for ratios and correlations."""
MINIMUM_UNITS = 10
"""Minimum number of documents for intervals by resampling."""
N_SAMPLES = 1000
"""Default number of resamples of documents."""
_Z = 1.959963984540054
_UNDEFINED = 0.05  # share of resamples in which a number may be undefined: beyond it there is no interval


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.912 [0.908, 0.916]`."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Measure:
    """A number with its interval, n, null and definition, or the reason why there is none."""

    definition: str
    n: int
    """Sample size: the denominator of a ratio, the tokens of a correlation."""
    value: float | None = None
    low: float | None = None
    """95 %; None where undefined."""
    high: float | None = None
    interval: str | None = None
    """Method of `low` and `high`."""
    by_document: tuple[float, float] | None = None
    """For a ratio of counts, the interval by resampling documents: tokens of one are not independent."""
    null: Estimate | None = None
    """The same number under the null: mean and range."""
    missing: str | None = None
    """Reason why there is no value, or no interval."""

    def __str__(self) -> str:
        """Format `0.912 [0.908, 0.916], n 312, null 0.01 [0, 0.02]`, or the reason why there is no number."""
        null = "" if self.null is None else f", null {self.null}"
        if self.value is None:
            return f"no number ({self.missing}){null}"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}, n {self.n:,}{null}"


def estimate_of(measure: Measure) -> Estimate | None:
    """Convert a measure to the null of another: its value with its interval, or the value only; or None."""
    if measure.value is None:
        return None
    low, high = (measure.value if end is None else end for end in (measure.low, measure.high))
    return Estimate(measure.value, low, high)


# -------------------------------------------------------------------------------------------------------------- wilson
def wilson(successes: int | float, n: int | float) -> Estimate:
    """Estimate a proportion with its Wilson 95 % interval (Wilson 1927); n = 0 gives the whole range.

    n need not be an integer: for weighted observations it is the effective sample size.
    """
    if n == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    low, high = wilson_bounds(np.array([successes]), np.array([n]))
    return Estimate(successes / n, float(low[0]), float(high[0]))


def wilson_bounds(
    successes: Real[np.ndarray, " point"], n: Real[np.ndarray, " point"]
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """Return lower and upper ends of Wilson 95 % intervals; n must not be 0.

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`.
    """
    p = successes / n
    centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * np.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
    # in exact arithmetic the interval contains p; at 0 and 1 its end is p, and rounding must not move it
    return np.clip(centre - half, 0, p), np.clip(centre + half, p, 1)


# ----------------------------------------------------------------------------------------------------------- bootstrap
def bootstrap_ratio(
    numerator: Float[np.ndarray, " block"],
    denominator: Float[np.ndarray, " block"],
    *,
    n_samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Estimate sum(numerator) / sum(denominator) with a 95 % percentile interval, resampling whole blocks."""
    draws = unit_draws(len(numerator), n_samples=n_samples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (draws @ numerator) / (draws @ denominator)
        value = float(numerator.sum() / denominator.sum())
    low, high = np.nanpercentile(ratios, [2.5, 97.5]) if np.isfinite(ratios).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


@lru_cache(maxsize=2)  # a study requests the same ones for each of its numbers
def unit_draws(n_units: int, *, n_samples: int, seed: int) -> Float[np.ndarray, "sample unit"]:
    """Return how often each unit is drawn in resamples of n_units with replacement: rows sum to n_units; read-only."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=n_samples).astype(np.float64)
    draws.setflags(write=False)
    return draws


def resampled(
    statistic: Callable[[Shaped[np.ndarray, "sample sum"]], Float[np.ndarray, " sample"]],
    sums: Float[np.ndarray, "unit sum"],
    draws: Float[np.ndarray, "sample unit"],
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a function of sums over units, such as documents, by resampling units.

    Args:
        statistic: function of the sums of each sample; NaN where undefined.
        sums: sums of each unit.
        draws: from `unit_draws`.

    Returns:
        None with fewer than `MINIMUM_UNITS` units, when the statistic is undefined in one of 20 samples, or when it is
            the same in all of them: resampling is then uninformative.
    """
    if len(sums) < MINIMUM_UNITS:
        return None
    values = statistic(draws @ sums)
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - _UNDEFINED) * len(values):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return (float(low), float(high)) if defined.min() < defined.max() else None


def quotient(sums: Float[np.ndarray, "sample 2"]) -> Float[np.ndarray, " sample"]:
    """Divide the first sum by the second, for `resampled`; not finite where the second is 0."""
    return _ratio(sums[:, 0], sums[:, 1])


def ratio(
    document: Int[np.ndarray, " token"],
    numerator: Float[np.ndarray, " token"],
    denominator: Float[np.ndarray, " token"],
    *,
    definition: str,
    null: Estimate | None = None,
) -> Measure:
    """Measure sum(numerator) / sum(denominator) with its interval by document.

    Without a value, with the reason, for fewer than 30 tokens, or where the denominator is 0; without an interval for
    fewer than 10 documents, or if all documents are equal.
    """
    n, total = len(document), float(denominator.sum())
    if n < MINIMUM or total == 0:
        missing = f"{n} tokens; at least {MINIMUM} are needed" if n < MINIMUM else "nothing to take a share of"
        return Measure(definition, n, null=null, missing=missing)
    _, unit = np.unique(document, return_inverse=True)
    sums = np.stack([np.bincount(unit, numerator), np.bincount(unit, denominator)], axis=1)
    found = resampled(quotient, sums, unit_draws(len(sums), n_samples=N_SAMPLES, seed=0))
    low, high = found or (None, None)
    few = f"no interval: {len(sums)} documents; it needs {MINIMUM_UNITS} that are not all alike"
    return Measure(
        definition,
        n,
        value=float(numerator.sum()) / total,
        low=low,
        high=high,
        interval=f"95 %, documents resampled {N_SAMPLES:,} times" if found else None,
        null=null,
        missing=None if found else few,
    )


def mean_interval(
    values: Float[np.ndarray, " unit"], *, n_samples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a mean by resampling units; None as in `resampled`."""
    draws = unit_draws(len(values), n_samples=n_samples, seed=seed)
    return resampled(lambda sums: sums[:, 0] / len(values), values[:, None], draws)


def jensen_shannon(
    p: Float[np.ndarray, "*axes item"], q: Float[np.ndarray, "*axes item"]
) -> Float[np.ndarray, "*axes"]:
    """Compute the Jensen-Shannon divergence of distributions in bits: 0 if equal, 1 if disjoint.

    `(KL(p, m) + KL(q, m)) / 2`, m = (p + q) / 2 (Lin 1991). NaN where p or q is.
    """
    middle = (p + q) / 2

    def from_middle(of: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(of > 0, of * np.log2(of / middle), 0 * of).sum(-1)

    return (from_middle(p) + from_middle(q)) / 2


# ---------------------------------------------------------------------------------------------------------- pair sums
PAIR_SUMS = ("n", "true", "active", "both", "mass", "mass_true", "centred", "centred_true", "centred_square")


@dataclass(frozen=True)
class PairSums:
    """Sums over tokens of an activation f >= 0 and a mask y, for ratios and correlations.

    Sums are additive over parts; so each row of `values` can be a document. Ratios and correlations are NaN where
    undefined.
    """

    values: Float[np.ndarray, "unit sum"]
    """`PAIR_SUMS`: n, sum y, sum [f > 0], sum [f > 0] y, sum f, sum f y, sum g, sum g y, sum g^2; g = f - shift, with
    the same shift everywhere, near the mean of f, to avoid cancellation."""

    @classmethod
    def of(
        cls,
        unit: Int[np.ndarray, " active"],
        f: Float[np.ndarray, " active"],
        y: Bool[np.ndarray, " active"],
        silent: Int[np.ndarray, " unit"],
        silent_true: Int[np.ndarray, " unit"],
        *,
        shift: float,
    ) -> "PairSums":
        """Compute sums by unit.

        Args:
            unit: unit of each active token.
            f: its activation.
            y: whether the mask is true there.
            silent: tokens of each unit with f = 0.
            silent_true: number of these where the mask is true.
            shift: see `values`.
        """
        of_true, g = unit[y], f.astype(np.float64) - shift
        n_units = len(silent)

        def total(of: Int[np.ndarray, " token"], weights: Float[np.ndarray, " token"] | None = None) -> np.ndarray:
            return np.bincount(of, weights, minlength=n_units)

        active, both = total(unit), total(of_true)
        sums = {
            "n": silent + active,
            "true": silent_true + both,
            "active": active,
            "both": both,
            "mass": total(unit, f),
            "mass_true": total(of_true, f[y]),
            "centred": total(unit, g) - shift * silent,
            "centred_true": total(of_true, g[y]) - shift * silent_true,
            "centred_square": total(unit, g * g) + shift * shift * silent,
        }
        return cls(np.stack([sums[name].astype(np.float64) for name in PAIR_SUMS], axis=-1))

    def total(self) -> "PairSums":
        """Sum over all units."""
        return PairSums(self.values.sum(0, keepdims=True))

    def __getitem__(self, name: str) -> Float[np.ndarray, " unit"]:
        """Return one of `PAIR_SUMS`."""
        return self.values[..., PAIR_SUMS.index(name)]

    def precision(self) -> Float[np.ndarray, " unit"]:
        """P(y | f > 0)."""
        return _ratio(self["both"], self["active"])

    def recall(self) -> Float[np.ndarray, " unit"]:
        """P(f > 0 | y)."""
        return _ratio(self["both"], self["true"])

    def mass_share(self) -> Float[np.ndarray, " unit"]:
        """`sum f y / sum f`."""
        return _ratio(self["mass_true"], self["mass"])

    def pearson(self) -> Float[np.ndarray, " unit"]:
        """Correlation of f and y over the tokens of a unit, zeros included."""
        mean, p = _ratio(self["centred"], self["n"]), _ratio(self["true"], self["n"])
        covariance = _ratio(self["centred_true"], self["n"]) - mean * p
        variance = _ratio(self["centred_square"], self["n"]) - mean * mean
        return _correlation(covariance, variance, p * (1 - p))

    def phi(self) -> Float[np.ndarray, " unit"]:
        """Correlation of [f > 0] and y over the tokens of a unit."""
        a, p = _ratio(self["active"], self["n"]), _ratio(self["true"], self["n"])
        return _correlation(_ratio(self["both"], self["n"]) - a * p, a * (1 - a), p * (1 - p))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)


def _correlation(covariance: np.ndarray, *variances: np.ndarray) -> np.ndarray:
    a, b = (np.sqrt(np.maximum(v, 0)) for v in variances)
    return np.clip(_ratio(covariance, a * b), -1, 1)


# ------------------------------------------------------------------------------------------------------------- ranking
@dataclass(frozen=True)
class Ranking:
    """Tokens ranked by activation, with ties as one group, for precision-recall and ROC curves.

    Groups are in descending order; the last may hold the tokens with f = 0.
    """

    threshold: Float[np.ndarray, " group"]
    """The activation of the group."""
    n: Int[np.ndarray, " group"]
    """Tokens of this group and all above."""
    true: Int[np.ndarray, " group"]
    """Number of these with the mask true."""

    @classmethod
    def of(
        cls, f: Float[np.ndarray, " active"], y: Bool[np.ndarray, " active"], n_silent: int, n_silent_true: int
    ) -> "Ranking":
        """Rank active tokens, and the inactive ones as one last group.

        Args:
            f: activations, above 0 and descending.
            y: whether the mask is true at each.
            n_silent: tokens with f = 0.
            n_silent_true: number of these with the mask true.
        """
        last = np.flatnonzero(np.append(f[1:] != f[:-1], True)) if len(f) else np.zeros(0, dtype=np.int64)
        true = np.cumsum(y)[last]
        threshold, n = f[last].astype(np.float64), last + 1
        if n_silent:
            both = int(true[-1]) if len(true) else 0
            threshold, n, true = (
                np.append(threshold, 0),
                np.append(n, len(f) + n_silent),
                np.append(true, both + n_silent_true),
            )
        return cls(threshold, n, true)

    def auc(self) -> float:
        """P(f at a true token > f at a false one) + P(equal) / 2: the area under the ROC curve by the trapezium rule.

        NaN when the mask is never or always true.
        """
        true, false = self.true, self.n - self.true
        area = (np.diff(false, prepend=0) * (true + np.append(0, true[:-1]))).sum()  # twice, in integers
        pairs = int(true[-1]) * int(false[-1])
        return int(area) / (2 * pairs) if pairs else nan

    def average_precision(self) -> float:
        """`sum (recall_i - recall_{i-1}) precision_i` over groups; NaN when the mask is never true."""
        area = (np.diff(self.true, prepend=0) * (self.true / self.n)).sum()
        return float(area) / int(self.true[-1]) if self.true[-1] else nan

    def placements(self) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
        """Share of false tokens below a true token of each group; for a false one, of true tokens above it.

        Equal tokens count a half. The mean of either over its tokens is the AUC.
        """
        shares = []
        for counts in (self.n - self.true, self.true):
            middle = (counts + np.append(0, counts[:-1])) / 2
            shares.append(middle / max(int(counts[-1]), 1))
        return 1 - shares[0], shares[1]


def clustered_auc(
    auc: float,
    true_placements: Float[np.ndarray, " unit"],
    false_placements: Float[np.ndarray, " unit"],
    n_true: Int[np.ndarray, " unit"],
    n_false: Int[np.ndarray, " unit"],
) -> tuple[float, float] | None:
    """Return the 95 % interval of an AUC over tokens clustered in units, such as documents.

    Obuchowski (1997), Biometrics 53:567, "Nonparametric analysis of clustered ROC curve data": the variance of the
    sums of placements over units, and a normal interval, cut to [0, 1].

    Args:
        auc: AUC over all tokens.
        true_placements: sum over the true tokens of a unit (`Ranking.placements`).
        false_placements: the same over its false tokens.
        n_true: true tokens of the unit.
        n_false: false tokens of it.

    Returns:
        None with fewer than `MINIMUM_UNITS` units, fewer than two that have true tokens, or false ones, and when all
        units agree, as at an AUC of 1.
    """
    units, with_true, with_false = len(n_true), int((n_true > 0).sum()), int((n_false > 0).sum())
    if units < MINIMUM_UNITS or min(with_true, with_false) < 2:
        return None
    m, n = float(n_true.sum()), float(n_false.sum())
    above, below = true_placements - n_true * auc, false_placements - n_false * auc
    variance = with_true / (with_true - 1) * (above @ above) / m**2
    variance += with_false / (with_false - 1) * (below @ below) / n**2
    variance += 2 * units / (units - 1) * (above @ below) / (m * n)
    if not variance > 0:
        return None
    half = _Z * float(variance) ** 0.5
    return max(0.0, auc - half), min(1.0, auc + half)
