"""Specificity: one feature against one proxy, over all text tokens of an index; no model, no torch.

The post (Kissane et al., 2024), sections "Specificity" and "Sensitivity". Formulas are in docs/maths.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Literal

import numpy as np

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.proxies import Proxy, parse
from headscope.stats import unit_draws, wilson, wilson_bounds
from headscope.studies.when.measures import Measures
from headscope.studies.when.records import (
    Counts,
    Curve,
    ExpectedValue,
    FalsePositiveRange,
    Histogram,
    PrecisionByThreshold,
    Specificity,
    TopPrecision,
)
from headscope.studies.when.sensitivity import sensitivity
from headscope.studies.when.split import Mask, Split, read_mask

CURVE_POINTS = 400
N_THRESHOLDS = 50


@dataclass(frozen=True)
class SpecificityPlan:
    """Resolution and sample sizes of a study."""

    n_bins: int = 100
    thresholds: tuple[float, ...] | None = None
    """Thresholds of P(proxy | f > t); None: 50 equal steps from 0 to the maximum."""
    top: tuple[int, ...] = (10, 100, 1_000, 10_000)
    """Sizes of the sets of most active tokens for precision."""
    n_ranges: int = 10
    """Number of ranges of activations for false positives."""
    n_examples: int = 20
    """Number of false positives sampled per range."""
    n_false_negatives: int = 50
    """Number of false negatives sampled for judgement."""
    tau: float = 0.0
    """Threshold of the correlation among active tokens: over those with f > tau."""
    n_samples: int = 1000
    """Resamples of the documents."""
    n_rotations: int = 20
    """Rotations of the proxy, for the null."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject sizes too small and thresholds that are not ascending from 0 or above."""
        least = dict.fromkeys(("n_bins", "n_ranges", "n_samples"), 1)
        least |= dict.fromkeys(("n_examples", "n_false_negatives", "n_rotations"), 0)
        sizes = [(name, getattr(self, name), low) for name, low in least.items()] + [("top", k, 1) for k in self.top]
        for name, value, low in sizes:
            if value < low:
                raise StudyError(f"{name} {value}", expected=f"at least {low}", do="pass a larger one")
        thresholds = (*(self.thresholds or ()), inf)
        rising = all(0 <= a < b for a, b in pairwise(thresholds))
        if not rising or not (isfinite(self.tau) and self.tau >= 0):
            raise StudyError(
                f"thresholds {self.thresholds}, tau {self.tau}",
                expected="rising thresholds and a tau, finite and not below 0",
                do="for example: (0, 1, 2)",
            )


def specificity(
    index: FeatureIndex,
    latent: int,
    proxy: Proxy | str | Mask,
    *,
    subtypes: Mapping[str, Proxy | str | Mask] | None = None,
    plan: SpecificityPlan | None = None,
) -> Specificity:
    """Compare one feature with one proxy.

    Args:
        index: open.
        latent: the feature; a dead one gives a record with notes.
        proxy: its text, which is parsed, or a mask.
        subtypes: parts of the proxy by name, with separate recall; the remainder is `none of these`.
        plan: resolution and sample sizes.

    Raises:
        IndexFormatError: no such latent.
        ProxyError: a proxy that cannot be parsed or evaluated.
        StudyError: a mask that is not one bool per position.
    """
    plan = plan or SpecificityPlan()
    proxy = parse(proxy) if isinstance(proxy, str) else proxy
    split, name = Split.read(index, latent, proxy)
    parts = {part: read_mask(of, index, split.text, f"subtype {part!r}") for part, of in (subtypes or {}).items()}
    proxy_hash = proxy.hash if isinstance(proxy, Proxy) else None
    return _study(split, parts, plan, _Subject(latent, name, proxy_hash, index.manifest["corpus"]["name"]))


@dataclass(frozen=True)
class _Subject:
    """Names of the index, feature and proxy under study."""

    latent: int
    proxy: str
    proxy_hash: str | None
    corpus: str


def _study(split: Split, subtypes: Mapping[str, Mask], plan: SpecificityPlan, subject: _Subject) -> Specificity:
    counts = Counts(split.text.n, split.text.n_documents, split.n_active, split.n_true, int(split.n_own[-1]))
    draws = unit_draws(len(split.text.counts), n_samples=plan.n_samples, seed=plan.seed)
    rotated = split.rotations(plan.n_rotations, plan.seed, plan.tau)
    measures = Measures(split, draws, rotated, plan.tau)
    return Specificity(
        **vars(subject),
        counts=counts,
        notes=_notes(subject.latent, counts),
        maximum=_maximum(split),
        histogram=_histogram(split, plan.n_bins),
        precision=measures.precision(),
        precision_by_threshold=_by_threshold(split, plan.thresholds, counts.base_rate),
        top=tuple(_top(split, k) for k in plan.top if k <= counts.n_active),
        ranges=tuple(_ranges(split, plan)) if counts.n_active else (),
        mass_share=measures.mass_share(),
        sensitivity=sensitivity(measures, subtypes, n_examples=plan.n_false_negatives, seed=plan.seed),
        curve=_curve(split) if counts.n_active and 0 < counts.n_proxy < counts.n_tokens else None,
        auc=measures.auc(),
        average_precision=measures.average_precision(),
        pearson=measures.pearson(),
        phi=measures.phi(),
        pearson_above=measures.pearson_above(),
        tau=plan.tau,
        n_rotations=len(rotated.auc),
    )


