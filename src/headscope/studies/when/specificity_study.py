"""The study "specificity": does a feature fire only where a proxy is true, and wherever it is?"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headscope.studies.study import FeatureStudy, Tab
from headscope.studies.support.on_page import OfProxy, open_index

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.proxies import Proxy
    from headscope.studies.subject import Subject
    from headscope.studies.when.records import Specificity

_MAX_SUBTYPES = 6
_MEASURES = ("precision", "mass_share", "auc", "average_precision", "pearson", "phi", "pearson_above")


def _run(subject: "Subject", latent: int, options: OfProxy) -> "Specificity":
    from headscope.proxies import parse
    from headscope.studies.when.specificity import specificity

    proxy = parse(options.proxy)
    return specificity(subject.index, latent, proxy, subtypes=subtypes(proxy))


def subtypes(proxy: "Proxy") -> "dict[str, Proxy]":
    """Return the parts of a proxy with separate recall: strict induction, the operands of `|`, each token."""
    from headscope.proxies import Or, induction_of
    from headscope.proxies.families import AfterAny, Induction, NextTokenIn, TokenIn, WithinAfter

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


def _show(subject: "Subject", latent: int, options: OfProxy, found: "Specificity") -> "Json":
    from headscope.encode import encode
    from headscope.proxies import evaluate, parse
    from headscope.studies.support.places import Places
    from headscope.studies.when.specificity import expected_value

    index, proxy = subject.index, parse(options.proxy)
    places = Places(index, index.activations(latent), evaluate(proxy, index))
    manifest = index.manifest
    sensitivity = found.sensitivity
    return {
        "proxy": proxy.name,
        "hash": proxy.hash,
        "identity": f"{manifest['sae']['hash']} {manifest['corpus']['hash']}",
        "counts": encode(found.counts) | {"base_rate": encode(found.counts.base_rate)},
        "notes": list(found.notes),
        "maximum": encode(found.maximum),
        "histogram": encode(found.histogram),
        "expected": {
            name: encode(expected_value(found.histogram, found.counts.n_tokens, name)) for name in ("joint", "class")
        },
        "by_threshold": encode(found.precision_by_threshold),
        "top": [encode({"k": t.k, "n": t.n, "n_both": t.n_both}) | encode(t.precision) for t in found.top],
        "ranges": [_range(r, places) for r in found.ranges],
        "measures": encode({name: getattr(found, name) for name in _MEASURES} | {"recall": sensitivity.recall}),
        "tau": found.tau,
        "subtypes": encode(sensitivity.subtypes),
        "curve": encode(found.curve),
        "misses": {"n": found.counts.n_false_negatives, "rows": places.rows(sensitivity.sample)},
        **places.as_json(),
    }


def _range(found: Any, places: Any) -> "Json":
    from headscope.encode import encode

    numbers = {name: getattr(found, name) for name in ("low", "high", "n", "n_false", "share")}
    return encode(numbers) | {"rows": places.rows(found.position)}


def _python(subject: "Subject", latent: int, options: OfProxy, _found: "Specificity") -> dict[str, str]:
    """Return the Python calls for each tab."""
    from headscope.proxies import parse

    proxy = parse(options.proxy)
    imports = "from headscope.studies.when.specificity import expected_value, specificity"
    opened = open_index(subject, imports)
    study = f"{opened}found = specificity(index, {latent}, {proxy.name!r})\n"
    parts = {name: name for name in subtypes(proxy)}
    whole = f"{opened}found = specificity(index, {latent}, {proxy.name!r}, subtypes={parts!r})\n" if parts else study
    return {
        "specificity": f"{study}found.histogram, found.precision_by_threshold, found.ranges",
        "expected": f"{study}expected_value(found.histogram, found.counts.n_tokens)",
        "expected_class": f'{study}expected_value(found.histogram, found.counts.n_tokens, "class")',
        "sensitivity": f"{whole}found.sensitivity, found.curve, found.auc, found.pearson",
    }


SPECIFICITY = FeatureStudy(
    name="specificity",
    group="when",
    question="does the feature fire only where a proxy is true, and wherever it is?",
    run=_run,
    options=OfProxy,
    tabs=(Tab("specificity", "Specificity"), Tab("expected", "Expected value"), Tab("sensitivity", "Sensitivity")),
    show=_show,
    python=_python,
)
