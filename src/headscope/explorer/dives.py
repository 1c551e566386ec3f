"""From the records of studies to what the deep-dive tabs show. No torch: what needs a model is asked of an object."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from headscope.errors import HeadscopeError, IndexFormatError, StudyError
from headscope.explorer.answers import Json
from headscope.explorer.examples import corpus_json, text_runs
from headscope.explorer.numbers import short, significant
from headscope.index.columns import read_columns, studies
from headscope.index.records import Activations
from headscope.index.store import FeatureIndex
from headscope.proxies import (
    Or,
    Proxy,
    after_any,
    evaluate,
    induction_of,
    parse,
    token_in,
    vocabulary_of,
    within_after,
)
from headscope.proxies.families import AfterAny, Induction, NextTokenIn, TokenIn
from headscope.stats import Estimate, Measure
from headscope.studies.downstream import Downstream, PathEffect
from headscope.studies.specificity import expected_value, specificity
from headscope.studies.specificity_records import (
    Curve,
    ExpectedValue,
    FalsePositiveRange,
    Histogram,
    Predictions,
    Specificity,
)

_REACH = 16  # tokens shown on each side of a place
_SUGGESTED = 5  # tokens of a suggested proxy
_MAX_SUBTYPES = 6
_SEARCHED = (
    "proxy",
    "induction_proxy",
    "local_proxy",
    "context_proxy",
    "token_proxy",
)  # columns of `headscope proxies`
_KEPT = 8  # records of effects
_MOST = 2000  # tokens at which a feature is removed
_BINS = 60  # of loss changes
_LARGE = 0.05  # of the squared DFA: a source token with less is not suggested
_DIGITS = 6
_ADVICE = (
    "`headscope effects INDEX --model MODEL` writes the exact effect by the direct path of every feature into the index; "
    "`headscope serve --model MODEL` also removes this feature from the model, for the proxy that is typed here."
)
_MEASURES = ("precision", "mass_share", "auc", "average_precision", "pearson", "phi", "pearson_above")


@runtime_checkable
class EffectSource(Protocol):
    """What removing a feature does to the loss: an object with the index's model behind it."""

    def downstream(self, latent: int, max_tokens: int) -> Downstream:
        """Of one feature, at its active tokens, or about `max_tokens` of them drawn evenly."""
        ...

    def predictions(self, latent: int, proxy: Proxy) -> Predictions:
        """The probability of the feature's top logit token where the proxy is true."""
        ...


