"""Complete results of a report: facts, exemplars and studies of each SAE. To strict JSON and back; no torch."""

from dataclasses import asdict, dataclass
from typing import Any

from headscope.report.records import Claim, Exemplar, Figure, Finding, Listing

FORMAT = 1
"""Format version of `report.json`."""
_TYPES: dict[str, type[Claim] | type[Figure] | type[Listing]] = {"claim": Claim, "figure": Figure, "listing": Listing}


@dataclass(frozen=True)
class StudyResult:
    """Results of one study on one SAE."""

    study: str
    seconds: int | float
    findings: tuple[Finding, ...]
    failed: str | None = None
    """Reason of a failure; its claims are then rows with this reason."""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Its claims."""
        return tuple(f for f in self.findings if isinstance(f, Claim))

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        named = {kind: name for name, kind in _TYPES.items()}
        found = [{"type": named[type(f)]} | f.as_dict() for f in self.findings]
        return {"study": self.study, "seconds": self.seconds, "failed": self.failed, "findings": found}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StudyResult":
        """Read the result of `as_dict`."""
        found = []
        for own in values["findings"]:
            kind = _TYPES[own["type"]]
            found.append(kind.from_dict({name: value for name, value in own.items() if name != "type"}))
        return cls(values["study"], values["seconds"], tuple(found), values["failed"])


@dataclass(frozen=True)
class SubjectResult:
    """Results for one SAE."""

    name: str
    facts: dict[str, Any]
    """Facts on the SAE, its corpus and its index: names, hashes and sizes."""
    exemplars: tuple[Exemplar, ...]
    studies: tuple[StudyResult, ...]
    tokens: dict[int, str]
    """Text of the exemplars' tokens."""

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All claims, sorted by the number of their id, then in the studies' order."""
        return tuple(sorted((c for s in self.studies for c in s.claims), key=lambda c: id_order(c.id)))


@dataclass(frozen=True)
class Report:
    """A whole report."""

    version: str
    """Version of headscope."""
    created: str
    settings: dict[str, Any]
    model: dict[str, Any]
    subjects: tuple[SubjectResult, ...]

    @property
    def seconds(self) -> int | float:
        """Total time of the studies, including those reused from an earlier run."""
        return sum(study.seconds for subject in self.subjects for study in subject.studies)

    def as_dict(self) -> dict[str, Any]:
        """Return `report.json`: `claims` has one entry per number and SAE."""
        return {
            "format_version": FORMAT,
            "headscope": self.version,
            "created": self.created,
            "settings": self.settings,
            "model": self.model,
            "saes": [
                {
                    "name": subject.name,
                    **subject.facts,
                    "exemplars": [asdict(e) for e in subject.exemplars],
                    "studies": [{"study": s.study, "seconds": s.seconds, "failed": s.failed} for s in subject.studies],
                }
                for subject in self.subjects
            ],
            "claims": [claim.as_dict() | {"sae": s.name} for s in self.subjects for claim in s.claims],
            "figures": _others(self.subjects, Figure),
            "listings": _others(self.subjects, Listing),
        }

    def lines(self) -> list[str]:
        """Return the lines to print at the end."""
        lines = []
        for subject in self.subjects:
            measured = sum(claim.ours is not None for claim in subject.claims)
            lines.append(f"{subject.name}: {measured:,} of {len(subject.claims):,} numbers measured")
            lines += [f"  {e.kind}: feature {e.latent}, {e.proxy}" for e in subject.exemplars]
            lines += [f"  {study.study} failed: {study.failed}" for study in subject.studies if study.failed]
        return lines

    def rows(self) -> "list[Row]":
        """Return claims with the numbers of all SAEs side by side, in the order of ids."""
        rows: dict[tuple, dict[str, Claim]] = {}
        for subject in self.subjects:
            seen: dict[tuple, int] = {}
            for claim in subject.claims:
                same = (claim.id, claim.kind or "", claim.claim)
                seen[same] = seen.get(same, 0) + 1  # equal claims of one SAE are separate rows
                rows.setdefault((*same, seen[same]), {})[subject.name] = claim
        ordered = sorted(rows.values(), key=lambda own: id_order(next(iter(own.values())).id))
        return [Row(next(iter(own.values())), own) for own in ordered]


@dataclass(frozen=True)
class Row:
    """One claim, with the result of each SAE."""

    said: Claim
    """The claim of the first SAE that has it: wording, definition and the post's number."""
    by_sae: dict[str, Claim]


def id_order(name: str) -> tuple[int, str]:
    """Return a sort key: `M2` before `M13` before `M13b`."""
    digits = "".join(c for c in name if c.isdigit())
    return int(digits or 0), name


def _others(subjects: tuple[SubjectResult, ...], kind: type[Figure] | type[Listing]) -> list[dict[str, Any]]:
    return [
        {"sae": subject.name, "study": study.study} | found.as_dict()
        for subject in subjects
        for study in subject.studies
        for found in study.findings
        if isinstance(found, kind)
    ]
