"""Features made by several heads: how many, whether the heads read the same sources, whether each is needed.

The pre-activation is linear in the heads, so effects of several ablations on it add up exactly. On the activation,
which is 0 below a threshold, they do not: heads that each suffice are redundant, and heads that are all needed are an
AND. Each figure is compared with that of null directions, matched in density (`index.nulls`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from headscope import attribution
from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.index.nulls import NullDirections
from headscope.index.records import Shares
from headscope.index.store import FeatureIndex
from headscope.stats import MINIMUM, Estimate, Measure, jensen_shannon, mean_interval, wilson
from headscope.studies.heads.ablation import activation_thresholds
from headscope.studies.support.active import Text, drawn
from headscope.studies.support.replacement import Progress, Replacement, batches, tokens_of

DEFINITIONS = tuple(field.name for field in fields(Shares))
CONTRIBUTES = 0.1
"""Minimum share of squared DFA for a head to contribute to a feature."""
N_BINS = 20
_NULL_BLOCKS = 192
_GAUSSIAN = 512  # directions whose norms by head are the null of shares of weights
_PAIRS = 512

Outcome = Literal["redundant", "and", "some", "not needed", "opposed"]
"""Outcome for a feature at one token when the heads that make it are ablated. Jointly off: `redundant` (on with any
one ablated), `and` (off with any one ablated), `some` (off with some of them ablated). Jointly on: `not needed` (and
on with any one ablated), `opposed` (off with some one ablated, which the others would outweigh)."""
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


# -------------------------------------------------------------------------------------------------------- concentration
@dataclass(frozen=True)
class Concentration:
    """Concentration of each feature on few heads, by one definition of shares."""

    by: str
    """A field of `records.Shares`."""
    latents: Int[np.ndarray, " n"]
    """Features with enough active tokens and with shares."""
    top: Float[np.ndarray, " n"]
    """The largest share of a head; for squared DFA the post's "fraction of variance" of the top head."""
    participation: Float[np.ndarray, " n"]
    """`1 / sum share^2`: 1 for one head, n_heads for equal shares. With negative shares it may be below 1."""
    top_null: dict[str, Float[np.ndarray, " m"]]
    """The largest share of null directions, by kind; empty where there is no null."""
    participation_null: dict[str, Float[np.ndarray, " m"]]
    several: Measure
    """Share of features with a participation of 2 or more. Its null is over all null directions."""

    def histogram(
        self, n_bins: int = N_BINS
    ) -> tuple[Float[np.ndarray, " edge"], Int[np.ndarray, " bin"], dict[str, Int[np.ndarray, " bin"]]]:
        """Return edges from 0 to 1, features by largest share (the post's histogram), and null directions likewise."""
        edges = np.linspace(0, 1, n_bins + 1)

        def counts(values: np.ndarray) -> np.ndarray:
            return np.histogram(np.clip(values, 0, 1), edges)[0]

        return edges, counts(self.top), {kind: counts(values) for kind, values in self.top_null.items()}


def concentration(index: FeatureIndex, by: str = "dfa", *, least: int = MINIMUM, seed: int = 0) -> Concentration:
    """Measure the concentration of features on few heads.

    The nulls of squared DFA and of covariance are those of the index. For `decoder` and `encoder` they are Gaussian
    directions of z; permuting heads has no effect there. The other definitions have none.

    Args:
        index: open.
        by: a field of `records.Shares`.
        least: minimum number of active tokens of a feature or null direction. A feature without shares, because its
            weights are 0, is excluded.
        seed: seed of the Gaussian directions.

    Raises:
        StudyError: an unknown definition.
    """
    if by not in DEFINITIONS:
        raise StudyError(f"shares {by!r}", expected=f"one of {', '.join(DEFINITIONS)}", do="name one of these")
    shares = index.shares[by]
    chosen = np.flatnonzero((index.table()["n_active"].to_numpy() >= least) & ~np.isnan(shares).any(1) & shares.any(1))
    own = shares[chosen]
    nulls = _null_shares(index, by, least, seed)
    participation = _participation(own)
    null_participation = {kind: _participation(values) for kind, values in nulls.items()}
    everything = np.concatenate([np.zeros(0), *null_participation.values()])
    several = _share(f"share of features with 1 / sum {by}^2 >= 2", participation >= 2, everything >= 2)
    tops = {kind: values.max(1) for kind, values in nulls.items()}
    return Concentration(by, chosen, own.max(1, initial=0), participation, tops, null_participation, several)


def _participation(shares: Float[np.ndarray, "n head"]) -> Float[np.ndarray, " n"]:
    return 1 / (shares**2).sum(1)


