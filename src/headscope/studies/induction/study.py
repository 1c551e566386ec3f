"""The study "families": which features are induction features, found without choosing a head?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscope.limits import Seed
from headscope.studies.study import DictionaryStudy

if TYPE_CHECKING:
    from headscope.studies.induction.store import InductionFamily
    from headscope.studies.subject import Subject


@dataclass(frozen=True, kw_only=True)
class FamiliesOptions:
    """Settings of random draws."""

    seed: Seed = 0
    """Seed of random draws."""


def _run(subject: "Subject", options: FamiliesOptions) -> "InductionFamily":
    from headscope.studies.induction.store import induction_family, save_family

    found = induction_family(subject.live, seed=options.seed, on_progress=subject.progress)
    save_family(subject.live, found)
    return found


FAMILIES = DictionaryStudy(
    name="families",
    group="induction",
    question="which features are induction features, by no choice of a head, and does the post's rule find them?",
    run=_run,
    columns="induction",
    options=FamiliesOptions,
    needs_model=True,
)
