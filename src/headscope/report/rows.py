"""Report rows without numbers yet: a study fills in those it can, and gives the reason for the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.errors import HeadscopeError
from headscope.report.records import Claim, Exemplar, Finding, Kind, Unit
from headscope.report.subject import Subject
from headscope.stats import MINIMUM_UNITS, Estimate, Measure, quotient, resampled, unit_draws, wilson


@dataclass(frozen=True)
class Row:
    """A claim without its number."""

    id: str
    claim: str
    definition: str
    post: float | str | None = None
    unit: Unit = "share"
    differs: str = ""
    null: str = ""
    """Description of the null; added to the definition."""

    def of(self, found: Measure | Estimate | int | float, *, n: int | None = None, note: str = "") -> Claim:
        """Return the claim with a measurement.

        Args:
            found: the number.
            n: sample size, where `found` has none.
            note: specifics of this SAE: the head, the number of prompts.
        """
        empty = self._claim(note, missing="not measured")
        if isinstance(found, Measure):
            return empty.with_measure(found)
        if isinstance(found, Estimate):
            return empty.with_estimate(found, n)
        return replace(empty, ours=float(found), n=n, missing=None)

    def without(self, reason: str) -> Claim:
        """Return the claim with the reason why there is no number."""
        return self._claim("", missing=reason)

    def _claim(self, note: str, *, missing: str) -> Claim:
        definition = f"{self.definition}; null: {self.null}" if self.null else self.definition
        differs = "; ".join(part for part in (f"here {note}" if note else "", self.differs) if part)
        return Claim(self.id, self.claim, definition, self.post, differs=differs, unit=self.unit, missing=missing)


Rows = Mapping[str, Row]
Filled = tuple[Mapping[str, Claim], tuple[Finding, ...]]
"""The claims by the name of their row, and the figures with them."""


def fill(rows: Rows, compute: Callable[[], Filled]) -> tuple[Finding, ...]:
    """Return every row once: with its number, or with the reason why it has none."""
    try:
        claims, others = compute()
    except HeadscopeError as error:
        return tuple(row.without(why(error)) for row in rows.values())
    unknown = set(claims) - set(rows)
    if unknown:
        raise KeyError(f"no rows {sorted(unknown)}")
    return (*(claims.get(name) or row.without("not measured") for name, row in rows.items()), *others)


def why(error: HeadscopeError) -> str:
    """Format an error as the reason of a row, in one line."""
    return f"{error.got}; expected: {error.expected}"


def fill_each(
    subject: Subject, kinds: Iterable[Kind], rows: Rows, compute: Callable[[Exemplar], Filled]
) -> tuple[Finding, ...]:
    """Return every row for the exemplar of each kind; for a kind without one, with the reason."""
    found: list[Finding] = []
    for kind in kinds:
        latent = next((e.latent for e in subject.exemplars if e.kind == kind), None)
        parts = fill(rows, lambda kind=kind: compute(subject.exemplar(kind)))
        found += [replace(part, kind=kind, feature=latent) for part in parts]
    return tuple(found)


# -------------------------------------------------------------------------------------------------------------- numbers
def share_that(holds: Bool[np.ndarray, " n"] | Sequence[bool], null: Estimate | None = None) -> Measure:
    """Return the share for which something holds, with its Wilson 95 % interval at any n."""
    n, k = len(holds), int(np.sum(holds))
    if n == 0:
        return Measure("", 0, null=null, missing="there is nothing to take a share of")
    found = wilson(k, n)
    return Measure("", n, found.value, found.low, found.high, "Wilson 95 %", null=null)


def mean_by(
    unit: Sequence[int] | Int[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    *,
    of: str = "documents",
    null: float | None = None,
    samples: int = 1000,
) -> Measure:
    """Return a mean with its interval by resampling units (`of` names them); none with fewer than 10 or all alike."""
    n = len(values)
    expected = None if null is None else Estimate(null, null, null)
    if n == 0:
        return Measure("", 0, null=expected, missing="there is nothing to take a mean of")
    _, inverse = np.unique(np.asarray(unit), return_inverse=True)
    sums = np.stack([np.bincount(inverse, values), np.bincount(inverse)], axis=1)
    value = float(np.mean(values))
    found = resampled(quotient, sums, unit_draws(len(sums), n_samples=samples, seed=0))
    if found is None:
        few = f"no interval: {len(sums)} {of}; it needs {MINIMUM_UNITS} that are not all alike"
        return Measure("", n, value, null=expected, missing=few)
    return Measure("", n, value, *found, f"95 %, {of} resampled", null=expected)