class IndexDives:
    """A `DiveSource` of one index."""

    def __init__(self, index: FeatureIndex, effects: EffectSource | None = None) -> None:
        """Dive into the features of an index; into their effects too where an object computes them."""
        self._index, self._effects = index, effects
        self._found: OrderedDict[int, Downstream] = OrderedDict()
        self._name = index.manifest["corpus"]["name"]

    def start(self, latent: int) -> Json:
        """Proxies to try, what studies added to the index, and whether there is a model."""
        self._check(latent)
        folder = str(self._index.folder)
        return {
            "proxies": list(self._suggested(latent)),
            "columns": {study: self._columns(study, latent) for study in studies(self._index.folder)},
            "live": self._effects is not None,
            "advice": _ADVICE,
            "python": {
                "logits": f"{_open(folder)}\nfeature = index.feature({latent})\nfeature.logit_top, feature.logit_bottom",
                "ablation": f'{_open(folder)}\nindex.columns("effects").slice({latent}, 1).to_pylist()',
            },
        }

    def dive(self, latent: int, proxy: str) -> Json:
        """Specificity and sensitivity, and places in the corpus to look at."""
        self._check(latent)
        parsed = parse(proxy)
        mask = evaluate(parsed, self._index)
        found = specificity(self._index, latent, parsed, subtypes=_subtypes(parsed))
        places = _Places(self._index, self._index.activations(latent), mask)
        manifest = self._index.manifest
        measures = {name: getattr(found, name) for name in _MEASURES} | {"recall": found.sensitivity.recall}
        return {
            "latent": latent,
            "proxy": parsed.name,
            "hash": parsed.hash,
            "identity": f"{manifest['sae']['hash']} {manifest['corpus']['hash']}",
            "corpus": f"{self._name}, {manifest['corpus']['split']}",
            "counts": _counts(found),
            "notes": list(found.notes),
            "maximum": short(found.maximum, _DIGITS),
            "histogram": _histogram(found.histogram),
            "expected": {
                name: _expected(expected_value(found.histogram, found.counts.n_tokens, name))
                for name in ("joint", "class")
            },
            "by_threshold": _columns_of(
                found.precision_by_threshold, ("threshold", "n", "n_both", "value", "low", "high")
            )
            | {
                "base_rate": short(found.counts.base_rate, _DIGITS),
                "definition": found.precision_by_threshold.definition,
            },
            "top": [{"k": t.k, "n": t.n, "n_both": t.n_both} | _estimate(t.precision) for t in found.top],
            "ranges": [_range(r, places) for r in found.ranges],
            "measures": {name: _measure(m) for name, m in measures.items()},
            "tau": found.tau,
            "subtypes": [
                {"name": s.name, "n": s.n, "n_both": s.n_both, "recall": _measure(s.recall)}
                for s in found.sensitivity.subtypes
            ],
            "curve": None if found.curve is None else _curve(found.curve),
            "misses": {"n": found.counts.n_false_negatives, "rows": places.rows(found.sensitivity.sample)},
            **places.as_json(),
            "python": _python(str(self._index.folder), latent, parsed),
        }

    def effects(self, latent: int, proxy: str) -> Json:
        """What removing the feature does to the loss, at tokens of the proxy and elsewhere."""
        self._check(latent)
        model, parsed = self._model(), parse(proxy)
        mask = evaluate(parsed, self._index)
        if latent not in self._found:
            self._found[latent] = model.downstream(latent, _MOST)
            if len(self._found) > _KEPT:
                self._found.popitem(last=False)
        found = self._found[latent]
        top = self._index.feature(latent).logit_top[0][0]
        chosen = {"top": found.next_is(top), "proxy": found.holds(mask)}
        places = _Places(self._index, self._index.activations(latent), mask)
        edges, counts = found.histogram(_BINS) if found.n else (np.zeros(0), {})
        return {
            "latent": latent,
            "proxy": parsed.name,
            "hash": parsed.hash,
            "corpus": f"{self._name}, {self._index.manifest['corpus']['split']}",
            "definition": found.definition,
            "notes": list(found.notes),
            "maximum": short(self._index.feature(latent).maximum, _DIGITS),
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
            "python": {"ablation": _python_of_effects(str(self._index.folder), latent)},
        }

    def predictions(self, latent: int, proxy: str) -> Json:
        """What the model predicts where the feature misses the proxy, against where it fires."""
        self._check(latent)
        found = self._model().predictions(latent, parse(proxy))
        groups = (found.false_negatives, found.true_positives, found.elsewhere)
        return {
            "tokens": list(found.tokens),
            "groups": [{"name": g.name, "n": g.n, "mean": _measure(g.mean)} for g in groups],
            "auc": _measure(found.auc),
            "rows": [
                [g.name, *divmod(p, self._index.block_size), short(x, _DIGITS)]
                for g in groups
                for p, x in zip(g.position.tolist(), g.probability.tolist(), strict=True)
            ],
        }

    def _model(self) -> EffectSource:
        if self._effects is None:
            raise StudyError(
                "no model to run",
                expected="a server with the index's model",
                do="start it with: headscope serve --model",
            )
        return self._effects

    def _check(self, latent: int) -> None:
        try:
            self._index.check_latent(latent)
        except IndexFormatError as error:
            raise IndexError(str(error)) from error

    def _suggested(self, latent: int) -> Iterator[Json]:
        """Proxies to try: those that a search found, else what the card says of a feature."""
        if "proxies" in studies(self._index.folder):
            found = self._columns("proxies", latent).get("values", {})
            best = [found[name] for name in _SEARCHED if found.get(name)]
            if best:
                yield {"proxy": best[0], "why": f"the best that `headscope proxies` found; kind: {found['kind']}"}
            for proxy in dict.fromkeys(best[1:]):
                if proxy != best[0]:
                    yield {"proxy": proxy, "why": "the best of another family that `headscope proxies` found"}
            if best:
                return
        for proxy, why in self._guessed(latent):
            yield {"proxy": proxy.name, "why": why}

    def _guessed(self, latent: int) -> list[tuple[Proxy, str]]:
        feature, sources = self._index.feature(latent), self._index.sources(latent)
        if not feature.alive or sources is None:
            return []
        vocabulary, special = vocabulary_of(self._index), set(self._index.vocabulary[1])
        top = feature.logit_top[0][0]
        text_sources = [t for t in sources.tokens if t.token not in special]
        from_tokens = [t.token for i, t in enumerate(text_sources[:_SUGGESTED]) if i == 0 or t.share >= _LARGE]
        examples = self._index.sql("SELECT example_tokens FROM features WHERE latent = ?", [latent])
        on_tokens = [t for t in examples["example_tokens"][0].as_py() if t not in special][:_SUGGESTED]
        made: list[tuple[Proxy, str]] = []
        if on_tokens:
            made.append((token_in(map(vocabulary.name, on_tokens)), "the tokens of its strongest examples"))
        if from_tokens:
            made.append((within_after(map(vocabulary.name, from_tokens)), "soon after its top source tokens"))
            made.append((after_any(map(vocabulary.name, from_tokens)), "anywhere after its top source tokens"))
        copies = from_tokens[:1] == [top]
        induction = (induction_of(vocabulary.name(top), fuzzy=True), "its top logit token is next by induction")
        return [induction, *made] if copies else [*made, induction]

    def _columns(self, study: str, latent: int) -> Json:
        """What one study added for a feature; columns of another index are refused, and why is said."""
        try:
            table, provenance = read_columns(self._index.folder, study)
        except HeadscopeError as error:
            return {"refused": f"{error.got}. {error.do}"}
        row = table.slice(latent, 1).to_pylist()[0]
        values = {name: value for name, value in row.items() if name != "latent"}
        said = {name: provenance[name] for name in ("definitions", "n", "created", "headscope")}
        return said | {"n": str(said["n"]), "values": values}


