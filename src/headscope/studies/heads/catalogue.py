"""Functions of each head, by the features it makes: number, similarity, share of one family. No torch, no model.

A head's features are weighted by its DFA in them, `q_j = sum over active tokens of max(C_h, 0)`, or by the SAE's
weights alone. Features with the same (source class, output class) form a cluster; the classes are of tokens: the head's
top source, and the token whose logit the feature raises most.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure, resampled, unit_draws
from headscope.studies.when.split import TextTokens

N_TOP = 10
"""Features of a head that the literature inspects: those with the most weight."""
_UNITS = 64  # groups of neighbouring documents that are resampled
_SAMPLES = 200
_SHUFFLES = 200
_CLASSES = (
    ("newline or indent", re.compile(rb"\s*\n\s*|\s{2,}|\t+")),
    ("space", re.compile(rb"\s+")),
    ("digit", re.compile(rb" ?\d+")),
    ("name", re.compile(rb"[A-Za-z_]*_[A-Za-z_]*| [A-Za-z_]*_[A-Za-z_]*")),
    ("capital", re.compile(rb" ?[A-Z][A-Za-z]*")),
    ("word start", re.compile(rb" [a-z]+")),
    ("word part", re.compile(rb"[a-z]+")),
    ("bracket or quote", re.compile(rb" ?[()\[\]{}<>\"'`]+.*", re.DOTALL)),
    ("punctuation", re.compile(rb" ?[!-/:-@\[-`{-~]+\s*")),
)


def token_class(token: bytes, *, special: bool = False) -> str:
    """Classify a token by its bytes: one of ten classes, `special`, or `other`."""
    if special:
        return "special"
    return next((name for name, pattern in _CLASSES if pattern.fullmatch(token)), "other")


@dataclass(frozen=True)
class HeadMass:
    """The DFA of each head in each feature, over its active tokens, by groups of documents."""

    values: Float[np.ndarray, "unit latent head"]
    """`sum max(C_h, 0)`."""

    @property
    def total(self) -> Float[np.ndarray, "latent head"]:
        """The sum over all documents."""
        return self.values.sum(0)


def head_mass(index: FeatureIndex) -> HeadMass:
    """Sum the stored contributions, in one pass over the activations.

    Raises:
        IndexFormatError: a damaged index.
    """
    text = TextTokens.of(index)
    n_units = min(_UNITS, len(text.counts))
    unit_of = text.unit.astype(np.int64) * n_units // len(text.counts)
    values = np.zeros((n_units, index.n_latents, index.n_heads))
    for latent, active in index.each_latent():
        if len(active.position):
            positive, unit = np.maximum(active.heads.astype(np.float64), 0), unit_of[active.position]
            for head in range(index.n_heads):
                values[:, latent, head] = np.bincount(unit, positive[:, head], minlength=n_units)
    return HeadMass(values)


@dataclass(frozen=True)
class Cluster:
    """Features of one head of one family."""

    family: str
    n: int
    share: float
    """Share of the head's weight."""
    latents: Int[np.ndarray, " k"]
    """The latents with the most weight, most first."""


@dataclass(frozen=True)
class HeadCard:
    """Number of functions of a head, by one weighting of its features."""

    head: int
    by: str
    """`dfa` or the name of a share of `records.Shares`."""
    n_features: int
    """Number of features with any weight in this head."""
    effective_features: Measure
    """exp(entropy) of the weights."""
    effective_families: Measure
    """exp(entropy) of the weights of clusters; below its null where the head's features are more similar than average.
    """
    largest: Measure
    """The share of the largest family; above its null where the head is specialised."""
    clusters: tuple[Cluster, ...]
    """Largest share first."""
    top: Int[np.ndarray, " k"]
    """The features with the most weight, most first."""
    top_in_one: int
    """Number of these in their most common family: all, where a head looks monosemantic in its top features."""


def families(index: FeatureIndex, head: int) -> list[str]:
    """Return the (source class, output class) of each latent at one head, as `source > output`.

    The source is the token type with most of the head's squared DFA, among the sources stored in the index, or the BOS.
    Where it is the token that the feature predicts, the family is `copies ...`. A latent without sources at this head
    has no family: an empty name.

    Raises:
        StudyError: no such head.
    """
    if not 0 <= head < index.n_heads:
        raise StudyError(f"head {head}", expected=f"0 to {index.n_heads - 1}", do="name another head")
    vocabulary, special = index.vocabulary
    specials = set(special)
    classes = [token_class(token, special=i in specials) for i, token in enumerate(vocabulary)]
    sources = index.sql(
        f"""SELECT s.latent, arg_max(s.token, s.share_by_head[{head + 1}]) AS token,
        max(s.share_by_head[{head + 1}]) AS share, any_value(t.bos_share_by_head[{head + 1}]) AS bos
        FROM sources s JOIN source_totals t ON s.latent = t.latent AND s.threshold = t.threshold
        WHERE s.threshold = 0 AND NOT isnan(s.share_by_head[{head + 1}]) GROUP BY s.latent"""
    )
    output = index.table()["top_logit"].to_numpy()
    found = [""] * index.n_latents
    for row in sources.to_pylist():
        latent, token = row["latent"], row["token"]
        target = int(output[latent])
        if row["bos"] > row["share"]:
            found[latent] = f"BOS > {classes[target]}"
        elif token == target:
            found[latent] = f"copies {classes[target]}"
        else:
            found[latent] = f"{classes[token]} > {classes[target]}"
    return found


