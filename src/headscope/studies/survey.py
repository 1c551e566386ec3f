"""Survey of features: the share of alive and of interpretable ones in a sample, and annotator agreement.

The post (Kissane et al., 2024) inspected the first 50 features: 76 % alive, 82 % of those interpretable. Here a sample
is reproducible on any machine, and every share has its interval. No torch.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import Literal

import numpy as np
from jaxtyping import Int

from headscope.errors import LabelError
from headscope.index.labels import VERDICTS, Label, Labels, card_hash
from headscope.index.store import FeatureIndex
from headscope.sae.quality_table import Row
from headscope.stats import Estimate, wilson

N_STRATA = 5
MIN_PAIRS = 10
"""Minimum number of features that two annotators must both have judged for an interval of kappa."""

DEFINITIONS = {
    "alive": "Latents active on at least one token of the corpus; 95 % Wilson interval.",
    "interpretable": (
        "Live features of the sample judged interpretable, of all that the annotator judged; those judged unsure count "
        "as not. Each weighs as many live features as it stands for; 95 % Wilson interval at Kish's effective n."
    ),
    "decided": "The same without those judged unsure.",
    "agreement": "Features on which both gave the same verdict, of those that both judged; 95 % Wilson interval.",
    "chance": "Agreement of two who give their verdicts as often as these did, but at random: the null of agreement.",
    "kappa": (
        "Cohen's kappa, (agreement - chance) / (1 - chance), over the three verdicts; 0 is chance. 95 % percentile "
        "bootstrap over features."
    ),
}

Design = Literal["first", "random", "stratified"]

_NAME = re.compile(r"(first):([1-9]\d{0,8})|(random|stratified):([1-9]\d{0,8}):(\d{1,9})")


@dataclass(frozen=True)
class Sample:
    """Design of a sample of features; `Sample.parse(sample.name) == sample`."""

    design: Design
    """`first`: latents 0 to n - 1, including dead ones (the post's). `random`: a uniform sample of live features.
    `stratified`: live features from five equal ranges of log density, as many as each has, or an equal part."""
    n: int
    seed: int = 0
    """Unused with `first`."""

    @property
    def name(self) -> str:
        """`first:50`, `random:50:0`, `stratified:50:0`: design, n and seed."""
        return f"first:{self.n}" if self.design == "first" else f"{self.design}:{self.n}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Sample":
        """Parse a name.

        Raises:
            LabelError: it is invalid.
        """
        match = _NAME.fullmatch(text)
        if match is None or not text.isascii():
            raise LabelError(
                f"sample {text[:80]!a}",
                expected="first:N, random:N:SEED or stratified:N:SEED",
                do="write for example first:50, the post's",
            )
        if match[1]:
            return cls("first", int(match[2]))
        return cls("random" if match[3] == "random" else "stratified", int(match[4]), int(match[5]))


@dataclass(frozen=True)
class Stratum:
    """Live features of similar density, and their number in the sample."""

    low: float
    """Range of density; the first stratum includes its lower end, the others do not."""
    high: float
    population: int
    """Live features in the stratum."""
    latents: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """The sample of an index."""

    sample: Sample
    latents: tuple[int, ...]
    """In labelling order: any first part is a smaller sample of the same kind."""
    alive: tuple[bool, ...]
    """Whether each latent is alive."""
    strata: tuple[Stratum, ...]
    """A single stratum of all live features unless the design is stratified."""
    n_latents: int
    n_alive: int
    """Number in the whole dictionary."""
    definition: str

    @property
    def live(self) -> tuple[int, ...]:
        """The features to judge."""
        return tuple(latent for latent, alive in zip(self.latents, self.alive, strict=True) if alive)


def draw(index: FeatureIndex, sample: Sample) -> Drawn:
    """Draw a sample, reproducible on any machine.

    A random order is that of SHA-256("seed:latent"), so that a larger sample of the same seed holds the smaller.

    Raises:
        LabelError: the index has fewer features than requested.
    """
    density = index.table()["density"].to_numpy()
    live = np.flatnonzero(density > 0)
    most = len(density) if sample.design == "first" else len(live)
    if not 1 <= sample.n <= most:
        kind = "latents" if sample.design == "first" else "live features"
        raise LabelError(
            f"a sample of {sample.n:,}", expected=f"1 to {most:,}, the {kind} of the index", do="ask for fewer"
        )
    if sample.design == "first":
        latents = tuple(range(sample.n))
        strata = [_stratum(density, live, [latent for latent in latents if density[latent] > 0])]
        what = f"latents 0 to {sample.n - 1}, dead ones included (the post's design); dead ones are not judged"
    elif sample.design == "random":
        latents = tuple(_shuffled(live, sample.seed)[: sample.n])
        strata = [_stratum(density, live, latents)]
        what = f"{sample.n:,} of the live features, drawn evenly without replacement, seed {sample.seed}"
    else:
        strata = _strata(density, live, sample)
        latents = tuple(i for turn in zip_longest(*(s.latents for s in strata)) for i in turn if i is not None)
        what = (
            f"{sample.n:,} of the live features, as evenly as they are there from {len(strata)} equal ranges of the "
            f"logarithm of density, seed {sample.seed}; each range weighs as many live features as it has"
        )
    return Drawn(
        sample=sample,
        latents=latents,
        alive=tuple(bool(density[latent] > 0) for latent in latents),
        strata=tuple(strata),
        n_latents=len(density),
        n_alive=len(live),
        definition=what,
    )


def _shuffled(latents: np.ndarray, seed: int) -> list[int]:
    """Shuffle without depending on any library's generator."""
    return sorted(latents.tolist(), key=lambda latent: hashlib.sha256(f"{seed}:{latent}".encode()).digest())


def _stratum(density: np.ndarray, members: np.ndarray, latents: Sequence[int]) -> Stratum:
    own = density[members]
    low, high = (float(own.min()), float(own.max())) if len(own) else (0.0, 0.0)
    return Stratum(low, high, len(members), tuple(latents))


def _strata(density: np.ndarray, live: np.ndarray, sample: Sample) -> list[Stratum]:
    """Return the ranges of density that have features, and the sample's share of each."""
    logs = np.log(density[live])
    edges = np.linspace(logs.min(), logs.max(), N_STRATA + 1)
    number = np.clip(np.searchsorted(edges, logs, side="left") - 1, 0, N_STRATA - 1)
    members = [live[number == k] for k in range(N_STRATA)]
    kept = [own for own in members if len(own)]
    return [
        _stratum(density, own, _shuffled(own, sample.seed)[:n])
        for own, n in zip(kept, _shares([len(own) for own in kept], sample.n), strict=True)
    ]


def _shares(sizes: Sequence[int], n: int) -> list[int]:
    """Distribute n one by one, in turn, over strata with features left, the densest first."""
    given = [0] * len(sizes)
    while n:
        for k in reversed(range(len(sizes))):
            if n and given[k] < sizes[k]:
                given[k] += 1
                n -= 1
    return given


# ------------------------------------------------------------------------------------------------------------- results
@dataclass(frozen=True)
class Tally:
    """Results of one annotator on a sample."""

    annotator: str
    n: int
    """Live features judged, by labels that are not stale."""
    n_blind: int
    """Number of these judged blind."""
    n_stale: int
    """Labels not counted because the card has changed since."""
    counts: dict[str, int]
    """By verdict."""
    n_by_stratum: tuple[int, ...]
    interpretable: Estimate
    """NaN where nothing is judged."""
    decided: Estimate
    """The same without those judged unsure."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of two annotators."""

    annotators: tuple[str, str]
    n: int
    """Features of the sample that both judged."""
    table: Int[np.ndarray, "first second"]
    """Counts by the verdict of the first and of the second, in the order of `VERDICTS`."""
    agreement: Estimate
    chance: float
    kappa: Estimate | None
    """None where undefined (all verdicts equal). With fewer than `MIN_PAIRS` features its interval is the whole range.
    """


@dataclass(frozen=True)
class Survey:
    """A sample and its labels; `DEFINITIONS` defines the figures."""

    drawn: Drawn
    alive: Estimate | None
    """Share in the sample; None where only live features were drawn."""
    tallies: tuple[Tally, ...]
    """By annotator who judged anything in the sample, sorted by name."""
    agreements: tuple[Agreement, ...]
    """By pair of annotators with a jointly judged feature."""
    notes: tuple[str, ...]
    """Caveats."""

    def rows(self) -> list[Row]:
        """Return the figures as a printed table, next to the post's for gelu-2l layer 1, with its counts' intervals."""
        drawn = self.drawn
        share = drawn.n_alive / drawn.n_latents
        everywhere = f"{drawn.n_alive:,} of {drawn.n_latents:,} ({100 * share:.1f} %)"
        rows = [Row("alive in the dictionary", everywhere, "", "Counted, not estimated.")]
        if self.alive is not None:
            value = f"{_percent(self.alive)}, {len(drawn.live):,} of {drawn.sample.n:,}"
            rows.append(Row("alive in the sample", value, _percent(wilson(38, 50)), DEFINITIONS["alive"]))
        for tally in self.tallies:
            yes = tally.counts["interpretable"]
            counts = ", ".join(f"{n:,} {verdict}" for verdict, n in tally.counts.items())
            rows += [
                Row(
                    f"interpretable, {tally.annotator}",
                    f"{_percent(tally.interpretable)}, {yes:,} of {tally.n:,}",
                    _percent(wilson(31, 38)),
                    DEFINITIONS["interpretable"],
                ),
                Row(f"without unsure, {tally.annotator}", _percent(tally.decided), "", DEFINITIONS["decided"]),
                Row(f"verdicts, {tally.annotator}", f"{counts}; {tally.n_blind:,} blind", "", "Labels that count."),
            ]
        for pair in self.agreements:
            who = " and ".join(pair.annotators)
            kappa = (
                "all verdicts alike: there is none" if pair.kappa is None else f"{pair.kappa.value:.2f} {_kappa(pair)}"
            )
            both = f"{_percent(pair.agreement)}, {int(np.trace(pair.table)):,} of {pair.n:,}"
            rows += [
                Row(f"agreement, {who}", both, "", DEFINITIONS["agreement"]),
                Row(f"by chance, {who}", f"{100 * pair.chance:.1f} %", "", DEFINITIONS["chance"]),
                Row(f"kappa, {who}", kappa, "", DEFINITIONS["kappa"]),
            ]
        return rows


def survey(index: FeatureIndex, labels: Labels, sample: Sample) -> Survey:
    """Tally the labels of a sample, from any queue; the latest of each annotator counts.

    Raises:
        LabelError: the index has fewer features than the sample.
    """
    drawn = draw(index, sample)
    live = set(drawn.live)
    current: dict[str, dict[int, Label]] = {}
    stale: dict[str, int] = {}
    for (annotator, latent), label in labels.latest().items():
        if latent not in live:
            continue
        own = current.setdefault(annotator, {})
        if _is_stale(index, label):
            stale[annotator] = stale.get(annotator, 0) + 1
        else:
            own[latent] = label
    tallies = tuple(_tally(name, current[name], stale.get(name, 0), drawn.strata) for name in sorted(current))
    pairs = [
        _agreement((first, second), [(current[first][i].verdict, current[second][i].verdict) for i in both])
        for first, second in combinations(sorted(current), 2)
        if (both := sorted(current[first].keys() & current[second].keys()))
    ]
    alive = wilson(len(live), sample.n) if sample.design == "first" else None
    return Survey(drawn, alive, tallies, tuple(pairs), tuple(_notes(drawn, tallies, labels)))


def _is_stale(index: FeatureIndex, label: Label) -> bool:
    """Whether the card has changed since it was labelled."""
    return card_hash(index, label.latent, blind=label.blind) != label.card


def _tally(annotator: str, labels: dict[int, Label], n_stale: int, strata: Sequence[Stratum]) -> Tally:
    verdicts = {latent: label.verdict for latent, label in labels.items()}
    decided = {latent: verdict for latent, verdict in verdicts.items() if verdict != "unsure"}
    return Tally(
        annotator=annotator,
        n=len(labels),
        n_blind=sum(label.blind for label in labels.values()),
        n_stale=n_stale,
        counts={verdict: sum(own == verdict for own in verdicts.values()) for verdict in VERDICTS},
        n_by_stratum=tuple(sum(latent in verdicts for latent in stratum.latents) for stratum in strata),
        interpretable=_weighted(verdicts, strata),
        decided=_weighted(decided, strata),
    )


def _weighted(verdicts: dict[int, str], strata: Sequence[Stratum]) -> Estimate:
    """Estimate the share of interpretable features, each judged one with weight population / judged of its stratum.

    The interval is Wilson's at the effective n, (sum w)^2 / sum w^2 (Kish 1965): n itself where all weigh the same. It
    ignores the gain from stratification, and so is conservative.
    """
    weight, yes = [], []
    for stratum in strata:
        judged = [verdicts[latent] for latent in stratum.latents if latent in verdicts]
        weight += [stratum.population / max(1, len(judged))] * len(judged)
        yes += [verdict == "interpretable" for verdict in judged]
    if not weight:
        return wilson(0, 0)
    w = np.array(weight)
    p, n = float(w @ np.array(yes) / w.sum()), float(w.sum() ** 2 / (w**2).sum())
    return wilson(p * n, n)


def _agreement(annotators: tuple[str, str], verdicts: Sequence[tuple[str, str]]) -> Agreement:
    pairs = np.array([[VERDICTS.index(verdict) for verdict in pair] for pair in verdicts])
    table = _table(pairs)
    value = cohens_kappa(table)
    return Agreement(
        annotators=annotators,
        n=len(pairs),
        table=table,
        agreement=wilson(int(np.trace(table)), len(pairs)),
        chance=_chance(table),
        kappa=None if value is None else _bootstrapped(pairs, value),
    )


def _table(pairs: Int[np.ndarray, "feature annotator"]) -> Int[np.ndarray, "first second"]:
    size = len(VERDICTS)
    return np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size).reshape(size, size)


