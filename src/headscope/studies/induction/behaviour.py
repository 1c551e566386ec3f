"""Induction features by the post's rules, from an index alone: selection, behaviour, control groups. No torch.

A feature is selected when its decoder has most of its weight in an induction head. Its behaviour is tested on bigrams:
B is the token whose logit it raises most, and in a block with the bigrams A B ... A B it should be off at the first A
and on at later ones. The post does not specify the counting, so all definitions are counted at once (`Reading`), and
each is a property of the same record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.stats import MINIMUM, Estimate, Measure, Ranking, clustered_auc, wilson
from headscope.studies.support.active import Text, drawn

Unit = Literal["token", "bigram", "block"]
"""Unit of a rate: single A's, groups of equal bigrams of a block, or blocks with all their groups."""
First = Literal["ignored", "fails", "void"]
"""Treatment of groups with the feature on at the first A: ignore that; count the group's later A's as failed; or
exclude the group."""
Expected = Literal["before B", "every A"]
"""Later A's at which it should be on: those followed by B, or all of them."""

SELECTED = 0.6
"""Minimum decoder share of the induction head in the post."""
CONTROL = 0.1
"""Maximum decoder share in its control group (exclusive)."""
PASS = 0.6
"""A feature passes above this rate."""
_WEIGHTS = ("decoder", "decoder_out", "encoder", "encoder_in", "dfa")
_COUNTS = ("n", "on", "first off", "on, first off")


@dataclass(frozen=True)
class Reading:
    """Definition of the post's pass rate; the default is the strictest that keeps its token-level rate."""

    unit: Unit = "token"
    first: First = "fails"
    expected: Expected = "before B"

    @classmethod
    def all(cls) -> "tuple[Reading, ...]":
        """Return all 18."""
        return tuple(cls(*of) for of in product(get_args(Unit), get_args(First), get_args(Expected)))


# ---------------------------------------------------------------------------------------------------------- selection
def selected(
    index: FeatureIndex, head: int, *, threshold: float = SELECTED, share: str = "decoder"
) -> Int[np.ndarray, " n"]:
    """Return live latents with at least this share in a head: the post's Induction Selection Heuristic.

    Args:
        index: open.
        head: for example the induction head.
        threshold: minimum share.
        share: one of `records.Shares`: `decoder`, the post's, `decoder_out`, `encoder`, `encoder_in` or `dfa`.

    Raises:
        StudyError: no such head or share.
    """
    return np.flatnonzero(_live(index) & (head_share(index, head, share) >= threshold))


def head_share(index: FeatureIndex, head: int, share: str = "decoder") -> Float[np.ndarray, " latent"]:
    """Return the share of one head in each latent; NaN where undefined.

    Raises:
        StudyError: no such head or share.
    """
    if share not in _WEIGHTS:
        raise StudyError(f"share {share!r}", expected=f"one of {', '.join(_WEIGHTS)}", do="name one of these")
    if not 0 <= head < index.n_heads:
        raise StudyError(f"head {head}", expected=f"0 to {index.n_heads - 1}", do="name another head")
    return index.shares[share][:, head]


def _live(index: FeatureIndex) -> Bool[np.ndarray, " latent"]:
    return index.table()["n_active"].to_numpy() > 0


def targets(index: FeatureIndex) -> Int[np.ndarray, " latent"]:
    """Return B of each latent: the token whose logit it raises most."""
    return index.table()["top_logit"].to_numpy()


def control_group(
    index: FeatureIndex,
    head: int,
    like: Int[np.ndarray, " n"] | None = None,
    *,
    n: int = 500,
    below: float = CONTROL,
    seed: int = 0,
) -> Int[np.ndarray, " m"]:
    """Return live latents in which the head has a decoder share below `below`.

    Args:
        index: open.
        head: the induction head.
        like: features to match one to one, without replacement, by the logarithms of density and of the frequency of B
            in the text (nearest in units of their standard deviations). Default: a uniform sample of n, as in the post.
        n: their number, without `like`.
        below: maximum share (exclusive).
        seed: seed of the sample, or of the matching order.

    Raises:
        StudyError: no such head, or too few such features to match.
    """
    pool = np.flatnonzero(_live(index) & (head_share(index, head) < below))
    if like is None:
        return pool[drawn(len(pool), n, (seed,))]
    if len(pool) < len(like):
        raise StudyError(
            f"{len(pool)} features with a share below {below:g}", expected=f"at least {len(like)}", do="raise `below`"
        )
    text = Text.of(index)
    counts = np.bincount(text.tokens[text.is_text], minlength=index.manifest["model"]["d_vocab"])
    n_active = index.table()["n_active"].to_numpy()
    points = np.log(np.stack([np.maximum(n_active, 1), counts[targets(index)] + 1.0], axis=1))
    points = (points - points[pool].mean(0)) / np.maximum(points[pool].std(0), 1e-12)
    left, found = np.ones(len(pool), dtype=bool), []
    for latent in np.random.default_rng(seed).permutation(like):
        distance = np.where(left, ((points[pool] - points[latent]) ** 2).sum(1), np.inf)
        nearest = int(np.argmin(distance))
        left[nearest] = False
        found.append(pool[nearest])
    return np.sort(np.array(found, dtype=np.int64))