def _null_shares(index: FeatureIndex, by: str, least: int, seed: int) -> dict[str, Float[np.ndarray, "m head"]]:
    if by in ("decoder", "encoder"):
        rng = np.random.default_rng(seed)
        norms = np.linalg.norm(
            rng.standard_normal((_GAUSSIAN, index.n_heads, index.manifest["model"]["d_head"])), axis=2
        )
        return {"random": norms / norms.sum(1, keepdims=True)}
    found: dict[str, list[np.ndarray]] = {}
    for null in index.nulls():
        values = {"dfa": null.dfa, "dfa_covariance": null.dfa_covariance}.get(by)
        if values is not None and null.n_active >= least:
            found.setdefault(null.kind, []).append(values)
    return {kind: np.stack(values) for kind, values in found.items()}


def _share(definition: str, holds: Bool[np.ndarray, " n"], null_holds: Bool[np.ndarray, " m"]) -> Measure:
    null = wilson(int(null_holds.sum()), len(null_holds)) if len(null_holds) else None
    if len(holds) < MINIMUM:
        return Measure(
            definition, len(holds), null=null, missing=f"{len(holds)} features; at least {MINIMUM} are needed"
        )
    found = wilson(int(holds.sum()), len(holds))
    return Measure(definition, len(holds), found.value, found.low, found.high, "Wilson 95 %", null=null)


# ---------------------------------------------------------------------------------------------------- joint ablation
@dataclass(frozen=True)
class JointAblation:
    """Effects of ablating the heads of each feature, singly and jointly; one row per feature or null direction."""

    latents: Int[np.ndarray, " n"]
    """Features that two or more heads make; for null directions, the features whose density they match."""
    heads: Bool[np.ndarray, "n head"]
    """Those that make it: with a share of squared DFA of at least `CONTRIBUTES`."""
    n: Int[np.ndarray, " n"]
    """Active tokens."""
    counts: Int[np.ndarray, "n outcome"]
    """Number of these, by `OUTCOMES`."""
    lost_jointly: Float[np.ndarray, " n"]
    """Summed activation lost with all of them ablated."""
    lost_singly: Float[np.ndarray, " n"]
    """Activation lost with one of them ablated, summed over them."""
    correlation: Float[np.ndarray, " n"]
    """Mean Pearson correlation of C_h and C_h' over the active tokens, over pairs of these heads; NaN where constant.
    Tokens are selected by the sum, which by itself makes its parts anticorrelated: see the null."""

    @property
    def super_additivity(self) -> Float[np.ndarray, " n"]:
        """`(lost jointly - lost singly) / lost jointly`; NaN where nothing is lost.

        Above 0 where heads compensate for each other, below 0 where each is needed.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            found = (self.lost_jointly - self.lost_singly) / self.lost_jointly
        return np.where(self.lost_jointly > 0, found, np.nan)

    def mostly(self, outcome: Outcome) -> Bool[np.ndarray, " n"]:
        """Mark those with this outcome at more than half of their active tokens."""
        return 2 * self.counts[:, OUTCOMES.index(outcome)] > self.n


@dataclass(frozen=True)
class Redundancy:
    """Joint ablation of features and of null directions."""

    features: JointAblation
    nulls: JointAblation
    n_features: int
    """Features with enough active tokens, whatever their number of heads."""
    n_nulls: int

    def share(self, outcome: Outcome) -> Measure:
        """Measure the share of features of several heads that mostly have an outcome; null: of null directions."""
        definition = f"share of features made by two or more heads that are '{outcome}' at most of their active tokens"
        return _share(definition, self.features.mostly(outcome), self.nulls.mostly(outcome))

    def several(self) -> Measure:
        """Measure the share of features that two or more heads make; the null is that of null directions."""
        own, null = (
            np.arange(n) < len(found.latents)
            for n, found in ((self.n_features, self.features), (self.n_nulls, self.nulls))
        )
        return _share(f"share of features with two or more heads of a share of at least {CONTRIBUTES:g}", own, null)


def redundancy(live: LiveIndex, replacement: Replacement, *, least: int = MINIMUM, seed: int = 0) -> Redundancy:
    """Ablate the heads of every feature that several heads make, from the index; and those of null directions.

    Args:
        live: the index with its model and SAE.
        replacement: replacement for a head's z: `mean` or `zero`.
        least: minimum number of active tokens of a feature.
        seed: seed of the null directions, and of their sample of blocks (192).

    Raises:
        StudyError: a TopK SAE, or a replacement that differs between tokens.
    """
    if replacement.kind not in ("mean", "zero"):
        raise StudyError(f"ablation {replacement.kind!r}", expected="mean or zero", do="pass such a replacement")
    thresholds = activation_thresholds(live.sae)
    weights = attribution.HeadWeights.of(live.sae, live.model)

    def of_features() -> Iterator[_Pairs]:
        for latent, active in live.index.each_latent():
            if len(active.position) >= least:
                replaced = replacement.contributions(weights, latent, active.position[:1])[0]
                f, heads = active.activation.astype(np.float64), active.heads.astype(np.float64)
                yield _Pairs(latent, f, heads, replaced, float(thresholds[latent]))

    own, n = _jointly(of_features(), live.index.n_heads)
    null, n_null = _jointly(_null_pairs(live, weights, replacement, least, seed), live.index.n_heads)
    return Redundancy(own, null, n, n_null)


@dataclass(frozen=True)
class _Pairs:
    """The active tokens of a feature, and the replacement of each head's contribution."""

    latent: int
    f: Float[np.ndarray, " n"]
    heads: Float[np.ndarray, "n head"]
    replaced: Float[np.ndarray, " head"]
    threshold: float


