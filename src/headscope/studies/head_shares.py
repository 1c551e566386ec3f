"""Which heads make a feature over a corpus, by direct feature attribution (DFA): read off the index, no model run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from headscope.index.store import FeatureIndex
from headscope.stats import MINIMUM, MINIMUM_UNITS, N_SAMPLES, Estimate, Measure, ratio, resampled, unit_draws
from headscope.studies.active import Text


@dataclass(frozen=True)
class HeadShare:
    """How much of a feature one head makes. Each of the three sums to 1 over heads."""

    head: int
    squared: Measure
    """`sum C_h^2`, normalised (the post's fraction of variance)."""
    covariance: Measure
    """`Cov(C_h, pre) / Var(pre)`: blind to a head that adds a constant; may be negative."""
    linear: Measure
    """`sum C_h`, normalised; may be negative."""


@dataclass(frozen=True)
class HeadShares:
    """What each head contributes to a feature over its active tokens above a threshold."""

    latent: int
    threshold: float
    n: int
    """Active tokens with an activation above the threshold."""
    heads: tuple[HeadShare, ...]

    @property
    def top(self) -> tuple[HeadShare, ...]:
        """Largest squared share first; empty where there are too few tokens for shares."""
        known = [share for share in self.heads if share.squared.value is not None]
        return tuple(sorted(known, key=lambda share: -(share.squared.value or 0.0)))


def head_shares(index: FeatureIndex, latent: int, thresholds: Sequence[float] = (0.0,)) -> tuple[HeadShares, ...]:
    """DFA by head of a feature over all its active tokens above each threshold; no model run.

    The null of the squared and the covariance share is that of the index's random directions, active as often as real
    features: mean and range over them.

    Raises:
        IndexFormatError: no such latent.
    """
    found = index.activations(latent)
    document = Text.of(index).document.reshape(-1)[found.position]
    nulls = [null for null in index.nulls() if null.kind == "random"]
    squared = _range([null.dfa for null in nulls if null.dfa is not None], found.heads.shape[1])
    covariance = _range([null.dfa_covariance for null in nulls if null.dfa_covariance is not None], len(squared))
    records = []
    for threshold in thresholds:
        kept = found.activation > threshold
        own, heads = document[kept], found.heads[kept].astype(np.float64)
        squares, total = np.square(heads), heads.sum(1)
        shares = [
            HeadShare(
                head=h,
                squared=ratio(own, squares[:, h], squares.sum(1), definition=_SQUARED, null=squared[h]),
                covariance=replace(_covariance(own, heads[:, h], total), null=covariance[h]),
                linear=ratio(own, heads[:, h], total, definition="sum C_h / sum over heads"),
            )
            for h in range(heads.shape[1])
        ]
        records.append(HeadShares(latent, threshold, int(kept.sum()), tuple(shares)))
    return tuple(records)


_SQUARED = "sum C_h^2 / sum over heads"
_COVARIANCE = "Cov(C_h, pre) / Var(pre)"


def _range(shares: Sequence[Float[np.ndarray, " head"]], n_heads: int) -> list[Estimate | None]:
    """Mean over null directions and the range that holds 95 % of them, head by head."""
    if not shares:
        return [None] * n_heads
    stacked = np.stack(shares)
    low, high = np.percentile(stacked, [2.5, 97.5], axis=0)
    return [Estimate(*ends) for ends in zip(stacked.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)]


def _covariance(
    document: Int[np.ndarray, " token"], part: Float[np.ndarray, " token"], whole: Float[np.ndarray, " token"]
) -> Measure:
    """Cov(part, whole) / Var(whole), with its interval by document."""
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
