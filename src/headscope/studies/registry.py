"""All studies, by name. A package registers its own with an entry point of the group `headscope.studies`.

[project.entry-points."headscope.studies"]
my_study = "my_package.my_study:STUDY"
"""

import warnings
from dataclasses import fields
from importlib.metadata import entry_points

from headscope.errors import StudyError
from headscope.studies.heads.study import HEADS
from headscope.studies.how.circuit_study import CIRCUIT, QK
from headscope.studies.how.head_shares_study import HEAD_SHARES
from headscope.studies.how.patching_study import FEATURE_PATCHING, PATCHING
from headscope.studies.how.sources_study import COMPARE_HEADS, SOURCE_SETS, SOURCES
from headscope.studies.induction.study import FAMILIES
from headscope.studies.study import DictionaryStudy, FeatureStudy, Study
from headscope.studies.what.ablation_study import ABLATION
from headscope.studies.what.effects_study import EFFECTS
from headscope.studies.what.logits_study import LOGITS
from headscope.studies.when.predictions_study import PREDICTIONS
from headscope.studies.when.proxies_study import BEST_PROXIES, PROXIES
from headscope.studies.when.specificity_study import SPECIFICITY

_TAKEN = {"index", "latent", "options", "model", "sae", "device", "json", "upstream_sae", "name", "on_progress", "help"}
STUDIES: dict[str, Study] = {}
"""Studies by name, in the order of the page and of `headscope study all`."""


def register(study: Study) -> None:
    """Add a study.

    Raises:
        StudyError: the name is taken.
    """
    if study.name in STUDIES:
        raise StudyError(f"two studies called {study.name!r}", expected="a name of its own", do="rename one")
    taken = sorted({field.name for field in fields(study.options)} & _TAKEN)
    if taken:
        raise StudyError(
            f"an option called {taken[0]!r} of {study.name}", expected="none of the command's own", do="rename it"
        )
    STUDIES[study.name] = study


def feature_studies() -> tuple[FeatureStudy, ...]:
    """Return the studies of one feature."""
    return tuple(study for study in STUDIES.values() if isinstance(study, FeatureStudy))


def dictionary_studies() -> tuple[DictionaryStudy, ...]:
    """Return the studies of all features in running order: later ones use the results of earlier ones."""
    return tuple(study for study in STUDIES.values() if isinstance(study, DictionaryStudy))


for _study in (
    *(SPECIFICITY, PREDICTIONS, BEST_PROXIES, LOGITS, ABLATION),
    *(HEAD_SHARES, SOURCE_SETS, SOURCES, COMPARE_HEADS, PATCHING, FEATURE_PATCHING, CIRCUIT, QK),
    *(PROXIES, EFFECTS, FAMILIES, HEADS),
):
    register(_study)
for _point in entry_points(group="headscope.studies"):
    try:
        register(_point.load())
    except Exception as error:  # of a package that is not ours: it must not take headscope along
        warnings.warn(f"the study {_point.value} is left out: {type(error).__name__}: {error}", stacklevel=1)