def _null_pairs(
    live: LiveIndex, weights: attribution.HeadWeights, replacement: Replacement, least: int, seed: int
) -> Iterator[_Pairs]:
    """Return the same for null directions, on some blocks of the corpus."""
    text, size = Text.of(live.index), live.index.block_size
    blocks = drawn(live.index.n_blocks, _NULL_BLOCKS, (seed, 1))
    z = torch.cat(
        [
            live.model.read(tokens_of(live, text, own), [live.sae.site])[live.sae.site][
                torch.from_numpy(text.is_text[own]).to(live.model.device)
            ]
            for _, own in batches(blocks, size)
        ]
    )
    n_active = live.index.table()["n_active"].to_numpy() / int(live.index.manifest["corpus"]["n_tokens"])
    directions = NullDirections.matched(weights, z, torch.from_numpy(n_active).to(z), seed)
    null, p, heads = directions.active(z, weights.offset)
    instead = torch.einsum("he,nhe->nh", replacement.z[0] - weights.offset, directions.directions)
    for i in range(len(directions.latent)):
        own = (null == i).cpu()
        if int(own.sum()) >= least:
            f, of_heads = (values[own].double().cpu().numpy() for values in (p, heads))
            replaced, threshold = instead[i].double().cpu().numpy(), float(directions.threshold[i])
            yield _Pairs(int(directions.latent[i]), f, of_heads, replaced, threshold)


def _jointly(of: Iterator[_Pairs], n_heads: int) -> tuple[JointAblation, int]:
    rows, n = [], 0
    for pairs in of:
        n += 1
        squares = (pairs.heads**2).sum(0)
        chosen = np.flatnonzero(squares >= CONTRIBUTES * squares.sum())
        if len(chosen) >= 2:
            rows.append((pairs.latent, np.isin(np.arange(n_heads), chosen), len(pairs.f), *_outcomes(pairs, chosen)))
    columns: list[list] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(7)]
    return (
        JointAblation(
            np.array(columns[0], dtype=np.int64),
            np.reshape(np.array(columns[1], dtype=bool), (-1, n_heads)),
            np.array(columns[2], dtype=np.int64),
            np.reshape(np.array(columns[3], dtype=np.int64), (-1, len(OUTCOMES))),
            *(np.array(column, dtype=np.float64) for column in columns[4:]),
        ),
        n,
    )


def _outcomes(pairs: _Pairs, chosen: Int[np.ndarray, " k"]) -> tuple[np.ndarray, float, float, float]:
    """Return tokens by outcome, activation lost jointly and singly, and correlation."""
    change = pairs.heads[:, chosen] - pairs.replaced[chosen]

    def left(removed: np.ndarray) -> np.ndarray:
        after = pairs.f.reshape(-1, *[1] * (removed.ndim - 1)) - removed
        return np.where(after > pairs.threshold, after, 0)

    singly, jointly = left(change), left(change.sum(1))
    off, none = singly == 0, jointly == 0
    every, any_ = off.all(1), off.any(1)
    counts = [none & ~any_, none & every, none & any_ & ~every, ~none & ~any_, ~none & any_]
    lost = float((pairs.f - jointly).sum()), float((pairs.f[:, None] - singly).sum())
    return np.array([of.sum() for of in counts]), *lost, _correlation(pairs.heads[:, chosen])


def _correlation(heads: Float[np.ndarray, "n k"]) -> float:
    """Return the mean correlation of pairs of non-constant columns; NaN without such a pair."""
    varied = heads[:, heads.std(0) > 1e-9 * np.abs(heads).max()]
    if varied.shape[1] < 2:
        return float("nan")
    r = np.corrcoef(varied.T)
    return float(np.mean([r[a, b] for a, b in combinations(range(len(r)), 2)]))


