"""Measures of a head's share of a feature, with their nulls."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from headscope.stats import MINIMUM, MINIMUM_UNITS, N_SAMPLES, Estimate, Measure, resampled, unit_draws

_COVARIANCE = "Cov(C_h, pre) / Var(pre)"


def head_ranges(shares: Sequence[Float[np.ndarray, " head"]], n_heads: int) -> list[Estimate | None]:
    """Return the mean over null directions and the range that holds 95 % of them, head by head."""
    if not shares:
        return [None] * n_heads
    stacked = np.stack(shares)
    low, high = np.percentile(stacked, [2.5, 97.5], axis=0)
    return [Estimate(*ends) for ends in zip(stacked.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)]


def exchanged(shares: Float[np.ndarray, "latent head"]) -> Estimate | None:
    """Return the null of a head's share when heads are permuted: over the shares of all heads; None without any."""
    known = shares[np.isfinite(shares).all(1)]
    if not len(known):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(float(known.mean()), float(low), float(high))


def covariance(
    document: Int[np.ndarray, " token"], part: Float[np.ndarray, " token"], whole: Float[np.ndarray, " token"]
) -> Measure:
    """Measure Cov(part, whole) / Var(whole), with its interval by document."""
    n = len(part)
    if n < MINIMUM:
        return Measure(_COVARIANCE, n, missing=f"{n} tokens; at least {MINIMUM} are needed")
    x, y = part - part.mean(), whole - whole.mean()
    if not np.square(y).mean() > (np.finfo(np.float32).eps * np.abs(whole).max()) ** 2:  # stored to 14 bits or more
        return Measure(_COVARIANCE, n, missing="the pre-activation is the same on all tokens")
    _, unit = np.unique(document, return_inverse=True)
    sums = np.stack([np.bincount(unit, values) for values in (np.ones(n), x, y, x * y, y * y)], axis=1)
    found = resampled(_covariance_share, sums, unit_draws(len(sums), n_samples=N_SAMPLES, seed=0))
    value = float((x * y).sum() / (y * y).sum())
    if found is None:
        few = f"no interval: {len(sums)} documents; it needs {MINIMUM_UNITS} that are not all alike"
        return Measure(_COVARIANCE, n, value, missing=few)
    return Measure(_COVARIANCE, n, value, *found, interval="95 %, documents resampled 1,000 times")


def _covariance_share(sums: Float[np.ndarray, "sample 5"]) -> Float[np.ndarray, " sample"]:
    n, x, y, xy, yy = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return (xy - x * y / n) / (yy - y * y / n)
