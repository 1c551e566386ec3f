"""Records of an index: plain values and numpy arrays, no torch."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Shares:
    """Shares of a feature by head, by several definitions; each sums to 1 over heads.

    The first four depend on the weights, and every latent has them; the last three depend on the active tokens, and are
    None for a feature that is never active (`dfa_covariance` also for one that is active once or constant).
    """

    decoder: Float[np.ndarray, " head"]
    """`||W_dec[j, h]||`, L1-normalised (the post's). It depends on the basis of z."""
    decoder_out: Float[np.ndarray, " head"]
    """`||W_dec[j, h] W_O[h]||`, L1-normalised: independent of the basis of z."""
    encoder: Float[np.ndarray, " head"]
    """`||W_enc[h, :, j]||`, L1-normalised. It depends on the basis of z."""
    encoder_in: Float[np.ndarray, " head"]
    """`||W_V[h] W_enc[h, :, j]||`, L1-normalised: independent of the basis of z."""
    dfa: Float[np.ndarray, " head"] | None
    """`sum C_h^2`, normalised (the post's fraction of variance)."""
    dfa_covariance: Float[np.ndarray, " head"] | None
    """`Cov(C_h, pre) / Var(pre)`; may be negative."""
    dfa_mean: Float[np.ndarray, " head"] | None
    """`mean C_h`, normalised; may be negative."""

    @property
    def top_head(self) -> int | None:
        """The head with the largest share of squared DFA."""
        return None if self.dfa is None else int(np.argmax(self.dfa))

    @property
    def participation(self) -> float | None:
        """Participation ratio of the shares of squared DFA, `1 / sum share^2`: 1 for one head, n_heads for all."""
        return None if self.dfa is None else float(1 / np.sum(self.dfa**2))

    @property
    def disagreement(self) -> float | None:
        """Distance of decoder and DFA shares: half the summed |difference|, 0 to 1 (total variation).

        None where they are undefined: for a dead latent, or one whose decoder vector is 0.
        """
        return None if self.dfa is None or not self.decoder.any() else float(np.abs(self.dfa - self.decoder).sum() / 2)


@dataclass(frozen=True)
class SourceToken:
    """One token type at the source positions of a feature, over all active tokens with an activation above a threshold.

    Sources are the kept ones: the largest of each active token by |DFA| summed over heads.
    """

    token: int
    n: int
    """Kept sources with this token; parts of the corpus where it is not among the largest 128 do not count."""
    share: float
    """Share of `sum_s (sum_h C[h, s])^2` over all sources (kept or not): heads summed, then squared."""
    share_by_head: Float[np.ndarray, " head"]
    """Share of `sum_s C[h, s]^2` over all sources, per head; NaN for a head that contributes exactly nothing."""
    share_linear: float
    """Share of `sum_s sum_h C[h, s]`; may be negative or above 1."""
    attention: Float[np.ndarray, " head"]
    """Mean attention from the active token to such a kept source. Sources are selected by their contribution, so this
    is above the attention to any source with this token, by a factor of two or more, unless all sources are kept."""
    attention_elsewhere: Float[np.ndarray, " head"]
    """The same for all other pairs of a destination and an earlier-or-same source with this token, whether the feature
    is active there or not; NaN where there are none. A fair baseline only when all sources are kept."""
    frequency: float
    """Share of this token among the tokens of the corpus: the base rate."""


@dataclass(frozen=True)
class Sources:
    """The source tokens that carry a feature's DFA."""

    threshold: float
    """Active tokens with an activation above this."""
    n_active: int
    kept: float
    """Share of `sum_s (sum_h C)^2` that the kept sources hold."""
    bos_share: float
    """Share of it at BOS sources, which are not in `tokens`."""
    kept_by_head: Float[np.ndarray, " head"]
    """Share of `sum_s C[h, s]^2` that the kept sources hold. They are selected by their DFA summed over heads: where
    this is small for a head, its `share_by_head` is unreliable. NaN for a head that contributes nothing."""
    bos_share_by_head: Float[np.ndarray, " head"]
    tokens: tuple[SourceToken, ...]
    """Largest share first."""


@dataclass(frozen=True)
class Correlated:
    """A feature of the dictionary whose activations correlate."""

    latent: int
    pearson: float
    """Correlation of the activations over all tokens of the corpus, zeros included."""
    decoder_cosine: float


@dataclass(frozen=True)
class Feature:
    """One latent of an SAE with everything in the index about it, except for examples."""

    latent: int
    n_active: int
    density: float
    """Share of text tokens on which it is active."""
    density_interval: tuple[float, float]
    """95 %, Wilson; tokens of a document are not independent, so the true interval is wider."""
    mean: float | None
    """Moments of the activation over active tokens; None for a feature that is never active."""
    std: float | None
    skew: float | None
    kurtosis: float | None
    """3 for a normal distribution."""
    maximum: float | None
    quantiles: Float[np.ndarray, " q"] | None
    """At `config.QUANTILES`."""
    histogram: Int[np.ndarray, " bin"] | None
    """Active tokens by activation, in equal bins from 0 to the maximum."""
    mass: Float[np.ndarray, " bin"] | None
    """Summed activation in each bin."""
    shares: Shares
    bias: float
    """Part of the pre-activation that is independent of the heads."""
    logit_top: tuple[tuple[int, float], ...]
    """(token, direct logit effect at activation 1), largest first."""
    logit_bottom: tuple[tuple[int, float], ...]
    logit_mean: float
    """Moments of the logit effect over the vocabulary."""
    logit_std: float
    logit_skew: float
    logit_kurtosis: float
    copy_top: tuple[tuple[int, float], ...]
    """(token, DFA through the top head with attention 1 to that token alone): the static source table."""
    copy_rank: float | None
    """Share of the vocabulary with a larger entry in that table than the top logit token: 0 for a perfect copier."""
    correlated: tuple[Correlated, ...]

    @property
    def alive(self) -> bool:
        """Whether it is active on at least one token of the corpus."""
        return self.n_active > 0


@dataclass(frozen=True)
class Source:
    """One source position of an example."""

    position: int
    """Position in the block."""
    heads: Float[np.ndarray, " head"]
    """DFA of each head from this source."""
    pattern: Float[np.ndarray, " head"]
    """Attention of each head to this source."""


@dataclass(frozen=True)
class Example:
    """One active token of a feature, with its DFA by head and source.

    For each head, the kept sources and the rest sum to `heads`; `heads` and the bias sum to `pre`.
    """

    position: int
    """Position in the corpus: block number * block size + position in the block."""
    activation: float
    pre: float
    bias: float
    residual: float
    """pre - (sum of all contributions + bias), when it was written."""
    heads: Float[np.ndarray, " head"]
    sources: tuple[Source, ...]
    """Largest first, by |DFA| summed over heads."""
    rest: Float[np.ndarray, " head"]
    """DFA of each head from all other sources."""
    rest_pattern: Float[np.ndarray, " head"]
    """Attention of each head to all other sources."""
    active_at: Int[np.ndarray, " n"]
    """Positions in the block where this feature is active."""
    active_value: Float[np.ndarray, " n"]
    duplicates: int = 0
    """Other tokens with the same context, not shown."""


@dataclass(frozen=True)
class ExampleColumns:
    """The examples of a feature by column, for bulk readers; `Example` defines the columns.

    The sources of an example follow those of the previous one, and so do the active tokens around it.
    """

    position: Int[np.ndarray, " example"]
    activation: Float[np.ndarray, " example"]
    pre: Float[np.ndarray, " example"]
    bias: Float[np.ndarray, " example"]
    residual: Float[np.ndarray, " example"]
    heads: Float[np.ndarray, "example head"]
    rest: Float[np.ndarray, "example head"]
    n_sources: Int[np.ndarray, " example"]
    source: Int[np.ndarray, " source"]
    source_heads: Float[np.ndarray, "source head"]
    source_pattern: Float[np.ndarray, "source head"]
    n_active: Int[np.ndarray, " example"]
    active_at: Int[np.ndarray, " active"]
    active_value: Float[np.ndarray, " active"]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.position)


