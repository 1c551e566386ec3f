"""The effect of ablating a feature on the loss of each next token, by path: records, and what is read off them.

`studies.what.ablation` runs the model and makes them; no torch here. A change is the loss with the feature ablated less
the loss of the baseline, in nats: positive where the feature helped to predict the token that came.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.errors import HeadscopeError
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure, ratio, wilson

Baseline = Literal["error kept", "reconstruction"]
Where = Literal["everywhere", "one"]
Norms = Literal["recomputed", "frozen"]

BASELINES: dict[Baseline, str] = {
    "error kept": "the unchanged model: z - f_j W_dec[j], the SAE's error stays",
    "reconstruction": "the model with z replaced by the SAE's reconstruction at all positions: x_hat - f_j W_dec[j]",
}
WHERES: dict[Where, str] = {
    "everywhere": "ablated at all of its active tokens in the block at once",
    "one": "ablated at one active token, the others as they were",
}
NORMS: dict[Norms, str] = {
    "recomputed": "norms after the ablation see it",
    "frozen": "norms after the ablation divide by what they divided by in the baseline",
}


@dataclass(frozen=True)
class PathEffect:
    """What the ablation does by one path, other paths held at the baseline."""

    path: str
    """`total`; `direct`, to the logits; `mlp.L` or `attn.L`, through that component alone and from it to the logits."""
    definition: str
    change: Float[np.ndarray, " token"]
    """Of the loss at each token of the record."""
    later: Float[np.ndarray, " token"] | None
    """Summed over the later tokens of the block, where one token is ablated and later ones can see it; else None."""
    mean: Measure
    """Of `change`. Its null is what directions of the same norm do at some of these tokens: mean, and the range that
    holds 95 % of them."""


@dataclass(frozen=True)
class Share:
    """How much of a path's effect falls on some of the tokens."""

    positive: Measure
    """Of the loss increase: tokens whose loss falls count as 0."""
    net: Measure
    """Of the summed change; may be negative or above 1."""