def catalogue(
    index: FeatureIndex,
    *,
    by: str = "dfa",
    family: Sequence[str] | None = None,
    mass: HeadMass | None = None,
    seed: int = 0,
) -> tuple[HeadCard, ...]:
    """Catalogue each head of the layer by the features it makes.

    Intervals of the weights by DFA: percentile bootstrap over groups of documents, 95 %. Weights have none. Nulls: for
    families, their names shuffled among the head's features, mean and range of 200 shuffles; for the number of
    features, each feature's weights rotated over heads, likewise.

    Args:
        index: open.
        by: `dfa`, or a share of `records.Shares` of the weights.
        family: family of each latent, the same for all heads, for example `induction` or not; default: `families`.
            Latents with an empty name are in no cluster.
        mass: result of `head_mass`, if available; for `dfa` only.
        seed: seed of the resamples and shuffles.

    Raises:
        StudyError: an unknown share, or a different number of families.
    """
    if family is not None and len(family) != index.n_latents:
        raise StudyError(f"{len(family)} families", expected=f"{index.n_latents}, one a latent", do="name one of each")
    if by == "dfa":
        values = (mass or head_mass(index)).values
    elif by in ("decoder", "decoder_out", "encoder", "encoder_in"):
        live = index.table()["n_active"].to_numpy() > 0
        values = np.nan_to_num(index.shares[by] * live[:, None])[None]
    else:
        raise StudyError(f"weights {by!r}", expected="dfa, decoder, decoder_out, encoder or encoder_in", do="name one")
    return tuple(
        _card(values, head, by, list(family) if family is not None else families(index, head), seed)
        for head in range(index.n_heads)
    )


def _card(values: Float[np.ndarray, "unit latent head"], head: int, by: str, family: list[str], seed: int) -> HeadCard:
    weight = values[:, :, head]
    rng = np.random.default_rng((seed, head))
    total = weight.sum(0)
    heavy = np.flatnonzero(total > 0)
    named = np.array([j for j in heavy if family[j]], dtype=np.int64)
    names, member = np.unique(np.array([family[j] for j in named], dtype=object).astype(str), return_inverse=True)
    of_families = np.zeros((len(weight), len(names)))
    np.add.at(of_families.T, member, weight[:, named].T)
    n_shuffles = _SHUFFLES if len(named) else 0
    shuffled = [
        np.bincount(rng.permutation(member), total[named], minlength=len(names))[None] for _ in range(n_shuffles)
    ]
    order = heavy[np.argsort(-total[heavy], kind="stable")]
    top = order[:N_TOP]
    in_top = [family[j] for j in top if family[j]]
    definition = f"of the {by} weights of this head"
    return HeadCard(
        head,
        by,
        len(heavy),
        _measure(f"exp(entropy) {definition}, over features", _effective, weight[:, heavy], _moved(values, head, rng)),
        _measure(f"exp(entropy) {definition}, over families", _effective, of_families, shuffled),
        _measure(f"largest share of a family {definition}", _largest, of_families, shuffled),
        _clusters(names, member, named, total),
        top,
        max((in_top.count(name) for name in set(in_top)), default=0),
    )


def _moved(values: Float[np.ndarray, "unit latent head"], head: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the weights of this head after a random rotation of each feature's heads."""
    total = values.sum(0)
    rows, n_heads = np.arange(len(total)), total.shape[1]
    return [total[rows, (head + rng.integers(0, n_heads, len(rows))) % n_heads][None] for _ in range(_SHUFFLES)]


def _effective(weights: Float[np.ndarray, "sample item"]) -> Float[np.ndarray, " sample"]:
    """Compute exp(entropy) of each row; NaN for a row without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = weights / weights.sum(1, keepdims=True)
        entropy = -np.sum(np.where(share > 0, share * np.log(share), 0), axis=1)
    return np.where(weights.sum(1) > 0, np.exp(entropy), np.nan)


def _largest(weights: Float[np.ndarray, "sample item"]) -> Float[np.ndarray, " sample"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights.max(1, initial=0) / weights.sum(1)


def _measure(
    definition: str,
    statistic: Callable[[np.ndarray], np.ndarray],
    sums: Float[np.ndarray, "unit item"],
    nulls: list[np.ndarray],
) -> Measure:
    """Measure a statistic of weights summed over documents, with bootstrap interval and nulls."""
    n = sums.shape[1]
    if n == 0 or not sums.sum() > 0:
        return Measure(definition, n, missing="no feature has any weight in this head")
    drawn = np.concatenate([statistic(null) for null in nulls]) if nulls else np.zeros(0)
    drawn = drawn[np.isfinite(drawn)]
    null = Estimate(float(drawn.mean()), float(drawn.min()), float(drawn.max())) if len(drawn) else None
    value = float(statistic(sums.sum(0, keepdims=True))[0])
    found = resampled(statistic, sums, unit_draws(len(sums), n_samples=_SAMPLES, seed=0))
    if found is None:
        few = "no interval: of the weights alone there is none, and documents are too few or too alike"
        return Measure(definition, n, value, null=null, missing=few)
    how = f"bootstrap over {len(sums)} groups of documents, 95 %"
    return Measure(definition, n, value, *found, how, null=null)


def _clusters(
    names: np.ndarray, member: Int[np.ndarray, " n"], named: Int[np.ndarray, " n"], total: Float[np.ndarray, " latent"]
) -> tuple[Cluster, ...]:
    whole = total[named].sum()
    found = []
    for i, name in enumerate(names.tolist()):
        own = named[member == i]
        own = own[np.argsort(-total[own], kind="stable")]
        found.append(Cluster(name, len(own), float(total[own].sum() / whole), own[:N_TOP]))
    return tuple(sorted(found, key=lambda cluster: -cluster.share))
