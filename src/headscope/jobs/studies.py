"""Run studies of an index by name: of one feature, or of the whole dictionary with results stored in the index."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.errors import OptionError, StudyError
from headscope.jobs.indexes import live, upstream_sae
from headscope.jobs.inputs import Progress
from headscope.limits import Device, Latent, Name, NameOrPath, check_fields, checked
from headscope.studies.registry import STUDIES, dictionary_studies
from headscope.studies.study import DictionaryStudy, FeatureStudy, Study

if TYPE_CHECKING:
    from headscope.studies.subject import Subject


@checked
def subject(
    index: NameOrPath,
    *,
    with_model: bool = False,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    device: Device = "cpu",
    upstream_saes: Sequence[Name] = (),
    on_progress: Progress | None = None,
) -> "Subject":
    """Open an index for studies, with its model on request.

    Args:
        index: an index folder.
        with_model: load its model, found as `live` finds it; implied by naming it, its SAE or earlier SAEs.
        model: the index's.
        sae: the index's.
        device: device of the model.
        upstream_saes: SAEs of earlier components of the model.
        on_progress: called with the stage, the work done and the total.

    Raises:
        HeadscopeError: any of its kinds; weights that are not the index's are refused by their hash.
    """
    from headscope.index.store import FeatureIndex
    from headscope.studies.subject import Subject

    if not (with_model or model or sae or upstream_saes):
        return Subject(FeatureIndex.open(index), progress=on_progress)
    opened = live(index, model=model, sae=sae, device=device, on_progress=on_progress)
    saes = {name: upstream_sae(opened, name) for name in upstream_saes}
    return Subject(opened.index, opened, saes=saes, progress=on_progress)


@checked
def study(
    name: str,
    index: NameOrPath,
    latent: Latent | None = None,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    device: Device = "cpu",
    on_progress: Progress | None = None,
    **options: Any,
) -> Any:
    """Run one study and return its record.

    Args:
        name: a key of `headscope.studies.registry.STUDIES`.
        index: an index folder.
        latent: the feature, for a study of one.
        model: the index's, for a study that needs it.
        sae: the index's.
        device: device of the model.
        on_progress: called with the stage, the work done and the total.
        options: the fields of the study's options.

    Returns:
        The study's record; results of a study of the whole dictionary are also written into the index.

    Raises:
        StudyError: no such study, or no latent for a study of one feature.
        HeadscopeError: any of its kinds.
    """
    found = study_of(name)
    made = _options(found, options)
    if isinstance(found, FeatureStudy) and latent is None:
        raise StudyError(f"no feature for {name}", expected="its latent", do="name one")
    opened = subject(index, with_model=found.needs_model, model=model, sae=sae, device=device, on_progress=on_progress)
    if isinstance(found, DictionaryStudy):
        return found.record(opened, made)
    return found.record(opened, latent or 0, made)


@checked
def study_all(
    index: NameOrPath,
    *,
    model: Name | None = None,
    sae: NameOrPath | None = None,
    device: Device = "cpu",
    again: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every study of the whole dictionary that has no results on an index yet, in order; a later run resumes.

    Args:
        index: an index folder.
        model: the index's.
        sae: the index's.
        device: device of the model.
        again: also rerun the studies that have results.
        on_progress: called with the stage, the work done and the total.

    Returns:
        The record of each study that was run, by name.

    Raises:
        HeadscopeError: any of its kinds; results of earlier studies are kept.
    """
    from headscope.index.columns import studies

    opened = subject(index, on_progress=on_progress)
    missing = [own for own in dictionary_studies() if again or own.columns not in studies(Path(opened.index.folder))]
    if any(own.needs_model for own in missing):
        opened = subject(index, with_model=True, model=model, sae=sae, device=device, on_progress=on_progress)
    return {own.name: own.record(opened) for own in missing}


def study_of(name: str) -> Study:
    """Return the study of a name.

    Raises:
        StudyError: there is none.
    """
    if name not in STUDIES:
        similar = get_close_matches(name, STUDIES, n=1)
        do = f"did you mean {similar[0]}?" if similar else "correct the name"
        raise StudyError(f"no study {name!r}", expected=f"one of {', '.join(STUDIES)}", do=do)
    return STUDIES[name]


def _options(found: Study, given: dict[str, Any]) -> Any:
    try:
        options = found.options(**given)
    except TypeError as error:
        names = ", ".join(found.options.__dataclass_fields__) or "none"
        raise OptionError(f"options of {found.name}: {error}", expected=names, do="correct their names") from error
    check_fields(options)
    return options
