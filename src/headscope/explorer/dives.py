"""From the records of studies to what the deep-dive tabs show. No torch: what needs a model is asked of an object."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from headscope.errors import HeadscopeError, IndexFormatError, ModelError, StudyError
from headscope.explorer.answers import Json, NothingThereError
from headscope.explorer.study_json import effects_json, logits_json, predictions_json, specificity_json
from headscope.index.columns import studies
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
from headscope.proxies.families import AfterAny, Induction, NextTokenIn, TokenIn, WithinAfter
from headscope.studies.what.downstream import Downstream, logit_effect
from headscope.studies.when.records import Predictions
from headscope.studies.when.specificity import specificity

_SUGGESTED = 5  # tokens of a suggested proxy
_MAX_SUBTYPES = 6
# columns that `headscope proxies` writes
_SEARCHED = ("proxy", "induction_proxy", "local_proxy", "context_proxy", "token_proxy")
_KEPT = 8  # records of effects
_MOST = 500  # tokens at which a feature is removed, each in a block of its own that the model must read
_LARGE = 0.05  # of the squared DFA: a source token with less is not suggested
_ADVICE = (
    "`headscope effects INDEX` writes the exact effect by the direct path of every feature into the "
    "index; `headscope serve --with-model` also removes this feature from the model, for the proxy that is typed here."
)


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

    def start(self, latent: int) -> Json:
        """Proxies to try, what studies added to the index, whether the top logit is copied, if there is a model."""
        self._check(latent)
        opened = _open(str(self._index.folder))
        return {
            "proxies": list(self._suggested(latent)),
            "columns": {study: self._columns(study, latent) for study in studies(self._index.folder)},
            "logits": logits_json(logit_effect(self._index, latent)),
            "live": self._effects is not None,
            "advice": _ADVICE,
            "python": {
                "logits": _python_of_logits(str(self._index.folder), latent),
                "ablation": f'{opened}\nindex.columns("effects").slice({latent}, 1).to_pylist()',
            },
        }

    def dive(self, latent: int, proxy: str) -> Json:
        """Specificity and sensitivity, and places in the corpus to look at."""
        self._check(latent)
        parsed = parse(proxy)
        found = specificity(self._index, latent, parsed, subtypes=_subtypes(parsed))
        manifest = self._index.manifest
        return {
            **self._of(latent, parsed),
            "identity": f"{manifest['sae']['hash']} {manifest['corpus']['hash']}",
            **specificity_json(found, self._index, evaluate(parsed, self._index)),
            "python": _python(str(self._index.folder), latent, parsed),
        }

    def effects(self, latent: int, proxy: str) -> Json:
        """What removing the feature does to the loss, at tokens of the proxy and elsewhere."""
        self._check(latent)
        model, parsed = self._model(), parse(proxy)
        mask = evaluate(parsed, self._index)
        found = self._found.get(latent) or model.downstream(latent, _MOST)
        self._found[latent] = found
        if len(self._found) > _KEPT:
            self._found.popitem(last=False)
        return {
            **self._of(latent, parsed),
            **effects_json(found, self._index, mask),
            "python": {"ablation": _python_of_effects(str(self._index.folder), latent)},
        }

    def predictions(self, latent: int, proxy: str) -> Json:
        """What the model predicts where the feature misses the proxy, against where it fires."""
        self._check(latent)
        return predictions_json(self._model().predictions(latent, parse(proxy)), self._index.block_size)

    def _of(self, latent: int, proxy: Proxy) -> Json:
        corpus = self._index.manifest["corpus"]
        said = {"latent": latent, "proxy": proxy.name, "hash": proxy.hash}
        return said | {"corpus": f"{corpus['name']}, {corpus['split']}"}

    def _model(self) -> EffectSource:
        if self._effects is None:
            raise StudyError(
                "no model to run",
                expected="a server with the index's model",
                do="start it with: headscope serve --with-model",
            )
        return self._effects

    def _check(self, latent: int) -> None:
        try:
            self._index.check_latent(latent)
        except IndexFormatError as error:
            raise NothingThereError(str(error)) from error

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
        examples = self._index.table()["example_tokens"][latent].as_py()
        on_tokens = [t for t in examples if t not in special][:_SUGGESTED]
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
            table, provenance = self._index.study(study)
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
        NothingThereError, ProxyError: no such feature, or no proxy.
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
            "effects": {p: _given(lambda p=p: dives.effects(latent, p)) for p in held if start["live"]},
            "predictions": {p: _given(lambda p=p: dives.predictions(latent, p)) for p in held if start["live"]},
        }
    }


def _given(study: Callable[[], Json]) -> Json:
    """What a study finds; where the model lacks what it needs, `missing` with the reason."""
    try:
        return study()
    except ModelError as error:
        return {"missing": f"{error.got}; expected: {error.expected}"}


def _subtypes(proxy: Proxy) -> dict[str, Proxy]:
    """Parts of a proxy for which recall is told apart: strict and fuzzy induction, the sides of an `|`, each token."""
    match proxy:
        case Or():
            parts = list(proxy.parts)
        case Induction(fuzzy=True):
            parts = [induction_of(proxy.token)]
        case TokenIn() | NextTokenIn() | AfterAny() | WithinAfter():
            parts = [replace(proxy, tokens=(token,)) for token in proxy.tokens] if len(proxy.tokens) > 1 else []
        case _:
            parts = []
    return {part.name: part for part in parts[:_MAX_SUBTYPES]}


# -------------------------------------------------------------------------------------------------------------- Python
def _open(folder: str) -> str:
    return f"from headscope import FeatureIndex\n\nindex = FeatureIndex.open({str(Path(folder))!r})"


def _python(folder: str, latent: int, proxy: Proxy) -> dict[str, str]:
    """The calls that make each tab again."""
    head = (
        "from headscope import FeatureIndex\n"
        "from headscope.studies.when.specificity import expected_value, specificity\n\n"
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
            "from headscope import jobs\nfrom headscope.studies.when.predictions import predictions\n\n"
            f"live = jobs.live({folder!r})\npredictions(live.index, live.model, {latent}, {proxy.name!r})"
        ),
        "sensitivity": f"{whole}found.sensitivity, found.curve, found.auc, found.pearson",
    }


def _python_of_logits(folder: str, latent: int) -> str:
    return (
        "from headscope import FeatureIndex\n"
        "from headscope.studies.what.downstream import logit_effect\n\n"
        f"index = FeatureIndex.open({folder!r})\n"
        f"found = logit_effect(index, {latent})\n"
        "found.top, found.bottom, found.prominence, found.copied, found.top_source, found.copy_rank"
    )


def _python_of_effects(folder: str, latent: int) -> str:
    return (
        "from headscope import jobs\n"
        "from headscope.studies.what.ablation import downstream\n\n"
        f"live = jobs.live({folder!r})\n"
        f"[found] = downstream(live, [{latent}], max_tokens={_MOST})\n"
        "found.paths, found.worst(), found.best()"
    )