@dataclass(frozen=True)
class DrawnGroup:
    """An `ExampleGroup` with its examples by position."""

    kind: str
    number: int
    low: float
    high: float
    n: int
    share_active: float
    share_mass: float
    sampled: bool
    positions: tuple[int, ...]
    duplicates: tuple[int, ...]
    """Number of duplicates of each example."""


@dataclass(frozen=True)
class ExampleGroup:
    """A group of active tokens of a feature, with examples drawn from it."""

    kind: str
    """top, random, quantile, interval or threshold."""
    number: int
    low: float
    high: float
    n: int
    """Active tokens in the group."""
    share_active: float
    """Share of the feature's active tokens."""
    share_mass: float
    """Share of its summed activation."""
    sampled: bool
    """Whether the three are estimated from an even sample of its active tokens, because of their number."""
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Activations:
    """Every active token of one feature, by position."""

    position: Int[np.ndarray, " n"]
    activation: Float[np.ndarray, " n"]
    heads: Float[np.ndarray, "n head"]
    """DFA of each head, to 14 significant bits."""


@dataclass(frozen=True)
class Null:
    """Shares of a null direction with a feature's density: the control of `Shares`."""

    kind: str
    """`random`: a Gaussian direction of z; `permuted`: a feature's encoder with its heads permuted."""
    latent: int
    """The feature whose density it matches."""
    n_active: int
    dfa: Float[np.ndarray, " head"] | None
    """None when it is never active: its threshold was set on a sample of the corpus."""
    dfa_covariance: Float[np.ndarray, " head"] | None
    """None also when it is active once."""
