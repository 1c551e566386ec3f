"""What a report says: claims with their numbers, and what is drawn beside them. Plain values; no torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from headscope.stats import Estimate, Measure

Kind = Literal["induction", "local context", "high-level context"]
Unit = Literal["", "share", "nats"]
"""A plain number, a part of 1 (shown in percent), or a loss."""

KINDS: tuple[Kind, ...] = ("induction", "local context", "high-level context")
"""The post's three deep dives, in its order."""


@dataclass(frozen=True)
class Claim:
    """One number of the post (Kissane et al., 2024), or one that it needs beside it, and ours.

    Rows of several SAEs stand side by side when `id`, `claim` and `kind` are equal: a feature's number belongs to
    `feature`, not to the words of the claim.
    """

    id: str
    """`M2` ... `M31`: the method; several claims may share one."""
    claim: str
    """What is said, in our words."""
    definition: str
    """How the number is made, in one line."""
    post: int | float | str | None = None
    """The number in the post; a share is a part of 1. None where it gives none."""
    ours: int | float | None = None
    n: int | None = None
    """What it is a number of; the definition says of which things."""
    interval: tuple[int | float, int | float] | None = None
    """95 %."""
    null: int | float | str | None = None
    """The same number where there is nothing to find, or what stands for it."""
    differs: str = ""
    """What differs from the post: model, corpus, rule."""
    unit: Unit = ""
    feature: int | None = None
    """The latent, for a claim about one."""
    kind: Kind | None = None
    """Which exemplar it is, for a claim about one."""
    missing: str | None = None
    """Why `ours` is None."""

    def __post_init__(self) -> None:
        """Turn what is no number into None with its reason: a report holds no NaN."""
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
        """The same claim with a number and its interval."""
        return replace(self, ours=found.value, interval=(found.low, found.high), n=n, missing=None)

    def with_measure(self, found: Measure) -> "Claim":
        """The same claim with what a study measured: its n, null and definition too."""
        differs = self.differs
        if found.value is not None and found.missing is not None:  # why there is a number and no interval
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
        """For `report.json`; the key of the post's number is `seed`."""
        values = asdict(self)
        values["interval"] = None if self.interval is None else list(self.interval)
        values["seed"] = values.pop("post")
        order = ("id", "claim", "seed", "ours", "n", "interval", "null", "definition", "differs")
        return {name: values[name] for name in (*order, *(name for name in values if name not in order))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Claim":
        """The inverse of `as_dict`."""
        own: dict[str, Any] = dict(values)
        own["post"] = own.pop("seed")
        own["interval"] = None if own["interval"] is None else tuple(own["interval"])
        return cls(**own)


@dataclass(frozen=True)
class Figure:
    """Something to draw: series over the same places."""

    title: str
    drawn: Literal["bars", "stacked", "grouped", "lines"]
    """One bar a label; bars on one another; bars side by side; lines through points."""
    labels: tuple[str, ...]
    """Of the places: heads, tokens, thresholds, bins (lower edges)."""
    series: dict[str, tuple[int | float | None, ...]]
    """By name; one value a label."""
    definition: str
    x: str = ""
    y: str = ""
    log: bool = False
    """The vertical axis is logarithmic; 0 is drawn as nothing."""
    low: dict[str, tuple[int | float | None, ...]] = field(default_factory=dict)
    """Lower ends of intervals, of the series that have them."""
    high: dict[str, tuple[int | float | None, ...]] = field(default_factory=dict)
    feature: int | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        """Make every series as long as the labels, and of numbers or None."""
        for group in (self.series, self.low, self.high):
            for name, values in group.items():
                if len(values) != len(self.labels):
                    raise ValueError(f"{self.title}: {len(values)} values of {name} at {len(self.labels)} places")
                group[name] = tuple(None if v is None or not math.isfinite(v) else float(v) for v in values)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Figure":
        """The inverse of `as_dict`."""
        own: dict[str, Any] = dict(values)
        for name in ("series", "low", "high"):
            own[name] = {key: tuple(of) for key, of in own[name].items()}
        own["labels"] = tuple(own["labels"])
        return cls(**own)


@dataclass(frozen=True)
class Listing:
    """A small table in words: false negatives, features of a head, edges of a circuit. Its cells are untrusted text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    definition: str
    feature: int | None = None
    kind: Kind | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Listing":
        """The inverse of `as_dict`."""
        own: dict[str, Any] = dict(values)
        own |= {"headings": tuple(own["headings"]), "rows": tuple(map(tuple, own["rows"]))}
        return cls(**own)


Finding = Claim | Figure | Listing


@dataclass(frozen=True)
class Exemplar:
    """The feature that stands for a family."""

    kind: Kind
    latent: int
    proxy: str
    """When it should fire, as `proxies.parse` reads it."""
    pearson: float
    """Of the activation and the proxy on the half of the documents that the proxy was not chosen on."""
    token: int
    """The token with the largest direct logit effect."""
    sources: tuple[int, ...]
    """Source tokens that the proxy names; with none, those with the largest share of DFA."""
    why: str
    """How it was chosen."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Exemplar":
        """The inverse of `asdict`."""
        own: dict[str, Any] = dict(values)
        own["sources"] = tuple(own["sources"])
        return cls(**own)


@dataclass(frozen=True)
class Settings:
    """How much is looked at; two presets, `QUICK` and `FULL`."""

    name: str
    corpus_tokens: int | None
    """Of the corpus that is indexed; None is all of it."""
    search: int | None
    """Features whose proxies are searched for, largest share of the summed activation first; None is all live ones."""
    quality: int | None
    """Tokens of the corpus on which the SAE's quality is measured; None is all of it."""
    tokens: int
    """Active tokens of a feature at which it is ablated."""
    sequences: int
    """Blocks or made-up sequences that head scores, head ablation and patching run over."""
    prompts: int
    """Dataset examples of an exemplar that are corrupted and patched."""
    features: int | None
    """Features of a family that a test with runs of the model looks at; None is all."""
    samples: int = 1000
    """Resamples of documents."""
    seed: int = 0


QUICK = Settings("quick", 32_768, 60, 4_096, 100, 8, 3, 12, samples=200)
FULL = Settings("full", 524_288, None, 163_840, 3_000, 256, 16, None)


SectionFunction = Callable[..., tuple[Finding, ...]]
"""`(subject: Subject) -> (Claim | Figure | Listing, ...)`."""


@dataclass(frozen=True)
class Section:
    """A part of the report: runs on one SAE, is kept when it is done, and may fail without the others."""

    name: str
    """Of its file; lower-case letters, digits and underscores."""
    ids: tuple[str, ...]
    """The claims it is asked for; when it fails, each becomes a row with the reason."""
    question: str
    """In one line; the words of these rows."""
    run: SectionFunction
    version: int = 1
    """Raised when the same subject gives another result: what was kept is then made again."""
    kept: bool = True
    """Whether what it finds stands for the next run too; not for one that reads what people write."""