def _chance(table: Int[np.ndarray, "first second"]) -> float:
    return float(table.sum(1) @ table.sum(0)) / float(table.sum()) ** 2


def cohens_kappa(table: Int[np.ndarray, "first second"]) -> float | None:
    """Compute (agreement - chance) / (1 - chance) of a table of counts (Cohen 1960); None where both are constant."""
    n = int(table.sum())
    expected = int(table.sum(1) @ table.sum(0))  # n^2 times the agreement by chance: integers, no rounding
    if expected == n * n:
        return None
    return (n * int(np.trace(table)) - expected) / (n * n - expected)


def _bootstrapped(
    pairs: Int[np.ndarray, "feature annotator"], value: float, *, n_samples: int = 2000, seed: int = 0
) -> Estimate:
    """Compute kappa with a bootstrap percentile interval over features; draws where it is undefined are skipped."""
    if len(pairs) < MIN_PAIRS:
        return Estimate(value, -1.0, 1.0)
    rng = np.random.default_rng(seed)
    drawn = [cohens_kappa(_table(pairs[rng.integers(0, len(pairs), len(pairs))])) for _ in range(n_samples)]
    low, high = np.percentile([kappa for kappa in drawn if kappa is not None], [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _notes(drawn: Drawn, tallies: Sequence[Tally], labels: Labels) -> Iterator[str]:
    n, population = len(drawn.live), drawn.n_alive
    if 1 < n < population:
        factor = ((population - n) / (population - 1)) ** 0.5
        yield (
            f"Intervals are for a population without end; {n:,} of {population:,} live features without replacement "
            f"have one {factor:.3f} times as wide."
        )
    elif n == population:
        yield "All live features are in the sample: what is left to chance is only the annotator's judgement."
    if drawn.sample.design == "first":
        yield "The first latents are as good as drawn at random where an SAE's latents are in no order."
    for tally in tallies:
        if tally.n < n:
            yield (
                f"{tally.annotator} judged {tally.n:,} of {n:,} live features; the share takes the rest as like them."
            )
        if tally.n_stale:
            yield f"{tally.annotator}: {tally.n_stale:,} stale labels are not counted: their cards have changed."
        empty = sum(not judged and bool(s.latents) for judged, s in zip(tally.n_by_stratum, drawn.strata, strict=True))
        if tally.n and empty:
            yield f"{tally.annotator} judged none of {empty} density ranges; the share leaves them out."
    if labels.torn:
        yield labels.torn


# --------------------------------------------------------------------------------------------------------------- table
def _percent(share: Estimate) -> str:
    """Format `81.6 % [66.6, 90.8]`; a dash where nothing was judged."""
    if np.isnan(share.value):
        return "-"
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _kappa(pair: Agreement) -> str:
    if pair.n < MIN_PAIRS or pair.kappa is None:
        return f"(no interval below {MIN_PAIRS} features)"
    return f"[{pair.kappa.low:.2f}, {pair.kappa.high:.2f}]"
