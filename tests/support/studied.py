"""Asks studies of the registry as a page does."""

from typing import Any

from headscope.studies.registry import STUDIES
from headscope.studies.study import FeatureStudy
from headscope.studies.subject import Subject


def ask(subject: Subject, name: str, latent: int, **options: Any) -> dict[str, Any]:
    study = STUDIES[name]
    assert isinstance(study, FeatureStudy)
    return study.answer(subject, latent, study.options(**options))


def dived(subject: Subject, latent: int, proxy: str) -> dict[str, Any]:
    return ask(subject, "specificity", latent, proxy=proxy)
