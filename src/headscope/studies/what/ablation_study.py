"""The study "ablation": what does removing a feature do to the loss, by path?"""

from typing import TYPE_CHECKING

from headscope.studies.study import FeatureStudy, Tab
from headscope.studies.support.on_page import OfProxy, open_live

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

    from headscope.encode import Json
    from headscope.studies.subject import Subject
    from headscope.studies.support.places import Places
    from headscope.studies.what.downstream import Downstream, PathEffect

_MOST = 500  # tokens at which a feature is ablated, each in a separate block that the model must process
_BINS = 60  # of loss changes


def _run(subject: "Subject", latent: int, options: OfProxy) -> "Downstream":
    """Run without the proxy, which only splits the tokens, so that another proxy needs no further run of the model."""
    from headscope.proxies import evaluate, parse
    from headscope.studies.what.ablation import downstream

    evaluate(parse(options.proxy), subject.index)  # an invalid proxy is rejected before the model runs
    return subject.remembered(("ablation", latent), lambda: downstream(subject.live, [latent], max_tokens=_MOST)[0])


def _show(subject: "Subject", latent: int, options: OfProxy, found: "Downstream") -> "Json":
    """Return results by path, at the feature's top logit token, and where the proxy is true; and the extremes."""
    import numpy as np

    from headscope.encode import encode, significant
    from headscope.proxies import evaluate, parse
    from headscope.studies.support.places import Places

    index, proxy = subject.index, parse(options.proxy)
    mask = evaluate(proxy, index)
    feature = index.feature(latent)
    top = feature.logit_top[0][0]
    chosen = {"top": found.next_is(top), "proxy": found.holds(mask)}
    places = Places(index, index.activations(latent), mask)
    edges, counts = found.histogram(_BINS) if found.n else (np.zeros(0), {})
    changes = dict(zip(found.position.tolist(), significant(found.paths["total"].change, 3), strict=True))
    return {
        "proxy": proxy.name,
        "hash": proxy.hash,
        "definition": found.definition,
        "notes": list(found.notes),
        "maximum": encode(feature.maximum),
        "n": found.n,
        "n_active": found.n_active,
        "token": top,
        "n_of": {name: int(of.sum()) for name, of in chosen.items()},
        "paths": [_path(found, effect, chosen) for effect in found.paths.values()],
        "interaction": encode(float(found.interaction.mean())) if found.n else None,
        "histogram": encode({"edges": edges, "counts": counts}),
        "worst": _extremes(found, found.worst(), places),
        "best": _extremes(found, found.best(), places),
        **places.as_json(changes),
    }


def _path(found: "Downstream", effect: "PathEffect", chosen: "dict[str, np.ndarray]") -> "Json":
    from headscope.encode import encode

    return {
        "path": effect.path,
        "definition": effect.definition,
        "mean": encode(effect.mean),
        "later": None if effect.later is None or not found.n else encode(float(effect.later.mean())),
        "shares": {name: encode(found.share(effect.path, of)) for name, of in chosen.items()},
    }


def _extremes(found: "Downstream", which: "Int[np.ndarray, ' k']", places: "Places") -> "Json":
    """Return tokens of a record, with the change by each path and the actual next token."""
    from headscope.encode import significant

    return {
        "rows": places.rows(found.position[which]),
        "next": found.next_token[which].tolist(),
        "loss": significant(found.loss[which]),
        "change": {name: significant(effect.change[which]) for name, effect in found.paths.items()},
    }


def _python(subject: "Subject", latent: int, _options: OfProxy, _found: "Downstream") -> dict[str, str]:
    opened = open_live(subject, "from headscope.studies.what.ablation import downstream")
    return {
        "ablation": f"{opened}[found] = downstream(live, [{latent}], max_tokens={_MOST})\n"
        "found.paths, found.worst(), found.best()"
    }


ABLATION = FeatureStudy(
    name="ablation",
    group="what",
    question="what does removing the feature do to the loss, by path?",
    run=_run,
    options=OfProxy,
    needs_model=True,
    tabs=(Tab("ablation", "Ablation"),),
    show=_show,
    python=_python,
)
