"""Settings and results of a proxy search."""

from dataclasses import dataclass
from typing import Literal

from headscope.proxies.algebra import Proxy

Family = Literal["induction", "local context", "high-level context", "token"]
Kind = Literal[Family, "unexplained"]

FAMILIES: tuple[Family, ...] = ("induction", "local context", "high-level context", "token")
STATISTICS = ("precision", "recall", "f1", "auc", "pearson", "phi")

DEFINITIONS = {
    "precision": "P(proxy | f > 0) over the text tokens of the scoring half",
    "recall": "P(f > 0 | proxy) over the text tokens of the scoring half",
    "f1": "2 |f > 0 and proxy| / (|f > 0| + |proxy|) in the scoring half",
    "auc": "P(f at a token where the proxy holds > f at one where it does not) + P(equal) / 2, in the scoring half",
    "pearson": "correlation of f, zeros included, with the proxy over the text tokens of the scoring half",
    "phi": "correlation of [f > 0] with the proxy over the text tokens of the scoring half",
}
"""Each statistic in one line; the scoring half is the documents that nothing was chosen on."""


@dataclass(frozen=True)
class SearchPlan:
    """Settings of the search, and the criteria for an explanation."""

    window: int = 10
    """Tokens after a source token, for local context."""
    n_sources: int = 3
    """Source tokens of a feature that are tried individually, largest share of squared DFA first."""
    source_sets: tuple[int, ...] = (3, 10)
    """Sizes of sets of source tokens that are tried together."""
    max_tokens: int = 16
    """Maximum number of tokens in a set of current, or next, tokens."""
    max_bigrams: int = 4
    min_repeats: int = 5
    """Active tokens of the fitting half that a token or bigram needs to enter a set,"""
    min_documents: int = 2
    """and the number of documents that these must come from."""
    min_active: int = 30
    """A feature with fewer active tokens in one of the halves is not classified."""
    min_pearson: float = 0.3
    """Minimum correlation of an explanation."""
    n_rotations: int = 20
    """Rotations of the activations against the text, for the null."""
    n_resamples: int = 200
    """Resamples of documents, for intervals."""
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """A statistic on the scoring half; None where undefined."""

    value: float | None
    low: float | None = None
    """95 % interval by documents; None with fewer than ten."""
    high: float | None = None
    null: float | None = None
    """Its mean when the activations are rotated along the corpus by a random number of blocks."""


@dataclass(frozen=True)
class FamilyScores:
    """The best proxy of a family, chosen on one half of the documents and scored on the other."""

    family: Family
    proxy: Proxy
    fit_pearson: float
    """The correlation it was chosen by."""
    n_proxy: int
    """Tokens of the scoring half at which the proxy holds."""
    n_both: int
    """Tokens of these at which the feature is active."""
    n_documents: int
    """Documents of the scoring half in which the proxy holds somewhere."""
    scores: dict[str, Score]
    """By `STATISTICS`."""


@dataclass(frozen=True)
class FeatureProxies:
    """Result of the search for a feature.

    `kind` is the family whose best proxy correlates most with the activation on the fitting half, if this holds on the
    scoring half: at least `min_pearson`, the lower end of its interval (the value itself, where no document moves it)
    above all rotations, and on `min_active` tokens of ten documents. Else it is `unexplained`, and None with fewer than
    `min_active` active tokens in a half.
    """

    latent: int
    kind: Kind | None
    n: int
    """Text tokens of the scoring half."""
    n_active: int
    """Tokens of these at which the feature is active."""
    n_active_fit: int
    """Active tokens in the fitting half."""
    null_high: float | None
    """The largest correlation of the best proxy with rotated activations."""
    families: tuple[FamilyScores, ...]
    """Best on the fitting half first."""

    def lines(self) -> list[str]:
        """Return the result as text: the feature, then one line per family."""
        kind = self.kind or "too rare to be classified"
        lines = [f"feature {self.latent}: {kind}; active on {self.n_active:,} of {self.n:,} tokens of the scoring half"]
        for family in self.families:
            scores = "  ".join(f"{name} {_said(family.scores[name])}" for name in STATISTICS)
            lines += [f"  {family.family}: {family.proxy.name}", f"    holds on {family.n_proxy:,}  {scores}"]
        return lines


def _said(score: Score) -> str:
    if score.value is None:
        return "-"
    interval = "" if score.low is None else f" [{score.low:.3f}, {score.high:.3f}]"
    null = "" if score.null is None else f" (null {score.null:.3f})"
    return f"{score.value:.3f}{interval}{null}"