# ------------------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class SourceAgreement:
    """Whether the heads that make a feature read it from the same source tokens."""

    latents: Int[np.ndarray, " n"]
    """Features that two or more heads make."""
    n: Int[np.ndarray, " n"]
    """Active tokens sampled."""
    divergence: Float[np.ndarray, " n"]
    """Mean Jensen-Shannon divergence, in bits, of `|C[h, s]| / sum_s |C[h, s]|` between two of these heads: 0 where
    they read the same sources alike, 1 where they share none."""
    elsewhere: Float[np.ndarray, " n"]
    """The same between one of these heads and one that does not make the feature: the null. NaN where all do."""
    mean: Measure
    """Mean of `divergence` over features; its null is that of `elsewhere`."""


def source_agreement(
    live: LiveIndex,
    found: JointAblation,
    *,
    n_places: int = 16,
    max_blocks: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SourceAgreement:
    """Compare the sources of the heads that make each feature, at some of its active tokens.

    Args:
        live: the index with its model and SAE.
        found: `Redundancy.features`: the features, with the heads of each.
        n_places: active tokens per feature.
        max_blocks: maximum number of blocks, sampled uniformly; None: all.
        seed: seed of the samples.
        on_progress: called as blocks are done.
    """
    report = on_progress or (lambda _done, _total: None)
    index, text = live.index, Text.of(live.index)
    size = index.block_size
    looked_at = drawn(index.n_blocks, max_blocks, (seed, 2))
    places = [np.zeros((0, 2), dtype=np.int64)]
    for row, latent in enumerate(found.latents.tolist()):
        position = index.activations(latent).position
        position = position[np.isin(position // size, looked_at)]
        own = position[drawn(len(position), n_places, (seed, latent))]
        places.append(np.stack([np.full(len(own), row), own], axis=1))
    row, position = np.concatenate(places).T
    order = np.argsort(position, kind="stable")
    row, position = row[order], position[order]
    weights = attribution.HeadWeights.of(live.sae, live.model)
    between = np.full((len(row), 2), np.nan)
    blocks = np.unique(position // size)
    for done, own in batches(blocks, size):
        report(done, len(blocks))
        low, high = np.searchsorted(position, [own[0] * size, (own[-1] + 1) * size])
        attention = live.model.attention(tokens_of(live, text, own), live.sae.site.layer)
        for start in range(low, high, _PAIRS):
            part = slice(start, min(start + _PAIRS, high))
            block, query = np.divmod(position[part], size)
            numbers = (np.searchsorted(own, block), query, found.latents[row[part]])
            dfa = attribution.dfa_by_source(
                weights, attention, *(torch.from_numpy(of).to(live.model.device) for of in numbers)
            )
            between[part] = _divergences(dfa.double().cpu().numpy(), found.heads[row[part]])
    report(len(blocks), len(blocks))
    n = np.bincount(row, minlength=len(found.latents))
    means = np.stack([_mean_by(row, of, len(n)) for of in between.T], axis=1)
    return SourceAgreement(found.latents, n, *means.T, mean=_mean_measure(means))


def _divergences(
    dfa: Float[np.ndarray, "pair head source"], chosen: Bool[np.ndarray, "pair head"]
) -> Float[np.ndarray, "pair 2"]:
    """Return the mean over pairs of chosen heads, and over pairs of a chosen and another one."""
    size = np.abs(dfa)
    total = size.sum(2)
    with np.errstate(invalid="ignore"):
        share = size / total[..., None]
    sums, counts = np.zeros((2, len(dfa))), np.zeros((2, len(dfa)))
    for a, b in combinations(range(dfa.shape[1]), 2):
        between = jensen_shannon(share[:, a], share[:, b])
        exists = np.isfinite(between)
        both, one = chosen[:, a] & chosen[:, b] & exists, (chosen[:, a] ^ chosen[:, b]) & exists
        for i, which in enumerate((both, one)):
            sums[i, which] += between[which]
            counts[i] += which
    with np.errstate(invalid="ignore"):
        return (sums / counts).T


def _mean_by(row: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.bincount(row[known], values[known], minlength=n) / np.bincount(row[known], minlength=n)


def _mean_measure(means: Float[np.ndarray, "n 2"]) -> Measure:
    definition = "mean over features of the divergence of sources between the heads that make each, in bits"
    measured = means[np.isfinite(means[:, 0])]
    other = means[np.isfinite(means[:, 1]), 1]
    null = None
    if len(other):
        null = Estimate(float(other.mean()), *(mean_interval(other) or (float(other.min()), float(other.max()))))
    if len(measured) < MINIMUM:
        return Measure(definition, len(measured), null=null, missing=f"{len(measured)} features; {MINIMUM} are needed")
    found, value = mean_interval(measured[:, 0]), float(measured[:, 0].mean())
    if found is None:
        return Measure(definition, len(measured), value, null=null, missing="no interval: all features agree")
    return Measure(definition, len(measured), value, *found, "bootstrap over features, 95 %", null=null)