@dataclass(frozen=True)
class Downstream:
    """What ablating one feature does, token by token; all arrays are in the order of `position`."""

    latent: int
    layer: int
    baseline: Baseline
    where: Where
    norms: Norms
    n_active: int
    """Active tokens in the index whose next token is text in the same block: those that can be looked at."""
    position: Int[np.ndarray, " token"]
    """Looked at: active tokens, all or a sample; off the last layer, all tokens of blocks if ablated everywhere."""
    activation: Float[np.ndarray, " token"]
    next_token: Int[np.ndarray, " token"]
    document: Int[np.ndarray, " token"]
    loss: Float[np.ndarray, " token"]
    """Of the baseline."""
    paths: dict[str, PathEffect]
    """`total` first, then `direct`, then components in the order of the model."""
    notes: tuple[str, ...]
    """What there is to know of these paths in this model."""

    @property
    def n(self) -> int:
        """Tokens looked at."""
        return len(self.position)

    @property
    def definition(self) -> str:
        """What was done, in one line."""
        return f"baseline: {BASELINES[self.baseline]}; {WHERES[self.where]}; {NORMS[self.norms]}"

    @property
    def interaction(self) -> Float[np.ndarray, " token"]:
        """Total less the sum of the other paths: losses are not additive, though what paths write to the stream is."""
        parts = [effect.change for name, effect in self.paths.items() if name != "total"]
        return self.paths["total"].change - np.sum(parts, axis=0)

    def next_is(self, tokens: int | list[int]) -> Bool[np.ndarray, " token"]:
        """Where one of these is the right next token."""
        return np.isin(self.next_token, tokens)

    def holds(self, mask: Bool[np.ndarray, " position"]) -> Bool[np.ndarray, " token"]:
        """Where a mask over the positions of the corpus, such as that of a proxy, is true."""
        if self.n and len(mask) <= self.position.max():
            raise HeadscopeError(
                f"a mask of {len(mask)} positions", expected="one of all positions of the corpus", do="pass that"
            )
        return mask[self.position]

    def share(self, path: str, chosen: Bool[np.ndarray, " token"]) -> Share:
        """How much of a path's effect falls on the chosen tokens; the null is their share of all tokens looked at.

        The null's interval is by document, and Wilson's where documents are too few for that.

        Args:
            path: one of `paths`.
            chosen: which tokens of the record: `next_is` or `holds` make it.

        Raises:
            HeadscopeError: no such path.
        """
        change = self._effect(path).change
        rate = ratio(self.document, chosen.astype(np.float64), np.ones(self.n), definition="share of tokens")
        null = wilson(int(chosen.sum()), self.n) if self.n else None
        if rate.value is not None and rate.low is not None and rate.high is not None:
            null = Estimate(rate.value, rate.low, rate.high)
        increase = change.clip(min=0)
        return Share(
            positive=ratio(
                self.document,
                increase * chosen,
                increase,
                definition="share of the loss increase (max(change, 0)) that is on these tokens",
                null=null,
            ),
            net=ratio(
                self.document,
                change * chosen,
                change,
                definition="share of the summed loss change that is on these tokens",
                null=null,
            ),
        )

    def worst(self, path: str = "total", k: int = 20) -> Int[np.ndarray, " k"]:
        """Where the loss rises most, most first: numbers of tokens of this record."""
        order = np.argsort(-self._effect(path).change, kind="stable")[:k]
        return order[self._effect(path).change[order] > 0]

    def best(self, path: str = "total", k: int = 20) -> Int[np.ndarray, " k"]:
        """Where the loss falls most: where the feature misled."""
        order = np.argsort(self._effect(path).change, kind="stable")[:k]
        return order[self._effect(path).change[order] < 0]

    def histogram(self, bins: int = 100) -> tuple[Float[np.ndarray, " edge"], dict[str, Int[np.ndarray, " bin"]]]:
        """Edges of bins that hold the changes of all paths, and how many tokens each path has in each."""
        everything = np.concatenate([effect.change for effect in self.paths.values()])
        edges = np.histogram_bin_edges(everything, bins)
        return edges, {name: np.histogram(effect.change, edges)[0] for name, effect in self.paths.items()}

    def _effect(self, path: str) -> PathEffect:
        if path not in self.paths:
            raise HeadscopeError(f"path {path!r}", expected=f"one of {', '.join(self.paths)}", do="name one of these")
        return self.paths[path]


@dataclass(frozen=True)
class LogitEffect:
    """What a feature writes to the logits by the direct path, at activation 1 and scale 1 of the final norm."""

    definition = "W_dec W_O W_U, the final norm's gain and centring folded in, its scale left out, centred"
    latent: int
    top: tuple[tuple[int, float], ...]
    """(token, logits), largest first."""
    bottom: tuple[tuple[int, float], ...]
    prominence: float
    """Standard deviations over the vocabulary by which the top token stands above the mean."""
    kurtosis: float
    """Over the vocabulary: 3 where nothing stands out."""
    top_source: int | None
    """The source token with the largest share of DFA; None for a dead feature."""
    copied: bool | None
    """Whether the top token is that source token: what an induction feature copies."""
    copy_rank: float | None
    """Share of the vocabulary above the top token in the copying table of the feature's head: 0 for a copier."""


def logit_effect(index: FeatureIndex, latent: int) -> LogitEffect:
    """The direct logit effect of a feature, from the index alone.

    Raises:
        IndexFormatError: no such latent.
    """
    feature, sources = index.feature(latent), index.sources(latent)
    token, value = feature.logit_top[0]
    source = sources.tokens[0].token if sources is not None and sources.tokens else None
    return LogitEffect(
        latent=latent,
        top=feature.logit_top,
        bottom=feature.logit_bottom,
        prominence=(value - feature.logit_mean) / feature.logit_std if feature.logit_std else 0.0,
        kurtosis=feature.logit_kurtosis,
        top_source=source,
        copied=None if source is None else source == token,
        copy_rank=feature.copy_rank,
    )