def _maximum(split: Split) -> float:
    return float(split.activation[0]) if split.n_active else 0.0


def _notes(latent: int, counts: Counts) -> tuple[str, ...]:
    said = {
        f"feature {latent} is never active in this corpus": counts.n_active == 0,
        "the proxy is never true in this corpus": counts.n_proxy == 0,
        "the proxy is true on every token of this corpus": counts.n_proxy == counts.n_tokens,
        "the feature is never active where the proxy is true": counts.n_active and counts.n_proxy and not counts.n_both,
    }
    return tuple(text for text, so in said.items() if so)


# --------------------------------------------------------------------------------------------------------------- plots
def _histogram(split: Split, n_bins: int) -> Histogram:
    edges = np.linspace(0, _maximum(split), n_bins + 1)
    columns = {}
    for name, of in (("true", split.own), ("false", ~split.own)):
        f = split.activation[of]
        which = np.clip(np.searchsorted(edges, f, side="right") - 1, 0, n_bins - 1)
        columns[name] = np.bincount(which, minlength=n_bins)
        columns[f"{name}_mass"] = np.bincount(which, f, minlength=n_bins).astype(np.float64)  # of none: int
    return Histogram(edges, **columns, n=split.n_active)


def expected_value(
    histogram: Histogram, n_tokens: int, normalisation: Literal["joint", "class"] = "joint"
) -> ExpectedValue:
    """Compute bin centre times count over N, for both classes.

    Args:
        histogram: histogram of a study.
        n_tokens: text tokens, zeros included (`Counts.n_tokens`).
        normalisation: `joint`, one N for both classes; `class`, the post's code, which divides each by its own size.
    """
    definitions = {
        "joint": "bin centre * count / all text tokens: stacked, the bars sum to the mean activation",
        "class": "bin centre * count / active tokens of the class: the post's code; not to be stacked",
    }
    sizes = {"joint": (n_tokens, n_tokens), "class": (int(histogram.true.sum()), int(histogram.false.sum()))}
    if normalisation not in definitions:
        raise StudyError(f"normalisation {normalisation!r}", expected="joint or class", do="choose one of these")
    n_true, n_false = sizes[normalisation]
    centre = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    return ExpectedValue(
        normalisation,
        histogram.edges,
        true=centre * histogram.true / max(n_true, 1),  # an empty class has no counts either
        false=centre * histogram.false / max(n_false, 1),
        n_true=n_true,
        n_false=n_false,
        definition=definitions[normalisation],
    )


def _by_threshold(split: Split, thresholds: tuple[float, ...] | None, base_rate: float) -> PrecisionByThreshold:
    grid = np.linspace(0, _maximum(split), N_THRESHOLDS, endpoint=False) if thresholds is None else np.array(thresholds)
    n = np.searchsorted(-split.activation, -grid, side="left")  # tokens with f > t; they are the first ones
    grid, n = grid[n > 0], n[n > 0]
    both = split.n_own[n]
    low, high = wilson_bounds(both, n)
    return PrecisionByThreshold(grid, n, both, both / n, low, high, base_rate)


def _top(split: Split, k: int) -> TopPrecision:
    n = int(np.searchsorted(-split.activation, -split.activation[k - 1], side="right"))
    both = int(split.n_own[n])
    return TopPrecision(k, n, both, wilson(both, n))


def _ranges(split: Split, plan: SpecificityPlan) -> Iterator[FalsePositiveRange]:
    """Make ranges of equal width; false positives of each are sampled without replacement."""
    rng = np.random.default_rng(plan.seed)
    edges = np.linspace(0, _maximum(split), plan.n_ranges + 1)
    at_least = np.searchsorted(-split.activation, -edges, side="right")  # tokens with f >= edge
    at_least[-1] = 0  # the last range includes its upper end
    for low, high, first, last in zip(edges, edges[1:], at_least[1:], at_least, strict=False):
        false = first + np.flatnonzero(~split.own[first:last])
        chosen = np.sort(rng.choice(false, min(plan.n_examples, len(false)), replace=False))
        yield FalsePositiveRange(
            low=float(low),
            high=float(high),
            n=int(last - first),
            n_false=len(false),
            share=wilson(len(false), int(last - first)) if last > first else None,
            position=split.position[chosen],
            activation=split.activation[chosen],
        )


def _curve(split: Split) -> Curve:
    ranking = split.ranking
    n_groups, n_true, n_tokens = len(ranking.n), int(ranking.true[-1]), int(ranking.n[-1])
    evenly = np.linspace(0, n_groups - 1, CURVE_POINTS)
    closer = np.geomspace(1, n_groups, CURVE_POINTS) - 1  # the first groups, where precision varies most
    kept = np.unique(np.concatenate([evenly, closer, [max(0, n_groups - 2)]]).round().astype(np.int64))
    n, true = ranking.n[kept], ranking.true[kept]
    return Curve(
        threshold=ranking.threshold[kept],
        n=n,
        n_both=true,
        precision=true / n,
        recall=true / n_true,
        false_positive_rate=(n - true) / (n_tokens - n_true),
        base_rate=n_true / n_tokens,
        n_tokens=n_tokens,
    )
