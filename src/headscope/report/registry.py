"""The sections of a report, in order: those of the post's claims, then rows for the measures of other studies."""

from headscope.report import (
    claims_ablation,
    claims_downstream,
    claims_families,
    claims_feature,
    claims_heads,
    claims_patching,
    claims_training,
    claims_upstream,
)
from headscope.report.measured import section_of
from headscope.report.records import Section
from headscope.studies.registry import feature_studies

SECTIONS: tuple[Section, ...] = (
    *claims_training.SECTIONS,
    *claims_feature.SECTIONS,
    *claims_downstream.SECTIONS,
    *claims_upstream.SECTIONS,
    *claims_heads.SECTIONS,
    *claims_patching.SECTIONS,
    *claims_families.SECTIONS,
    *claims_ablation.SECTIONS,
)


def sections() -> tuple[Section, ...]:
    """Return all sections, including those of studies registered later."""
    return (*SECTIONS, *(section_of(study) for study in feature_studies() if study.in_report))
