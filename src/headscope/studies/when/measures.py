"""Headline measures of a feature against a proxy, each with interval, null and definition. No torch.

Counts have Wilson intervals, and also those by resampling documents, since tokens of a document are not independent.
The null of each measure is its mean and range when the proxy is rotated by random whole numbers of blocks: its value
for a proxy that is as frequent, and as clustered, but unrelated to the feature.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.stats import (
    MINIMUM,
    MINIMUM_UNITS,
    Estimate,
    Measure,
    PairSums,
    clustered_auc,
    quotient,
    resampled,
    wilson,
)
from headscope.studies.when.split import Rotations, Split

RECALL = "P(f > 0 | proxy): the share of the proxy's tokens on which the feature is active"
BY_DOCUMENT = "bootstrap over documents, 95 %"

Statistic = Callable[[PairSums], Float[np.ndarray, " unit"]]


@dataclass(frozen=True)
class Measures:
    """Measures of one study."""

    split: Split
    draws: Float[np.ndarray, "sample unit"]
    """From `stats.unit_draws`, over the units of the split."""
    rotated: Rotations
    tau: float

    def precision(self) -> Measure:
        """Precision of the active tokens."""
        sums = self.split.sums
        definition = "P(proxy | f > 0): the share of the active tokens on which the proxy is true"
        measure = _ratio_of_counts(definition, sums["both"], sums["active"], self.draws, "active tokens")
        return _with_null(measure, self.rotated.sums.precision())

    def recall(self) -> Measure:
        """Recall of the whole proxy."""
        return _with_null(self.recall_of(self.split.mask), self.rotated.sums.recall())

    def recall_of(self, part: Bool[np.ndarray, " token"]) -> Measure:
        """Measure the recall of a part of the proxy."""
        true = self.split.count_by_unit(np.flatnonzero(part))
        both = self.split.count_by_unit(self.split.position[part[self.split.position]])
        return _ratio_of_counts(RECALL, both, true, self.draws, "tokens where the proxy is true")

    def mass_share(self) -> Measure:
        """Share of the summed activation where the proxy is true."""
        measure = Measure("sum of f where the proxy is true / sum of f", self.split.n_active)
        few = _too_few((self.split.n_active, "active tokens"))
        return self._resampled(measure, few, PairSums.mass_share, self.split.sums, self.rotated.sums)

    def pearson(self) -> Measure:
        """Correlation over all text tokens, as in the post."""
        measure = Measure(
            "Pearson correlation of f, zeros included, and the proxy over all text tokens", self.split.text.n
        )
        return self._resampled(measure, self._few, PairSums.pearson, self.split.sums, self.rotated.sums)

    def phi(self) -> Measure:
        """Phi coefficient over all text tokens."""
        measure = Measure("Pearson correlation of [f > 0] and the proxy over all text tokens", self.split.text.n)
        return self._resampled(measure, self._few, PairSums.phi, self.split.sums, self.rotated.sums)

    def pearson_above(self) -> Measure:
        """Correlation over the tokens with f > tau."""
        n, what = self.split.n_above(self.tau), f"tokens with f > {self.tau:g}"
        measure = Measure(f"Pearson correlation of f and the proxy over the {what}", n)
        sums = self.split.sums_above(self.tau)
        return self._resampled(measure, _too_few((n, what)), PairSums.pearson, sums, self.rotated.above)

    def auc(self) -> Measure:
        """Area under the ROC curve over all text tokens."""
        definition = "P(f at a token with the proxy true > f at one with it false) + P(equal) / 2"
        measure = Measure(definition, self.split.text.n)
        if self._few:
            return replace(measure, missing=self._few)
        value = self.split.ranking.auc()
        measure = _with_null(replace(measure, value=value), self.rotated.auc)
        true = self.split.true_by_unit
        bounds = clustered_auc(value, *self._placements(), true, self.split.text.counts - true)
        return self._bounded(measure, bounds, "over documents, 95 % (Obuchowski 1997)")

    def average_precision(self) -> Measure:
        """Area under the PR curve over all text tokens."""
        measure = Measure("sum over falling t of (recall(t) - recall(t before)) precision(t)", self.split.text.n)
        if self._few:
            return replace(measure, missing=self._few)
        measure = replace(measure, value=self.split.ranking.average_precision(), missing="no interval is made for it")
        return _with_null(measure, self.rotated.average_precision)

    @property
    def _few(self) -> str | None:
        """Reason why there is too little to compare tokens with and without the proxy."""
        n_true = self.split.n_true
        return _too_few(
            (self.split.n_active, "active tokens"),
            (n_true, "tokens where the proxy is true"),
            (self.split.text.n - n_true, "tokens where the proxy is false"),
        )

    def _resampled(
        self, measure: Measure, few: str | None, statistic: Statistic, sums: PairSums, null: PairSums
    ) -> Measure:
        """Fill in a statistic of sums by unit, and of those of its null."""
        if few:
            return replace(measure, missing=few)
        value = statistic(sums.total()).item()
        if not isfinite(value):
            return replace(measure, missing="it does not exist: the activation or the proxy is the same on all tokens")
        measure = _with_null(replace(measure, value=value), statistic(null))
        bounds = resampled(lambda drawn: statistic(PairSums(drawn)), sums.values, self.draws)
        return self._bounded(measure, bounds, BY_DOCUMENT)

    def _bounded(self, measure: Measure, bounds: tuple[float, float] | None, how: str) -> Measure:
        if bounds:
            return replace(measure, low=bounds[0], high=bounds[1], interval=how)
        n = self.split.text.n_documents
        few = f"{n} documents, at least {MINIMUM_UNITS} are needed"
        rare = "what is counted lies in too few documents, or is the same in all"
        return replace(measure, missing=f"no interval: {few if n < MINIMUM_UNITS else rare}")

    def _placements(self) -> tuple[Float[np.ndarray, " unit"], Float[np.ndarray, " unit"]]:
        """Summed placements of the true and of the false tokens of each unit (`Ranking.placements`)."""
        split = self.split
        by_group = split.ranking.placements()
        group = np.searchsorted(split.ranking.n, np.arange(split.n_active), side="right")
        silent_true = split.true_by_unit - split.sums["both"]
        silent = split.text.counts - split.sums["active"]
        sums = []
        classes = ((split.own, silent_true), (~split.own, silent - silent_true))
        for placement, (of, n_silent) in zip(by_group, classes, strict=True):
            active = np.bincount(split.unit[of], placement[group[of]], minlength=len(silent))
            sums.append(active + n_silent * placement[-1])  # inactive tokens are the last group, if there are any
        return sums[0], sums[1]


def _ratio_of_counts(
    definition: str,
    hits: Int[np.ndarray, " unit"] | Float[np.ndarray, " unit"],
    of: Int[np.ndarray, " unit"] | Float[np.ndarray, " unit"],
    draws: Float[np.ndarray, "sample unit"],
    what: str,
) -> Measure:
    n = int(of.sum())
    few = _too_few((n, what))
    if few:
        return Measure(definition, n, missing=few)
    whole = wilson(int(hits.sum()), n)
    by_document = resampled(quotient, np.stack([hits, of], axis=1).astype(np.float64), draws)
    return Measure(definition, n, whole.value, whole.low, whole.high, "Wilson 95 %", by_document)


def _too_few(*counts: tuple[int, str]) -> str | None:
    few = [f"{n} {what}" for n, what in counts if n < MINIMUM]
    return f"{', '.join(few)}: at least {MINIMUM} are needed" if few else None


def _with_null(measure: Measure, values: Float[np.ndarray, " rotation"]) -> Measure:
    """Add mean and range of the same measure for rotated proxies; none without a value or rotation."""
    values = values[np.isfinite(values)]
    if measure.value is None or not len(values):
        return measure
    return replace(measure, null=Estimate(float(values.mean()), float(values.min()), float(values.max())))
