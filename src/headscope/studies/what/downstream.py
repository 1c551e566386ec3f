"""Records of the effect of ablating a feature on the loss of each next token, by path, with derived quantities.

`studies.what.ablation` runs the model and makes them; no torch here. A change is the loss with the feature ablated
minus the baseline loss, in nats: positive where the feature helped to predict the next token.
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
    """Effect of the ablation by one path, with other paths held at the baseline."""

    path: str
    """`total`; `direct`, to the logits; `mlp.L` or `attn.L`, through that component alone and from it to the logits."""
    definition: str
    change: Float[np.ndarray, " token"]
    """Change of the loss at each token of the record."""
    later: Float[np.ndarray, " token"] | None
    """Summed over the later tokens of the block, where one token is ablated and later ones can attend to it; else None.
    """
    mean: Measure
    """Mean of `change`. Its null is the effect of directions of the same norm at some of these tokens: mean, and the
    range that holds 95 % of them."""


@dataclass(frozen=True)
class Share:
    """Share of a path's effect at some of the tokens."""

    positive: Measure
    """Share of the loss increase: tokens whose loss falls count as 0."""
    net: Measure
    """Share of the summed change; may be negative or above 1."""


@dataclass(frozen=True)
class Downstream:
    """Effects of ablating one feature, token by token; all arrays are in the order of `position`."""

    latent: int
    layer: int
    baseline: Baseline
    where: Where
    norms: Norms
    n_active: int
    """Active tokens in the index whose next token is text in the same block: the population."""
    position: Int[np.ndarray, " token"]
    """Sampled active tokens, or all; before the last layer with `everywhere`, all tokens of blocks."""
    activation: Float[np.ndarray, " token"]
    next_token: Int[np.ndarray, " token"]
    document: Int[np.ndarray, " token"]
    loss: Float[np.ndarray, " token"]
    """Baseline loss."""
    paths: dict[str, PathEffect]
    """`total` first, then `direct`, then components in the order of the model."""
    notes: tuple[str, ...]
    """Notes on these paths in this model."""

    @property
    def n(self) -> int:
        """Number of sampled tokens."""
        return len(self.position)

    @property
    def definition(self) -> str:
        """Definition of the ablation, in one line."""
        return f"baseline: {BASELINES[self.baseline]}; {WHERES[self.where]}; {NORMS[self.norms]}"

    @property
    def interaction(self) -> Float[np.ndarray, " token"]:
        """Total minus the sum of the other paths: losses are not additive, though paths' outputs to the stream are."""
        parts = [effect.change for name, effect in self.paths.items() if name != "total"]
        return self.paths["total"].change - np.sum(parts, axis=0)

    def next_is(self, tokens: int | list[int]) -> Bool[np.ndarray, " token"]:
        """Mark tokens whose actual next token is one of these."""
        return np.isin(self.next_token, tokens)

    def holds(self, mask: Bool[np.ndarray, " position"]) -> Bool[np.ndarray, " token"]:
        """Mark tokens where a mask over the positions of the corpus, such as that of a proxy, is true."""
        if self.n and len(mask) <= self.position.max():
            raise HeadscopeError(
                f"a mask of {len(mask)} positions", expected="one of all positions of the corpus", do="pass that"
            )
        return mask[self.position]

    def share(self, path: str, chosen: Bool[np.ndarray, " token"]) -> Share:
        """Measure the share of a path's effect at the chosen tokens; the null is their share of all sampled tokens.

        The null's interval is by document, and Wilson's where documents are too few for that.

        Args:
            path: one of `paths`.
            chosen: mask of the record's tokens, from `next_is` or `holds`.

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
        """Return indices of this record's tokens with the largest loss increase, descending."""
        order = np.argsort(-self._effect(path).change, kind="stable")[:k]
        return order[self._effect(path).change[order] > 0]

    def best(self, path: str = "total", k: int = 20) -> Int[np.ndarray, " k"]:
        """Return indices of the largest loss decrease: where the feature was misleading."""
        order = np.argsort(self._effect(path).change, kind="stable")[:k]
        return order[self._effect(path).change[order] < 0]

    def histogram(self, bins: int = 100) -> tuple[Float[np.ndarray, " edge"], dict[str, Int[np.ndarray, " bin"]]]:
        """Return bin edges over the changes of all paths, and each path's token counts."""
        everything = np.concatenate([effect.change for effect in self.paths.values()])
        edges = np.histogram_bin_edges(everything, bins)
        return edges, {name: np.histogram(effect.change, edges)[0] for name, effect in self.paths.items()}

    def _effect(self, path: str) -> PathEffect:
        if path not in self.paths:
            raise HeadscopeError(f"path {path!r}", expected=f"one of {', '.join(self.paths)}", do="name one of these")
        return self.paths[path]


@dataclass(frozen=True)
class LogitEffect:
    """Direct-path output of a feature to the logits, at activation 1 and scale 1 of the final norm."""

    definition = "W_dec W_O W_U, the final norm's gain and centring folded in, its scale left out, centred"
    latent: int
    top: tuple[tuple[int, float], ...]
    """(token, logits), largest first."""
    bottom: tuple[tuple[int, float], ...]
    prominence: float
    """Distance of the top token from the mean, in standard deviations over the vocabulary."""
    kurtosis: float
    """Kurtosis over the vocabulary: 3 where nothing stands out."""
    top_source: int | None
    """The source token with the largest share of DFA; None for a dead feature."""
    copied: bool | None
    """Whether the top token is that source token, as for an induction feature that copies."""
    copy_rank: float | None
    """Share of the vocabulary above the top token in the copying table of the feature's head: 0 for a perfect copier.
    """


def logit_effect(index: FeatureIndex, latent: int) -> LogitEffect:
    """Return the direct logit effect of a feature, from the index alone.

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
