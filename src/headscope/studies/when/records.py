"""Records of a specificity study: plain values and numpy arrays, no torch.

A *mask* is an evaluated proxy: whether it is true at each corpus position. Positions are
`block * block_size + position in the block`. Undefined values are None with their reason, never NaN.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headscope.stats import Estimate, Measure


@dataclass(frozen=True)
class Counts:
    """Text tokens by whether the feature is active and whether the proxy is true."""

    n_tokens: int
    """Text tokens of the corpus: special tokens are always excluded."""
    n_documents: int
    """Documents with at least one text token."""
    n_active: int
    n_proxy: int
    n_both: int
    """True positives: active and proxy true."""

    @property
    def n_false_positives(self) -> int:
        """Active where the proxy is false."""
        return self.n_active - self.n_both

    @property
    def n_false_negatives(self) -> int:
        """Not active where the proxy is true."""
        return self.n_proxy - self.n_both

    @property
    def base_rate(self) -> float:
        """Share of tokens where the proxy is true: the precision of a feature that fires at random."""
        return self.n_proxy / self.n_tokens


@dataclass(frozen=True)
class Histogram:
    """Active tokens by activation, in equal bins from 0 to the maximum, split by the proxy.

    A bin holds `edges[i] <= f < edges[i + 1]`, the last one its upper edge too.
    """

    edges: Float[np.ndarray, " edge"]
    """One more than there are bins."""
    true: Int[np.ndarray, " bin"]
    """Active tokens where the proxy is true."""
    false: Int[np.ndarray, " bin"]
    true_mass: Float[np.ndarray, " bin"]
    """Summed activation of these tokens."""
    false_mass: Float[np.ndarray, " bin"]
    n: int
    """Number of active tokens."""
    definition: str = "active tokens (f > 0) by activation, split by whether the proxy is true"


@dataclass(frozen=True)
class ExpectedValue:
    """Bin centre times count over N: contribution of each range of activations to a mean.

    With normalisation `joint`, N is all text tokens for both classes, and the stacked bars sum to the mean activation
    (to the width of a bin). With `class`, the post's code, N is the number of active tokens in the class itself: the
    bars of each class sum to its own mean over active tokens, so that a rare class looks large and stacking is
    meaningless.
    """

    normalisation: str
    edges: Float[np.ndarray, " edge"]
    true: Float[np.ndarray, " bin"]
    false: Float[np.ndarray, " bin"]
    n_true: int
    """Divisor of the bars of each class."""
    n_false: int
    definition: str


@dataclass(frozen=True)
class PrecisionByThreshold:
    """P(proxy | f > t) with Wilson 95 % intervals; thresholds that no token exceeds are omitted."""

    threshold: Float[np.ndarray, " point"]
    n: Int[np.ndarray, " point"]
    """Tokens with f > t."""
    n_both: Int[np.ndarray, " point"]
    """Tokens of these with the proxy true."""
    value: Float[np.ndarray, " point"]
    low: Float[np.ndarray, " point"]
    high: Float[np.ndarray, " point"]
    base_rate: float
    """P(proxy) over all tokens: the precision of a feature that fires at random."""
    definition: str = "share of the tokens with f > t on which the proxy is true; Wilson 95 % interval"


@dataclass(frozen=True)
class TopPrecision:
    """Precision among the most active tokens; ties with the k-th are all included, so n may exceed k."""

    k: int
    n: int
    n_both: int
    precision: Estimate
    """Precision, Wilson."""


@dataclass(frozen=True)
class FalsePositiveRange:
    """Active tokens in one range of activations, `low <= f < high` (the last range includes its upper end)."""

    low: float
    high: float
    n: int
    n_false: int
    """Tokens of these with the proxy false."""
    share: Estimate | None
    """n_false / n, Wilson; None for an empty range."""
    position: Int[np.ndarray, " example"]
    """Sampled false positives, strongest first."""
    activation: Float[np.ndarray, " example"]


@dataclass(frozen=True)
class Curve:
    """Precision-recall and ROC curve in one: predict the proxy wherever f >= t, t falling from the maximum to 0.

    The last point has t = 0: every token, active or not, is predicted. Tokens of equal activation, including zeros,
    enter together. Points are thinned; areas use all of them.
    """

    threshold: Float[np.ndarray, " point"]
    n: Int[np.ndarray, " point"]
    """Tokens with f >= t."""
    n_both: Int[np.ndarray, " point"]
    precision: Float[np.ndarray, " point"]
    recall: Float[np.ndarray, " point"]
    false_positive_rate: Float[np.ndarray, " point"]
    base_rate: float
    n_tokens: int
    definition: str = "predict the proxy wherever f >= t, over all text tokens; zeros are one tie"


@dataclass(frozen=True)
class SubtypeRecall:
    """Recall on a part of the proxy: a subtype's tokens where the proxy itself is true."""

    name: str
    n: int
    n_both: int
    recall: Measure


