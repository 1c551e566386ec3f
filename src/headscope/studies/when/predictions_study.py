"""The study "predictions": what does the model predict where a feature misses its proxy, against where it fires?"""

from typing import TYPE_CHECKING

from headscope.studies.study import FeatureStudy
from headscope.studies.support.on_page import OfProxy, open_live

if TYPE_CHECKING:
    from headscope.encode import Json
    from headscope.studies.subject import Subject
    from headscope.studies.when.records import Predictions


def _run(subject: "Subject", latent: int, options: OfProxy) -> "Predictions":
    from headscope.studies.when.predictions import predictions

    return predictions(subject.index, subject.live.model, latent, options.proxy)


def _show(subject: "Subject", _latent: int, _options: OfProxy, found: "Predictions") -> "Json":
    from headscope.encode import encode

    groups = (found.false_negatives, found.true_positives, found.elsewhere)
    size = subject.index.block_size
    return {
        "tokens": list(found.tokens),
        "groups": [encode({"name": g.name, "n": g.n, "mean": g.mean}) for g in groups],
        "auc": encode(found.auc),
        "rows": [
            [g.name, *divmod(p, size), encode(x)]
            for g in groups
            for p, x in zip(g.position.tolist(), g.probability.tolist(), strict=True)
        ],
    }


def _python(subject: "Subject", latent: int, options: OfProxy, _found: "Predictions") -> str:
    opened = open_live(subject, "from headscope.studies.when.predictions import predictions")
    return f"{opened}predictions(live.index, live.model, {latent}, {options.proxy!r})"


PREDICTIONS = FeatureStudy(
    name="predictions",
    group="when",
    question="what does the model predict where the feature misses its proxy, against where it fires?",
    run=_run,
    options=OfProxy,
    needs_model=True,
    show=_show,
    python=_python,
)
