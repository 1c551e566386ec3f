"""Estimates with intervals; numpy only."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`0.912 [0.908, 0.916]`."""
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with its Wilson 95 % interval (Wilson 1927); n = 0 gives the whole range."""
    if n == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    z = 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def bootstrap_ratio(
    numerator: Float[np.ndarray, " block"],
    denominator: Float[np.ndarray, " block"],
    *,
    n_samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """sum(numerator) / sum(denominator) with a 95 % percentile interval, resampling whole blocks."""
    rng = np.random.default_rng(seed)
    n = len(numerator)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_samples).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (weights @ numerator) / (weights @ denominator)
        value = float(numerator.sum() / denominator.sum())
    low, high = np.nanpercentile(ratios, [2.5, 97.5]) if np.isfinite(ratios).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class Measure:
    """A number with its interval, its n, its null and its definition, or the reason why there is none."""

    definition: str
    n: int
    """What it is a number of: the denominator of a ratio, the tokens of a correlation."""
    value: float | None = None
    low: float | None = None
    """95 %: Wilson for ratios of counts, else by resampling documents; None where neither can be had."""
    high: float | None = None
    interval: str | None = None
    """How `low` and `high` were made."""
    by_document: tuple[float, float] | None = None
    """For a ratio of counts, the interval by resampling documents: tokens of one are not independent."""
    null: Estimate | None = None
    """The same number where there is nothing to find: mean and range."""
    missing: str | None = None
    """Why there is no value, or no interval."""