@dataclass(frozen=True)
class Sensitivity:
    """Recall of the proxy: does the feature fire where it is true?"""

    recall: Measure
    subtypes: tuple[SubtypeRecall, ...]
    """As given, and last `none of these` where the subtypes do not cover the proxy."""
    false_negatives: Int[np.ndarray, " n"]
    """Positions of all false negatives: proxy true, f = 0; ascending."""
    sample: Int[np.ndarray, " example"]
    """Some of them in random order, for manual judgement: any first part is a random sample."""


@dataclass(frozen=True)
class Specificity:
    """One feature against one proxy over the text tokens of an index."""

    latent: int
    proxy: str
    """Its canonical text; `a mask` for a mask."""
    proxy_hash: str | None
    """None for a mask."""
    corpus: str
    counts: Counts
    notes: tuple[str, ...]
    """Reasons for undefined measures: a feature that is never active, a proxy that is never or always true."""
    maximum: float
    """Largest activation; 0 for a dead feature."""
    histogram: Histogram
    precision: Measure
    """P(proxy | f > 0)."""
    precision_by_threshold: PrecisionByThreshold
    top: tuple[TopPrecision, ...]
    ranges: tuple[FalsePositiveRange, ...]
    mass_share: Measure
    """Share of the summed activation at tokens where the proxy is true."""
    sensitivity: Sensitivity
    curve: Curve | None
    """None when the feature is never active, or the proxy never or always true."""
    auc: Measure
    """Area under the ROC curve: P(f at a true token > f at a false one) + P(equal) / 2."""
    average_precision: Measure
    """Area under the PR curve, as steps."""
    pearson: Measure
    """Correlation of the activation, zeros included, with the proxy, over all text tokens."""
    phi: Measure
    """Correlation of being active with the proxy, over all text tokens."""
    pearson_above: Measure
    """Correlation of the activation with the proxy, over the tokens with f > tau only."""
    tau: float
    n_rotations: int
    """Rotations for the null: the proxy shifted by random whole numbers of blocks."""


@dataclass(frozen=True)
class PredictionGroup:
    """p(X) at tokens of one kind, or at a random part of them."""

    name: str
    n: int
    """Tokens of this kind in the corpus."""
    position: Int[np.ndarray, " token"]
    """Sampled positions, ascending."""
    probability: Float[np.ndarray, " token"]
    """p(X) there: the model's probability that the next token is one of X."""
    mean: Measure


@dataclass(frozen=True)
class Predictions:
    """The model's p(X) by whether a feature fires and whether its proxy is true."""

    latent: int
    proxy: str
    tokens: tuple[int, ...]
    """X."""
    false_negatives: PredictionGroup
    """Proxy true, f = 0."""
    true_positives: PredictionGroup
    """Proxy true, f > 0."""
    elsewhere: PredictionGroup
    """Proxy false, f = 0: the control."""
    auc: Measure
    """P(p(X) at a true positive > at a false negative) + P(equal) / 2: 0.5 when the feature misses at random, 1 when it
    misses only what the model does not predict."""
