"""The study "heads": what does each head of the model do, and which features does it make?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headscope.limits import Seed, Shuffles
from headscope.studies.study import DictionaryStudy

if TYPE_CHECKING:
    from headscope.index.head_records import HeadTables
    from headscope.studies.subject import Subject


@dataclass(frozen=True, kw_only=True)
class HeadsOptions:
    """Settings of the null of the roles and of random draws."""

    n_shuffles: Shuffles = 99
    """Models with shuffled weights that roles are compared with; fewer than 99 cannot give significance at 1 %."""
    seed: Seed = 0
    """Seed of random draws."""


def _run(subject: "Subject", options: HeadsOptions) -> "HeadTables":
    from headscope.index.head_records import HeadTables
    from headscope.studies.heads.store import HeadPlan, study_heads

    study_heads(subject.live, HeadPlan(n_shuffles=options.n_shuffles, seed=options.seed), subject.progress)
    return HeadTables(subject.index.folder)


HEADS = DictionaryStudy(
    name="heads",
    group="heads",
    question="what does each head of the model do, and which features does it make, share and turn off?",
    run=_run,
    columns="heads",
    options=HeadsOptions,
    needs_model=True,
)
