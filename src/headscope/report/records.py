"""Records of a report: claims with their numbers, and figures. Plain values; no torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from headscope.stats import Estimate, Measure

Kind = Literal["induction", "local context", "high-level context"]
Unit = Literal["", "share", "nats"]
"""A plain number, a share of 1 (shown in percent), or a loss."""

KINDS: tuple[Kind, ...] = ("induction", "local context", "high-level context")
"""The post's three deep dives, in its order."""


@dataclass(frozen=True)
class Claim:
    """One number of the post (Kissane et al., 2024), or a related one, and ours.

    Rows of several SAEs are shown side by side when `id`, `claim` and `kind` are equal: a feature's number belongs to
    `feature`, not to the wording of the claim.
    """

    id: str
    """`M2` ... `M31`: the method; several claims may share one."""
    claim: str
    """The claim, in our words."""
    definition: str
    """Definition of the number, in one line."""
    post: int | float | str | None = None
    """The number in the post; shares as a part of 1. None where it gives none."""
    ours: int | float | None = None
    n: int | None = None
    """Sample size; the definition states its unit."""
    interval: tuple[int | float, int | float] | None = None
    """95 % interval."""
    null: int | float | str | None = None
    """The same number under the null, or a substitute for it."""
    differs: str = ""
    """Differences from the post: model, corpus, rule."""
    unit: Unit = ""
    feature: int | None = None
    """The latent, for a claim about one."""
    kind: Kind | None = None
    """The kind of exemplar, for a claim about one."""
    missing: str | None = None
    """Reason why `ours` is None."""

    def __post_init__(self) -> None:
        """Convert NaN to None with its reason: a report contains no NaN."""
        if self.ours is not None and not math.isfinite(self.ours):
            object.__setattr__(self, "ours", None)
            object.__setattr__(self, "missing", self.missing or "it does not exist: a ratio of nothing")
        if self.ours is None and self.missing is None:
            raise ValueError(f"{self.id} {self.claim!r} has neither a number nor a reason why there is none")
        if self.interval is not None and not all(map(math.isfinite, self.interval)):
            object.__setattr__(self, "interval", None)
        if isinstance(self.null, float) and not math.isfinite(self.null):
            object.__setattr__(self, "null", None)

    def with_estimate(self, found: Estimate, n: int | None = None) -> "Claim":
        """Return the same claim with a number and its interval."""
        return replace(self, ours=found.value, interval=(found.low, found.high), n=n, missing=None)

    def with_measure(self, found: Measure) -> "Claim":
        """Return the same claim with a study's measure, including its n, null and definition."""
        differs = self.differs
        if found.value is not None and found.missing is not None:  # the reason for a number without an interval
            differs = "; ".join(part for part in (differs, found.missing) if part)
        bounds = None if found.low is None or found.high is None else (found.low, found.high)
        return replace(
            self,
            ours=found.value,
            n=found.n,
            interval=bounds,
            null=found.null.value if found.null is not None else self.null,
            definition=self.definition or found.definition,
            differs=differs,
            missing=found.missing if found.value is None else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the record for `report.json`; the key of the post's number is `seed`."""
        values = asdict(self)
        values["interval"] = None if self.interval is None else list(self.interval)
        values["seed"] = values.pop("post")
        order = ("id", "claim", "seed", "ours", "n", "interval", "null", "definition", "differs")
        return {name: values[name] for name in (*order, *(name for name in values if name not in order))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Claim":
        """Read the result of `as_dict`."""
        own: dict[str, Any] = dict(values)
        own["post"] = own.pop("seed")
        own["interval"] = None if own["interval"] is None else tuple(own["interval"])
        return cls(**own)


@dataclass(frozen=True)
class Figure:
    """A figure: series over the same places."""

    title: str
    drawn: Literal["bars", "stacked", "grouped", "lines"]
    """One bar per label; stacked bars; grouped bars; lines through points."""
    labels: tuple[str, ...]
    """Labels of the places: heads, tokens, thresholds, bins (lower edges)."""
    series: dict[str, tuple[int | float | None, ...]]
    """Series by name; one value per label."""
    definition: str
    x: str = ""
    y: str = ""
    log: bool = False
    """Whether the vertical axis is logarithmic; 0 is not drawn."""
    low: dict[str, tuple[int | float | None, ...]] = field(default_factory=dict)
    """Lower ends of intervals, for the series that have them."""
    high: dict[str, tuple[int | float | None, ...]] = field(default_factory=dict)
    feature: int | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        """Check that every series is as long as the labels, and of numbers or None."""
        for group in (self.series, self.low, self.high):
            for name, values in group.items():
                if len(values) != len(self.labels):
                    raise ValueError(f"{self.title}: {len(values)} values of {name} at {len(self.labels)} places")
                group[name] = tuple(None if v is None or not math.isfinite(v) else float(v) for v in values)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Figure":
        """Read the result of `as_dict`."""
        own: dict[str, Any] = dict(values)
        for name in ("series", "low", "high"):
            own[name] = {key: tuple(of) for key, of in own[name].items()}
        own["labels"] = tuple(own["labels"])
        return cls(**own)


@dataclass(frozen=True)
class Listing:
    """A small text table: false negatives, features of a head, edges of a circuit. Its cells are untrusted text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    definition: str
    feature: int | None = None
    kind: Kind | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Listing":
        """Read the result of `as_dict`."""
        own: dict[str, Any] = dict(values)
        own |= {"headings": tuple(own["headings"]), "rows": tuple(map(tuple, own["rows"]))}
        return cls(**own)


Finding = Claim | Figure | Listing


@dataclass(frozen=True)
class Exemplar:
    """The feature that represents a family."""

    kind: Kind
    latent: int
    proxy: str
    """Rule for where it should fire, in the syntax of `proxies.parse`."""
    pearson: float
    """Correlation of activation and proxy on the half of the documents that the proxy was not chosen on."""
    token: int
    """The token with the largest direct logit effect."""
    sources: tuple[int, ...]
    """Source tokens that the proxy names; if none, those with the largest share of DFA."""
    why: str
    """Reason for the choice."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Exemplar":
        """Read the result of `asdict`."""
        own: dict[str, Any] = dict(values)
        own["sources"] = tuple(own["sources"])
        return cls(**own)


@dataclass(frozen=True)
class Settings:
    """Sample sizes of the report; two presets, `QUICK` and `FULL`."""

    name: str
    corpus_tokens: int | None
    """Tokens of the corpus that are indexed; None is all of it."""
    search: int | None
    """Features whose proxies are searched for, largest share of the summed activation first; None is all live ones."""
    quality: int | None
    """Tokens of the corpus on which the SAE's quality is measured; None is all of it."""
    tokens: int
    """Active tokens of a feature at which it is ablated."""
    sequences: int
    """Blocks or synthetic sequences for head scores, head ablation and patching."""
    prompts: int
    """Dataset examples of an exemplar that are corrupted and patched."""
    features: int | None
    """Features of a family for tests that run the model; None is all."""
    samples: int = 1000
    """Resamples of documents."""
    seed: int = 0


QUICK = Settings("quick", 32_768, 60, 4_096, 100, 8, 3, 12, samples=200)
FULL = Settings("full", 524_288, None, 163_840, 3_000, 256, 16, None)


SectionFunction = Callable[..., tuple[Finding, ...]]
"""`(subject: Subject) -> (Claim | Figure | Listing, ...)`."""


@dataclass(frozen=True)
class Section:
    """A part of the report: runs on one SAE, is stored when it is done, and may fail without affecting the others."""

    name: str
    """Name of its file; lower-case letters, digits and underscores."""
    ids: tuple[str, ...]
    """The claims it covers; when it fails, each becomes a row with the reason."""
    question: str
    """Its question in one line, used as the text of these rows."""
    run: SectionFunction
    version: int = 1
    """Raised when the same subject gives another result: stored results are then recomputed."""
    kept: bool = True
    """Whether its results are reused by the next run; not for one that depends on people's labels."""
