"""The records of studies as JSON for the deep-dive tabs; static/types.d.ts has their fields."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from headscope.explorer.answers import Json
from headscope.explorer.examples import corpus_json, text_runs
from headscope.explorer.numbers import short, significant
from headscope.index.records import Activations
from headscope.index.store import FeatureIndex
from headscope.stats import Estimate, Measure
from headscope.studies.what.downstream import Downstream, LogitEffect, PathEffect
from headscope.studies.when.records import (
    Curve,
    ExpectedValue,
    FalsePositiveRange,
    Histogram,
    PrecisionByThreshold,
    Predictions,
    Specificity,
)
from headscope.studies.when.specificity import expected_value

_REACH = 16  # tokens shown on each side of a place
_DIGITS = 6
_BINS = 60  # of loss changes
_MEASURES = ("precision", "mass_share", "auc", "average_precision", "pearson", "phi", "pearson_above")


def specificity_json(found: Specificity, index: FeatureIndex, mask: Bool[np.ndarray, " token"]) -> Json:
    """When a feature fires, and places to look at; `mask` is its proxy over the corpus."""
    places = _Places(index, index.activations(found.latent), mask)
    measures = {name: getattr(found, name) for name in _MEASURES} | {"recall": found.sensitivity.recall}
    normalisations = ("joint", "class")
    return {
        "counts": _counts(found),
        "notes": list(found.notes),
        "maximum": short(found.maximum, _DIGITS),
        "histogram": _histogram(found.histogram),
        "expected": {n: _expected(expected_value(found.histogram, found.counts.n_tokens, n)) for n in normalisations},
        "by_threshold": _by_threshold(found.precision_by_threshold),
        "top": [{"k": t.k, "n": t.n, "n_both": t.n_both} | _estimate(t.precision) for t in found.top],
        "ranges": [_range(r, places) for r in found.ranges],
        "measures": {name: measure_json(m) for name, m in measures.items()},
        "tau": found.tau,
        "subtypes": [
            {"name": s.name, "n": s.n, "n_both": s.n_both, "recall": measure_json(s.recall)}
            for s in found.sensitivity.subtypes
        ],
        "curve": None if found.curve is None else _curve(found.curve),
        "misses": {"n": found.counts.n_false_negatives, "rows": places.rows(found.sensitivity.sample)},
        **places.as_json(),
    }


def effects_json(found: Downstream, index: FeatureIndex, mask: Bool[np.ndarray, " token"]) -> Json:
    """What removing a feature does: by path, at its top logit token, where a proxy is true; and the extremes."""
    feature = index.feature(found.latent)
    top = feature.logit_top[0][0]
    chosen = {"top": found.next_is(top), "proxy": found.holds(mask)}
    places = _Places(index, index.activations(found.latent), mask)
    edges, counts = found.histogram(_BINS) if found.n else (np.zeros(0), {})
    return {
        "definition": found.definition,
        "notes": list(found.notes),
        "maximum": short(feature.maximum, _DIGITS),
        "n": found.n,
        "n_active": found.n_active,
        "token": top,
        "n_of": {name: int(of.sum()) for name, of in chosen.items()},
        "paths": [_path(found, effect, chosen) for effect in found.paths.values()],
        "interaction": short(float(found.interaction.mean()), _DIGITS) if found.n else None,
        "histogram": {"edges": _list(edges), "counts": {name: _list(c) for name, c in counts.items()}},
        "worst": _extremes(found, found.worst(), places),
        "best": _extremes(found, found.best(), places),
        **places.as_json(_changes(found)),
    }


def logits_json(found: LogitEffect) -> Json:
    """How far the top logit token stands out, and whether it is copied; the card has the tokens."""
    numbers = {name: short(getattr(found, name), _DIGITS) for name in ("prominence", "copy_rank")}
    return numbers | {"copied": found.copied, "top_source": found.top_source}


def predictions_json(found: Predictions, block_size: int) -> Json:
    """p(X) at the tokens of each kind that were looked at."""
    groups = (found.false_negatives, found.true_positives, found.elsewhere)
    return {
        "tokens": list(found.tokens),
        "groups": [{"name": g.name, "n": g.n, "mean": measure_json(g.mean)} for g in groups],
        "auc": measure_json(found.auc),
        "rows": [
            [g.name, *divmod(p, block_size), short(x, _DIGITS)]
            for g in groups
            for p, x in zip(g.position.tolist(), g.probability.tolist(), strict=True)
        ],
    }


class _Places:
    """Positions of the corpus that a study shows, each once, with what is true around them."""

    def __init__(self, index: FeatureIndex, active: Activations, mask: Bool[np.ndarray, " token"]) -> None:
        self._index, self._active, self._mask = index, active, mask
        self._row: dict[int, int] = {}

    def rows(self, positions: Int[np.ndarray, " place"]) -> list[int]:
        """Numbers of these positions in `as_json()["contexts"]`."""
        return [self._row.setdefault(position, len(self._row)) for position in positions.tolist()]

    def as_json(self, changes: dict[int, float] | None = None) -> Json:
        """The places in order, the text around them, and what changes at the positions there."""
        size = self._index.block_size
        contexts, runs = [], []
        for position in self._row:
            block, offset = divmod(position, size)
            start, end = max(0, offset - _REACH), min(size, offset + _REACH + 1)
            context = self._context(block * size, offset, start, end) | {"block": block}
            if changes is not None:
                context["change"] = [
                    [p, changes[block * size + p]] for p in range(start, end) if block * size + p in changes
                ]
            contexts.append(context)
            runs.append([(start, end)])
        blocks = [c["block"] for c in contexts]
        return {"contexts": contexts, **corpus_json(text_runs(blocks, runs), self._index)}

    def _context(self, base: int, offset: int, start: int, end: int) -> Json:
        position, activation = self._active.position, self._active.activation
        first, last = np.searchsorted(position, [base + start, base + end])
        at = (position[first:last] - base).tolist()
        on = list(zip(at, significant(activation[first:last]), strict=True))
        true = (np.flatnonzero(self._mask[base + start : base + end]) + start).tolist()
        return {"dst": offset, "act": dict(on).get(offset, 0.0), "on": on, "proxy": true}


# ------------------------------------------------------------------------------------------------------------- records
def _counts(found: Specificity) -> Json:
    names = ("n_tokens", "n_documents", "n_active", "n_proxy", "n_both")
    return {name: getattr(found.counts, name) for name in names} | {"base_rate": short(found.counts.base_rate, _DIGITS)}


def _columns_of(record: Any, names: Iterable[str]) -> Json:
    return {name: _list(getattr(record, name)) for name in names}


def _list(values: np.ndarray) -> list:
    """Counts stay whole numbers; what is not finite becomes None."""
    return values.tolist() if values.dtype.kind in "iu" else significant(values, _DIGITS)


def _histogram(h: Histogram) -> Json:
    names = ("edges", "true", "false", "true_mass", "false_mass")
    return _columns_of(h, names) | {"n": h.n, "definition": h.definition}


def _expected(e: ExpectedValue) -> Json:
    said = {name: getattr(e, name) for name in ("normalisation", "n_true", "n_false", "definition")}
    return _columns_of(e, ("edges", "true", "false")) | said


def _by_threshold(p: PrecisionByThreshold) -> Json:
    names = ("threshold", "n", "n_both", "value", "low", "high")
    return _columns_of(p, names) | {"base_rate": short(p.base_rate, _DIGITS), "definition": p.definition}


def _curve(c: Curve) -> Json:
    names = ("threshold", "n", "n_both", "precision", "recall", "false_positive_rate")
    return _columns_of(c, names) | {"base_rate": short(c.base_rate, _DIGITS), "definition": c.definition}


def _range(r: FalsePositiveRange, places: _Places) -> Json:
    numbers = {"low": short(r.low, _DIGITS), "high": short(r.high, _DIGITS), "n": r.n, "n_false": r.n_false}
    return numbers | {"share": None if r.share is None else _estimate(r.share), "rows": places.rows(r.position)}


def _estimate(e: Estimate) -> Json:
    return dict(zip(("value", "low", "high"), significant([e.value, e.low, e.high], _DIGITS), strict=True))


def measure_json(m: Measure) -> Json:
    """A measure as JSON: `Measure` in static/types.d.ts."""
    return {
        "definition": m.definition,
        "n": m.n,
        **{name: short(getattr(m, name), _DIGITS) for name in ("value", "low", "high")},
        "interval": m.interval,
        "by_document": None if m.by_document is None else significant(m.by_document, _DIGITS),
        "null": None if m.null is None else _estimate(m.null),
        "missing": m.missing,
    }


def _path(found: Downstream, effect: PathEffect, chosen: dict[str, np.ndarray]) -> Json:
    shares = {name: found.share(effect.path, of) for name, of in chosen.items()}
    return {
        "path": effect.path,
        "definition": effect.definition,
        "mean": measure_json(effect.mean),
        "later": None if effect.later is None or not found.n else short(float(effect.later.mean()), _DIGITS),
        "shares": {
            name: {"positive": measure_json(s.positive), "net": measure_json(s.net)} for name, s in shares.items()
        },
    }


def _extremes(found: Downstream, which: Int[np.ndarray, " k"], places: _Places) -> Json:
    """Tokens of a record, with the change by each path there and the token that came next."""
    return {
        "rows": places.rows(found.position[which]),
        "next": found.next_token[which].tolist(),
        "loss": significant(found.loss[which], 4),
        "change": {name: significant(effect.change[which], 4) for name, effect in found.paths.items()},
    }


def _changes(found: Downstream) -> dict[int, float]:
    """The change of the loss at each position looked at, all paths together."""
    return dict(zip(found.position.tolist(), significant(found.paths["total"].change, 3), strict=True))