def packed(dives: IndexDives, latent: int, proxies: Iterable[str] = ()) -> dict[int, Json]:
    """What a file holds of the deep dive into one feature: only for some proxies, since nothing computes others there.

    Args:
        dives: of an index.
        latent: which feature.
        proxies: the suggested ones when none are given.

    Raises:
        IndexError, ProxyError: no such feature, or no proxy.
    """
    start = dives.start(latent)
    given = list(dict.fromkeys(proxies))
    if given:
        start["proxies"] = [{"proxy": proxy, "why": "of this file"} for proxy in given]
    held = [suggested["proxy"] for suggested in start["proxies"]]
    return {
        latent: {
            "start": start,
            "dives": {proxy: dives.dive(latent, proxy) for proxy in held},
            "effects": {proxy: dives.effects(latent, proxy) for proxy in held if start["live"]},
            "predictions": {proxy: dives.predictions(latent, proxy) for proxy in held if start["live"]},
        }
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


def _subtypes(proxy: Proxy) -> dict[str, Proxy]:
    """Parts of a proxy for which recall is told apart: strict and fuzzy induction, the sides of an `|`, each token."""
    match proxy:
        case Or():
            parts = list(proxy.parts)
        case Induction(fuzzy=True):
            parts = [induction_of(proxy.token)]
        case TokenIn() | NextTokenIn() | AfterAny():
            parts = [replace(proxy, tokens=(token,)) for token in proxy.tokens] if len(proxy.tokens) > 1 else []
        case _:
            parts = []
    return {part.name: part for part in parts[:_MAX_SUBTYPES]}


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


def _curve(c: Curve) -> Json:
    names = ("threshold", "n", "n_both", "precision", "recall", "false_positive_rate")
    return _columns_of(c, names) | {"base_rate": short(c.base_rate, _DIGITS), "definition": c.definition}


def _range(r: FalsePositiveRange, places: _Places) -> Json:
    numbers = {"low": short(r.low, _DIGITS), "high": short(r.high, _DIGITS), "n": r.n, "n_false": r.n_false}
    return numbers | {"share": None if r.share is None else _estimate(r.share), "rows": places.rows(r.position)}


def _estimate(e: Estimate) -> Json:
    return dict(zip(("value", "low", "high"), significant([e.value, e.low, e.high], _DIGITS), strict=True))


def _measure(m: Measure) -> Json:
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
        "mean": _measure(effect.mean),
        "later": None if effect.later is None or not found.n else short(float(effect.later.mean()), _DIGITS),
        "shares": {name: {"positive": _measure(s.positive), "net": _measure(s.net)} for name, s in shares.items()},
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


# -------------------------------------------------------------------------------------------------------------- Python
def _open(folder: str) -> str:
    return f"from headscope import FeatureIndex\n\nindex = FeatureIndex.open({str(Path(folder))!r})"


def _python(folder: str, latent: int, proxy: Proxy) -> dict[str, str]:
    """The calls that make each tab again."""
    head = (
        "from headscope import FeatureIndex\n"
        "from headscope.studies.specificity import expected_value, specificity\n\n"
        f"index = FeatureIndex.open({folder!r})\n"
    )
    study = f"{head}found = specificity(index, {latent}, {proxy.name!r})\n"
    parts = {name: name for name in _subtypes(proxy)}
    whole = f"{head}found = specificity(index, {latent}, {proxy.name!r}, subtypes={parts!r})\n" if parts else study
    return {
        "specificity": f"{study}found.histogram, found.precision_by_threshold, found.ranges",
        "expected": f"{study}expected_value(found.histogram, found.counts.n_tokens)",
        "expected_class": f'{study}expected_value(found.histogram, found.counts.n_tokens, "class")',
        "predictions": (
            "from headscope import jobs\nfrom headscope.studies.predictions import predictions\n\n"
            f"live = jobs.live({folder!r})\npredictions(live.index, live.model, {latent}, {proxy.name!r})"
        ),
        "sensitivity": f"{whole}found.sensitivity, found.curve, found.auc, found.pearson",
    }


def _python_of_effects(folder: str, latent: int) -> str:
    return (
        "from headscope import jobs\n"
        "from headscope.studies.ablation import downstream\n\n"
        f"live = jobs.live({folder!r})\n"
        f"[found] = downstream(live, [{latent}], max_tokens={_MOST})\n"
        "found.paths, found.worst(), found.best()"
    )
