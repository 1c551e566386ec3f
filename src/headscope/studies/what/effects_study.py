"""The study "effects": what does each feature do to the loss by the direct path, exactly?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscope.limits import Above0, Count
from headscope.studies.study import DictionaryStudy

if TYPE_CHECKING:
    from headscope.studies.subject import Subject
    from headscope.studies.what.effects import DirectEffects


@dataclass(frozen=True, kw_only=True)
class EffectsOptions:
    """Sample sizes."""

    max_tokens: Count = 2_000
    """Maximum number of active tokens sampled per feature."""
    max_work: Above0 = 1e11
    """Maximum of active tokens of all features times vocabulary; with a large vocabulary fewer tokens are sampled."""


def _run(subject: "Subject", options: EffectsOptions) -> "DirectEffects":
    from headscope.studies.what.effects import direct_effects, write_effects

    found = direct_effects(
        subject.live,
        max_tokens=options.max_tokens,
        max_work=options.max_work,
        on_progress=lambda done, total: subject.progress("effects", done, total),
    )
    write_effects(subject.live, found)
    return found


EFFECTS = DictionaryStudy(
    name="effects",
    group="what",
    question="what does each feature do to the loss by the direct path, exactly?",
    run=_run,
    columns="effects",
    options=EffectsOptions,
    needs_model=True,
)
