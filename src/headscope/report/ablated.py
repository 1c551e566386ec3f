"""Replacement for the z of an ablated head, computed once for all sections of a subject."""

from headscope.report.subject import Subject
from headscope.studies.support.replacement import Kind, Replacement


def replacement(subject: Subject, kind: Kind = "mean") -> Replacement:
    """Compute the replacement for z from as many blocks as `settings.sequences`; by default its mean over text."""
    live, settings = subject.live, subject.settings
    return subject.once(
        ("replacement", kind),
        lambda: Replacement.of(live, kind, max_blocks=settings.sequences, seed=settings.seed),
    )
