"""Head shares of a feature over a corpus, by direct feature attribution (DFA): from the index, without the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from headscope.index.store import FeatureIndex
from headscope.stats import Measure, ratio
from headscope.studies.how.share_measures import covariance, exchanged, head_ranges
from headscope.studies.support.active import Text


@dataclass(frozen=True)
class HeadShare:
    """Share of a feature that one head makes. Each of the three sums to 1 over heads."""

    head: int
    squared: Measure
    """`sum C_h^2`, normalised (the post's fraction of variance)."""
    covariance: Measure
    """`Cov(C_h, pre) / Var(pre)`: insensitive to a head with a constant contribution; may be negative."""
    linear: Measure
    """`sum C_h`, normalised; may be negative."""


@dataclass(frozen=True)
class HeadShares:
    """Contribution of each head to a feature over its active tokens above a threshold."""

    latent: int
    threshold: float
    n: int
    """Active tokens with an activation above the threshold."""
    heads: tuple[HeadShare, ...]

    @property
    def top(self) -> tuple[HeadShare, ...]:
        """Heads by squared share, largest first; empty where there are too few tokens for shares."""
        known = [share for share in self.heads if share.squared.value is not None]
        return tuple(sorted(known, key=lambda share: -(share.squared.value or 0.0)))


def head_shares(index: FeatureIndex, latent: int, thresholds: Sequence[float] = (0.0,)) -> tuple[HeadShares, ...]:
    """Compute DFA by head of a feature over all its active tokens above each threshold, without running the model.

    The null of the squared and the covariance share is that of the index's null directions, matched in density: mean
    and range over them. That of the linear share is the linear shares of all live features with their heads randomly
    permuted: 1 / n_heads, and the range that holds 95 % of them.

    Raises:
        IndexFormatError: no such latent.
    """
    found = index.activations(latent)
    document = Text.of(index).document.reshape(-1)[found.position]
    nulls = [null for null in index.nulls() if null.kind == "random"]
    squared = head_ranges([null.dfa for null in nulls if null.dfa is not None], found.heads.shape[1])
    covariances = head_ranges([null.dfa_covariance for null in nulls if null.dfa_covariance is not None], len(squared))
    alike = exchanged(index.shares["dfa_mean"])
    records = []
    for threshold in thresholds:
        kept = found.activation > threshold
        own, heads = document[kept], found.heads[kept].astype(np.float64)
        squares, total = np.square(heads), heads.sum(1)
        shares = [
            HeadShare(
                head=h,
                squared=ratio(
                    own, squares[:, h], squares.sum(1), definition="sum C_h^2 / sum over heads", null=squared[h]
                ),
                covariance=replace(covariance(own, heads[:, h], total), null=covariances[h]),
                linear=ratio(own, heads[:, h], total, definition="sum C_h / sum over heads", null=alike),
            )
            for h in range(heads.shape[1])
        ]
        records.append(HeadShares(latent, threshold, int(kept.sum()), tuple(shares)))
    return tuple(records)
