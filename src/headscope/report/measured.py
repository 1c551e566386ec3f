"""Report rows for a study of the registry: one for each measure of its record, for every exemplar."""

from collections.abc import Iterator
from dataclasses import fields

from headscope.encode import leaves
from headscope.errors import HeadscopeError, StudyError
from headscope.report.records import Claim, Exemplar, Section
from headscope.report.subject import Subject
from headscope.stats import Measure
from headscope.studies.study import FeatureStudy, parse_options
from headscope.studies.subject import Subject as Studied


def section_of(study: FeatureStudy) -> Section:
    """Make the section of a study, which is run on every exemplar, with its proxy where the study needs one."""

    def run(subject: Subject) -> tuple[Claim, ...]:
        studied = Studied(subject.index, subject.live)
        return tuple(claim for exemplar in subject.some_exemplars() for claim in _rows(study, studied, exemplar))

    return Section(study.name, (study.name,), study.question, run)


def _rows(study: FeatureStudy, studied: Studied, exemplar: Exemplar) -> list[Claim]:
    """The rows of one exemplar, or one that says why there are none."""
    try:
        return list(_claims(study, studied, exemplar))
    except HeadscopeError as error:
        why = f"{error.got}; expected: {error.expected}"
        row = Claim(
            study.name, study.question, "not measured", missing=why, feature=exemplar.latent, kind=exemplar.kind
        )
        return [row]


def _claims(study: FeatureStudy, studied: Studied, exemplar: Exemplar) -> Iterator[Claim]:
    given = {"proxy": [exemplar.proxy]} if "proxy" in {field.name for field in fields(study.options)} else {}
    record = study.record(studied, exemplar.latent, parse_options(study, given))
    found = {" ".join(names): leaf for names, leaf in leaves(record, Measure) if isinstance(leaf, Measure)}
    if not found:
        raise StudyError(
            f"a record of {study.name} without a measure", expected="at least one", do="set in_report to False"
        )
    for name, measure in found.items():
        words = f"{study.question}: {name.replace('_', ' ')}"
        claim = Claim(study.name, words, "", missing="", feature=exemplar.latent, kind=exemplar.kind)
        yield claim.with_measure(measure)
