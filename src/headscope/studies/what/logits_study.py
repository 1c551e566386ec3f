"""The study "logits": which tokens does a feature make likelier by the direct path, and does it copy one?"""

from typing import TYPE_CHECKING

from headscope.studies.study import FeatureStudy, NoOptions, Tab
from headscope.studies.support.on_page import open_index

if TYPE_CHECKING:
    from headscope.studies.subject import Subject
    from headscope.studies.what.downstream import LogitEffect


def _run(subject: "Subject", latent: int, _options: NoOptions) -> "LogitEffect":
    from headscope.studies.what.downstream import logit_effect

    return logit_effect(subject.index, latent)


def _python(subject: "Subject", latent: int, _options: NoOptions, _found: "LogitEffect") -> str:
    opened = open_index(subject, "from headscope.studies.what.downstream import logit_effect")
    return (
        f"{opened}found = logit_effect(index, {latent})\n"
        "found.top, found.bottom, found.prominence, found.copied, found.top_source, found.copy_rank"
    )


LOGITS = FeatureStudy(
    name="logits",
    group="what",
    question="which tokens does the feature make likelier by the direct path, and does it copy one?",
    run=_run,
    quick=True,
    tabs=(Tab("logits", "Logits"),),
    python=_python,
)