# ----------------------------------------------------------------------------------------------------------- bigrams
@dataclass(frozen=True)
class Bigrams:
    """The bigrams A B of one B in some blocks: groups of equal A in a block, and the later A's of each.

    A and B are adjacent text tokens in a block. Positions are of the corpus.
    """

    token: int
    """B."""
    blocks: Int[np.ndarray, " block"]
    """Sampled blocks, ascending; some may hold no repeated bigram."""
    first: Int[np.ndarray, " group"]
    """Position of the first A of each group."""
    later: Int[np.ndarray, " later"]
    """Later A's, followed by any token."""
    group: Int[np.ndarray, " later"]
    """Group of each later A."""
    before_b: Bool[np.ndarray, " later"]
    """Whether B follows it."""


class BigramFinder:
    """Finds the bigrams of any B in a text."""

    def __init__(self, text: Text) -> None:
        """Sort the text; uses 24 bytes per token."""
        self.tokens = text.text_tokens.reshape(-1)
        self.size = text.tokens.shape[1]
        self._precedes = text.counted.reshape(-1)  # text before text: the A's there are
        self._order = np.argsort(self.tokens, kind="stable").astype(np.int64)
        self._starts = np.searchsorted(self.tokens[self._order], np.arange(int(self.tokens.max()) + 2))
        self._keys = self.tokens[self._order].astype(np.int64) * len(self.tokens) + self._order  # ascending

    def at(self, token: int) -> Int[np.ndarray, " n"]:
        """Return all positions of a token."""
        if not 0 <= token < len(self._starts) - 1:
            return self._order[:0]
        return self._order[self._starts[token] : self._starts[token + 1]]

    def of(self, token: int, *, most: int | None = 200, seed: int = 0) -> Bigrams:
        """Return the bigrams that end with a token, in a uniform sample of at most `most` blocks that contain it."""
        before = self.at(token) - 1
        before = before[before >= 0]
        before = before[self._precedes[before]]
        holding = np.unique(before // self.size)
        blocks = holding[drawn(len(holding), most, (seed, token))]
        before = before[np.isin(before // self.size, blocks)]
        a, block = self.tokens[before], before // self.size
        order = np.lexsort((before, a, block))
        new = np.append(True, (np.diff(block[order]) != 0) | (np.diff(a[order]) != 0))[: len(order)]
        first = before[order][new]
        later, group = self._later(first)
        return Bigrams(token, blocks, first, later, group, np.isin(later, before))

    def _later(self, first: Int[np.ndarray, " group"]) -> tuple[Int[np.ndarray, " later"], Int[np.ndarray, " later"]]:
        """Return positions of each first A's token after it in its block."""
        token, end = self.tokens[first].astype(np.int64) * len(self.tokens), (first // self.size + 1) * self.size
        low, high = np.searchsorted(self._keys, token + first, side="right"), np.searchsorted(self._keys, token + end)
        n = high - low
        inside = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        return self._order[np.repeat(low, n) + inside], np.repeat(np.arange(len(first)), n)


# --------------------------------------------------------------------------------------------------------- behaviour
@dataclass(frozen=True)
class Behaviour:
    """Activation rates of some features where induction of their token predicts them, by all definitions."""

    latents: Int[np.ndarray, " latent"]
    token: Int[np.ndarray, " latent"]
    """B."""
    n_blocks: Int[np.ndarray, " latent"]
    """Blocks with a bigram that ends with B."""
    counts: Int[np.ndarray, "latent expected unit count"]
    """By `Expected` and `Unit`: expected ones; of these on; with the first A off; both."""
    first: Int[np.ndarray, "latent 2"]
    """First A's, and those at which the feature is on: its base rate."""
    definition: str = (
        "share of what a reading expects to be on that is: later A's of groups A B ... A B of a block, with B the "
        "token whose logit the feature raises most"
    )

    def rate(self, reading: Reading | None = None) -> Float[np.ndarray, " latent"]:
        """Return the pass rate of each feature; NaN where nothing is expected."""
        on, n = self._of(reading or Reading())
        with np.errstate(invalid="ignore"):
            return on / n

    def n_expected(self, reading: Reading | None = None) -> Int[np.ndarray, " latent"]:
        """Return the denominators of the rates."""
        return self._of(reading or Reading())[1]

    def estimate(self, latent: int, reading: Reading | None = None) -> Estimate:
        """Return the pass rate of one of the features, Wilson 95 %."""
        (row,) = np.flatnonzero(self.latents == latent)[:1]
        on, n = self._of(reading or Reading())
        return wilson(int(on[row]), int(n[row]))

    def passes(
        self, reading: Reading | None = None, *, above: float = PASS, least: int = 1
    ) -> Bool[np.ndarray, " latent"]:
        """Return whether each feature passes: its rate is above a bound, over at least `least` cases."""
        on, n = self._of(reading or Reading())
        return (n >= least) & (on > above * n)

    def passing(
        self, reading: Reading | None = None, *, above: float = PASS, least: int = 1, null: "Behaviour | None" = None
    ) -> Measure:
        """Return the share of the features that pass, Wilson 95 %; the null is that of a control group.

        Features without expected activations count as not passing, as in the post.
        """
        passes = self.passes(reading, above=above, least=least)
        control = None if null is None else null.passes(reading, above=above, least=least)
        compared = None if control is None else wilson(int(control.sum()), len(control))
        definition = f"share of the features whose pass rate is above {above:g}"
        if len(passes) < MINIMUM:
            missing = f"{len(passes)} features; at least {MINIMUM} are needed"
            return Measure(definition, len(passes), null=compared, missing=missing)
        found = wilson(int(passes.sum()), len(passes))
        return Measure(definition, len(passes), found.value, found.low, found.high, "Wilson 95 %", null=compared)

    def _of(self, reading: Reading) -> tuple[Int[np.ndarray, " latent"], Int[np.ndarray, " latent"]]:
        unit, expected = get_args(Unit).index(reading.unit), get_args(Expected).index(reading.expected)
        n, on, first_off, both = self.counts[:, expected, unit].T
        return {"ignored": (on, n), "fails": (both, n), "void": (both, first_off)}[reading.first]


def behaviour(
    index: FeatureIndex,
    latents: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    *,
    tokens: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    n_blocks: int | None = 200,
    seed: int = 0,
    finder: BigramFinder | None = None,
) -> Behaviour:
    """Test the post's Induction Behavior Heuristic on the tokens of the index.

    Args:
        index: open.
        latents: the features; default: all live ones.
        tokens: B of each, instead of its top logit: another feature's, for a null.
        n_blocks: maximum number of blocks that contain B, sampled uniformly (the post's 200); None: all.
        seed: seed of the sample.
        finder: finder of the index's text, if available.

    Raises:
        IndexFormatError: no such latent.
        StudyError: different numbers of tokens and latents.
    """
    chosen = np.flatnonzero(_live(index)) if latents is None else np.asarray(latents, dtype=np.int64)
    for latent in chosen.tolist():
        index.check_latent(latent)
    b = targets(index)[chosen] if tokens is None else np.asarray(tokens, dtype=np.int64)
    if b.shape != chosen.shape:
        raise StudyError(f"{len(b)} tokens", expected=f"{len(chosen)}, one a feature", do="pass one for each")
    finder = finder or BigramFinder(Text.of(index))
    rows: dict[int, list[int]] = {}
    for row, latent in enumerate(chosen.tolist()):
        rows.setdefault(latent, []).append(row)
    counts = np.zeros((len(chosen), len(get_args(Expected)), len(get_args(Unit)), len(_COUNTS)), np.int64)
    first, n_held = np.zeros((len(chosen), 2), np.int64), np.zeros(len(chosen), np.int64)
    held = _Cache(finder, n_blocks, seed)
    on = np.zeros(len(finder.tokens), dtype=bool)
    whole = len(rows) > index.n_latents // 4  # then in order, each part of the index read once
    read = index.each_latent() if whole else ((latent, index.activations(latent)) for latent in rows)
    for latent, active in read:
        if latent not in rows:
            continue
        on[active.position] = True
        for row in rows[latent]:
            found = held.of(int(b[row]))
            counts[row] = _counted(found, on, finder.size)
            first[row] = len(found.first), on[found.first].sum()
            n_held[row] = len(found.blocks)
        on[active.position] = False
    return Behaviour(chosen, b, n_held, counts, first)


@dataclass
class _Cache:
    """Cached bigrams of tokens: many features share a B."""

    finder: BigramFinder
    most: int | None
    seed: int
    held: dict[int, Bigrams] = field(default_factory=dict)

    def of(self, token: int) -> Bigrams:
        if token not in self.held:
            self.held[token] = self.finder.of(token, most=self.most, seed=self.seed)
        return self.held[token]


def _counted(bigrams: Bigrams, on: Bool[np.ndarray, " position"], size: int) -> Int[np.ndarray, "expected unit count"]:
    first_off, is_on = ~on[bigrams.first], on[bigrams.later]
    _, block_of_group = np.unique(bigrams.first // size, return_inverse=True)
    counts = []
    for kept in (bigrams.before_b, np.ones_like(bigrams.before_b)):
        group, on_later = bigrams.group[kept], is_on[kept]
        n_groups = len(bigrams.first)
        expected = np.bincount(group, minlength=n_groups) > 0
        all_on = np.bincount(group, ~on_later, minlength=n_groups) == 0
        of_block = block_of_group[expected]
        n_of_blocks = int(block_of_group.max(initial=-1)) + 1
        holds = np.bincount(of_block, minlength=n_of_blocks) > 0
        every_on, every_off = (
            np.bincount(of_block, ~values[expected], minlength=n_of_blocks)[holds] == 0
            for values in (all_on, first_off)
        )
        units = ((on_later, first_off[group]), (all_on[expected], first_off[expected]), (every_on, every_off))
        counts.append([[len(a), int(a.sum()), int(b.sum()), int((a & b).sum())] for a, b in units])
    return np.array(counts, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- one rule, another
@dataclass(frozen=True)
class RuleComparison:
    """Comparison of a score of features with a verdict on them: the post's share against another method's result."""

    definition: str
    n: int
    """Features."""
    n_true: int
    """Features with the verdict: n_true / n is the base rate."""
    threshold: Float[np.ndarray, " point"]
    """Descending; at each, features with at least this score are chosen."""
    true_rate: Float[np.ndarray, " point"]
    """Share chosen of the features with the verdict."""
    false_rate: Float[np.ndarray, " point"]
    """Share chosen of those without it."""
    auc: Measure
    at: float
    """The rule's own threshold, and there: chosen ones with the verdict, and those with it that are chosen."""
    precision: Measure
    recall: Measure


def compare_rule(
    score: Float[np.ndarray, " n"],
    verdict: Bool[np.ndarray, " n"],
    *,
    at: float = SELECTED,
    definition: str = "decoder share of one head against the composite verdict",
) -> RuleComparison:
    """Compute ROC curve, AUC (0.5 by chance), and precision and recall at the rule's own threshold.

    The null of precision is the base rate of the verdict; that of recall the share of all features that are chosen.
    Features are the units of the interval of the AUC (DeLong, as the case of `clustered_auc` with one member per unit).

    Raises:
        StudyError: arrays of different sizes, or NaN scores.
    """
    if score.shape != verdict.shape or np.isnan(score).any():
        raise StudyError(
            f"{len(score)} scores, {int(np.isnan(score).sum())} of them NaN, and {len(verdict)} verdicts",
            expected="a score for each verdict",
            do="leave out features without a score",
        )
    order = np.argsort(-score, kind="stable")
    truth, n, n_true = verdict[order], len(score), int(verdict.sum())
    ranking = Ranking.of(score[order].astype(np.float64), truth, 0, 0)
    true, false = ranking.true, ranking.n - ranking.true
    chosen = score >= at
    both, n_chosen = int((chosen & verdict).sum()), int(chosen.sum())
    return RuleComparison(
        definition,
        n,
        n_true,
        ranking.threshold,
        true / max(n_true, 1),
        false / max(n - n_true, 1),
        _auc(ranking, truth, n_true),
        at,
        _share("of the chosen features, the share with the verdict", both, n_chosen, _range(n_true, n)),
        _share("of the features with the verdict, the share chosen", both, n_true, _range(n_chosen, n)),
    )


def _auc(ranking: Ranking, truth: Bool[np.ndarray, " n"], n_true: int) -> Measure:
    definition, n = "P(score of one with the verdict > that of one without) + P(equal) / 2", len(truth)
    if n_true == 0 or n_true == n:
        return Measure(
            definition, n, missing=f"{n_true} of {n} features have the verdict: there is nothing to tell apart"
        )
    value = ranking.auc()
    of_true, of_false = ranking.placements()
    group = np.searchsorted(ranking.n, np.arange(n), side="right")
    bounds = clustered_auc(
        value,
        np.where(truth, of_true[group], 0.0),
        np.where(truth, 0.0, of_false[group]),
        truth.astype(np.int64),
        (~truth).astype(np.int64),
    )
    null = Estimate(0.5, 0.5, 0.5)
    if bounds is None:
        return Measure(definition, n, value, null=null, missing="no interval: too few, or all alike")
    return Measure(definition, n, value, *bounds, "over features, 95 % (Obuchowski 1997)", null=null)


def _range(k: int, n: int) -> Estimate | None:
    return wilson(k, n) if n else None


def _share(definition: str, k: int, n: int, null: Estimate | None) -> Measure:
    if n == 0:
        return Measure(definition, 0, null=null, missing="there is none")
    found = wilson(k, n)
    return Measure(definition, n, found.value, found.low, found.high, "Wilson 95 %", null=null)
