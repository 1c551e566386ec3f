"""Induction features, found without choosing a head: behaviour, DFA from earlier B's, copying, and a corrupted A.

The post's footnote 9 asks that "most information is sourced from prior B tokens". Here every live feature is judged by
four independent tests: behaviour (`induction`), the share of DFA that comes from earlier B's, whether a head would
raise the feature for B alone (copying), and whether replacing the A's before earlier B's silences the feature. The
heads responsible are a result, not an assumption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from headscope import attribution
from headscope.errors import StudyError
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.stats import MINIMUM, Estimate, Measure, wilson
from headscope.studies.induction.behaviour import PASS, Behaviour, BigramFinder, Reading, behaviour, targets
from headscope.studies.support.active import Text, drawn
from headscope.studies.support.replacement import batches, tokens_of

_PAIRS = 512  # pairs whose [head, source] contributions are in memory at a time
_RUNS = 16  # corrupted blocks in one run
_TABLE = 1 << 24  # entries of the copying table in memory at a time

Progress = Callable[[str, int, int], None]
"""Progress callback: called with the stage, the work done and the total."""


@dataclass(frozen=True)
class Criteria:
    """Criteria for an induction feature; all that are set must hold."""

    rate: float = PASS
    """The pass rate is above this,"""
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    least: int = 10
    """over at least this many expected A's."""
    source_share: float = 0.5
    """Minimum of the median share of positive DFA that comes from earlier B's."""
    copy_rank: float = 0.01
    """Maximum share of the vocabulary that raises the feature more than B does, through its top head."""
    off: float | None = 0.5
    """With the A's before earlier B's replaced, minimum share (exclusive) at which the feature is off; None: not
    tested."""

    def __post_init__(self) -> None:
        """Reject invalid shares."""
        shares = {"rate": self.rate, "source_share": self.source_share, "copy_rank": self.copy_rank, "off": self.off}
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise StudyError(f"{name} {value}", expected="a share, from 0 to 1", do="pass another")


# ------------------------------------------------------------------------------------------------------------- sources
@dataclass(frozen=True)
class PriorSources:
    """Sources of the DFA of each feature at later A's where it is active."""

    n: Int[np.ndarray, " latent"]
    """Later A's sampled."""
    share: Float[np.ndarray, " latent"]
    """The median over them of `sum over s with token B, s < q, of d(s) / sum_s max(d(s), 0)`, `d(s) = sum_h C[h, s]`;
    NaN without any."""
    chance: Float[np.ndarray, " latent"]
    """The median share of such s among all s <= q: the value for equally contributing sources."""
    from_a: Float[np.ndarray, " latent"]
    """The median of the same with A in place of B, including q itself: large for a feature of its own token."""
    by_head: Float[np.ndarray, "latent head"]
    """The DFA from those B's, summed over the A's, by head; its shares over heads. NaN without any."""

    @property
    def head(self) -> Int[np.ndarray, " latent"]:
        """The top head for this DFA; -1 without any."""
        return np.where(np.isnan(self.by_head).any(1), -1, np.nan_to_num(self.by_head).argmax(1))


@dataclass(frozen=True)
class _Places:
    """(latent, position) pairs: later A's at which a feature is active."""

    row: Int[np.ndarray, " pair"]
    """Index of the latent among the requested ones."""
    latent: Int[np.ndarray, " pair"]
    token: Int[np.ndarray, " pair"]
    """B."""
    position: Int[np.ndarray, " pair"]
    f: Float[np.ndarray, " pair"]

    def at(self, chosen: np.ndarray) -> "_Places":
        return _Places(*(values[chosen] for values in vars(self).values()))


def _places(index: FeatureIndex, found: Behaviour, finder: BigramFinder, plan: "_Plan") -> _Places:
    """Sample positions of each feature from the same blocks as its behaviour; sorted by position."""
    parts: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] * 4 + [np.zeros(0)]]
    before_b = plan.criteria.reading.expected == "before B"
    row_of = {int(latent): row for row, latent in enumerate(found.latents)}
    for latent, active in index.each_latent():
        if latent not in row_of:
            continue
        row = row_of[latent]
        token = int(found.token[row])
        bigrams = finder.of(token, most=plan.n_blocks, seed=plan.seed)
        later = bigrams.later[bigrams.before_b] if before_b else bigrams.later
        on = np.flatnonzero(np.isin(active.position, later))
        on = on[drawn(len(on), plan.n_places, (plan.seed, latent))]
        same = [np.full(len(on), value) for value in (row, latent, token)]
        parts.append([*same, active.position[on].astype(np.int64), active.activation[on].astype(np.float64)])
    places = _Places(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return places.at(np.argsort(places.position, kind="stable"))


def _prior_sources(live: LiveIndex, text: Text, places: _Places, n_latents: int, report: Progress) -> PriorSources:
    weights, size = attribution.HeadWeights.of(live.sae, live.model), text.tokens.shape[1]
    shares, heads = np.zeros((len(places.row), 3)), np.zeros((len(places.row), live.index.n_heads))
    blocks = np.unique(places.position // size)
    for done, own in batches(blocks, size):
        report("sources", done + len(own), len(blocks))
        low, high = np.searchsorted(places.position, [own[0] * size, (own[-1] + 1) * size])
        attention = live.model.attention(tokens_of(live, text, own), live.sae.site.layer)
        for start in range(low, high, _PAIRS):
            part = slice(start, min(start + _PAIRS, high))
            block, query = np.divmod(places.position[part], size)
            row = torch.from_numpy(np.searchsorted(own, block))
            dfa = attribution.dfa_by_source(
                weights,
                attention,
                row.to(live.model.device),
                torch.from_numpy(query).to(live.model.device),
                torch.from_numpy(places.latent[part]).to(live.model.device),
            )
            shares[part], heads[part] = _from_tokens(
                dfa.double().cpu().numpy(), text.text_tokens[block], query, places.token[part]
            )
    n = np.bincount(places.row, minlength=n_latents)
    by_head = np.stack([np.bincount(places.row, of, minlength=n_latents) for of in heads.T], axis=1)
    medians = np.full((n_latents, 3), np.nan)
    order = np.argsort(places.row, kind="stable")
    for row, end in zip(np.flatnonzero(n), np.cumsum(n[n > 0]), strict=True):
        own = order[end - n[row] : end]
        medians[row] = np.median(shares[own], axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        by_head = by_head / by_head.sum(1, keepdims=True)
    by_head[~np.isfinite(by_head).all(1)] = np.nan
    return PriorSources(n, *medians.T, by_head=by_head)


def _from_tokens(
    dfa: Float[np.ndarray, "pair head source"],
    tokens: Int[np.ndarray, "pair source"],
    query: Int[np.ndarray, " pair"],
    b: Int[np.ndarray, " pair"],
) -> tuple[Float[np.ndarray, "pair 3"], Float[np.ndarray, "pair head"]]:
    """Return share from B, share of B among sources, share from A; and the DFA from B by head."""
    source = np.arange(tokens.shape[1])
    seen, before = source <= query[:, None], source < query[:, None]
    is_b = (tokens == b[:, None]) & before
    is_a = (tokens == np.take_along_axis(tokens, query[:, None], 1)) & seen
    by_source = dfa.sum(1)
    positive = np.maximum(by_source, 0).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        from_b, from_a = ((by_source * of).sum(1) / positive for of in (is_b, is_a))
    shares = np.stack([from_b, is_b.sum(1) / seen.sum(1), from_a], axis=1)
    return np.nan_to_num(shares), (dfa * is_b[:, None]).sum(2)


# ------------------------------------------------------------------------------------------------------------- copying
def copy_ranks(
    live: LiveIndex,
    latents: Sequence[int] | Int[np.ndarray, " n"],
    tokens: Sequence[int] | Int[np.ndarray, " n"],
    heads: Sequence[int] | Int[np.ndarray, " n"],
    report: Progress = lambda _stage, _done, _total: None,
) -> Float[np.ndarray, " n"]:
    """Return the share of the vocabulary that would raise a feature more than its token does, alone through a head.

    0 for a head that raises the feature most for exactly that token, about 1/2 for an unrelated one. Uses no text. NaN
    for head -1.
    """
    latent, token, head = (np.asarray(values, dtype=np.int64) for values in (latents, tokens, heads))
    ranks, step = np.full(len(latent), np.nan), max(1, _TABLE // live.model.spec.d_vocab)
    if not (head >= 0).any():
        return ranks
    weights = attribution.HeadWeights.of(live.sae, live.model)
    values = live.model.token_values(live.sae.site.layer, on_tokens=partial(report, "vocabulary"))
    for h in np.unique(head[head >= 0]).tolist():
        rows = np.flatnonzero(head == h)
        for own in (rows[i : i + step] for i in range(0, len(rows), step)):
            j, t = (torch.from_numpy(of[own]).to(values.device) for of in (latent, token))
            table = attribution.source_table(weights, values[:, h], h, j)
            above = (table > table.gather(1, t[:, None])).sum(1)
            ranks[own] = above.cpu().numpy() / table.shape[1]
    return ranks


# -------------------------------------------------------------------------------------------------------------- causal
@dataclass(frozen=True)
class Corruption:
    """Remaining activation of each feature at later A's when earlier tokens are replaced by others of the text."""

    n: Int[np.ndarray, " latent"]
    """Later A's sampled; 0 for features that were not tested."""
    n_off: Int[np.ndarray, " latent"]
    """Number at which it is off when all A's before earlier B's are replaced."""
    kept: Float[np.ndarray, " latent"]
    """`sum f' / sum f` then; NaN without any."""
    n_off_control: Int[np.ndarray, " latent"]
    """Number at which it is off when as many other earlier tokens are replaced that are not B and not before B: the
    null."""
    kept_control: Float[np.ndarray, " latent"]


def _corrupt(live: LiveIndex, text: Text, places: _Places, n_latents: int, seed: int, report: Progress) -> Corruption:
    size, flat = text.tokens.shape[1], text.tokens.reshape(-1)
    f = np.zeros((len(places.row), 2))
    pool = flat[text.is_text.reshape(-1)]
    kept = np.zeros(len(places.row), dtype=bool)
    for start in range(0, len(places.row), _RUNS):
        pairs = np.arange(start, min(start + _RUNS, len(places.row)))
        report("corruption", start + len(pairs), len(places.row))
        tokens = np.stack([text.tokens[places.position[pairs] // size]] * 2)  # [version, pair, position]
        for i, pair in enumerate(pairs):
            rng = np.random.default_rng((seed, int(places.latent[pair]), int(places.position[pair])))
            is_text = text.is_text[places.position[pair] // size]
            own, b = int(places.position[pair] % size), int(places.token[pair])
            kept[pair] = _replace(tokens[:, i], is_text, own, b, pool, rng)
        query = torch.from_numpy(np.tile(places.position[pairs] % size, 2)).to(live.model.device)
        latent = torch.from_numpy(np.tile(places.latent[pairs], 2)).to(live.model.device)
        batch = torch.from_numpy(tokens.reshape(-1, size).astype(np.int64)).to(live.model.device)
        z = live.model.read(batch, [live.sae.site])[live.sae.site]
        each = torch.arange(len(batch), device=batch.device)
        found = live.sae.encode(z[each, query])[each, latent]
        f[pairs] = found.double().cpu().numpy().reshape(2, -1).T
    places, f = places.at(kept), f[kept]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(places.row, values, minlength=n_latents)

    with np.errstate(invalid="ignore"):
        left = [total(f[:, i]) / total(places.f) for i in range(2)]
    off = [total(f[:, i] == 0).astype(np.int64) for i in range(2)]
    return Corruption(np.bincount(places.row, minlength=n_latents), off[0], left[0], off[1], left[1])


def _replace(
    versions: Int[np.ndarray, "2 position"],
    is_text: Bool[np.ndarray, " position"],
    query: int,
    b: int,
    pool: Int[np.ndarray, " text"],
    rng: np.random.Generator,
) -> bool:
    """Replace the A's before earlier B's in version one, as many other tokens in version two; False if too few."""
    tokens = versions[0].copy()
    a = tokens[query]
    places = np.arange(query)
    before_b = (tokens[1 : query + 1] == b) & is_text[1 : query + 1]
    own = places[(tokens[:query] == a) & before_b & is_text[:query]]
    other = places[is_text[:query] & (tokens[:query] != b) & ~before_b & (tokens[:query] != a)]
    if not 0 < len(own) <= len(other):
        return False
    for version, at in zip(versions, (own, rng.choice(other, len(own), replace=False)), strict=True):
        for place in at:
            new = pool[rng.integers(len(pool), size=64)]
            new = new[(new != a) & (new != b) & (new != tokens[place])]
            if not len(new):
                return False
            version[place] = new[0]
    return True


# ------------------------------------------------------------------------------------------------------------- verdict
@dataclass(frozen=True)
class InductionFeatures:
    """Every live feature judged by four tests."""

    criteria: Criteria
    behaviour: Behaviour
    sources: PriorSources
    copy_rank: Float[np.ndarray, " latent"]
    corruption: Corruption
    """For those that pass the other three tests; `n` is 0 for all others, and for all if not tested."""
    n_null: int | None
    """Features that pass all tests for the B of another feature; None if not tested."""
    null_tests: dict[str, int] | None = None
    """Likewise for each test alone; the one for copying is the null of the static token tables."""
    n_other: int = 0
    """Features that were tested with a B other than their own: the denominator of the two nulls."""
    definition: str = (
        "live features with a pass rate, a share of DFA from earlier B's, a copying rank and a share off with A's "
        "before earlier B's replaced as the criteria ask"
    )

    @property
    def latents(self) -> Int[np.ndarray, " latent"]:
        """The judged features; arrays are in their order."""
        return self.behaviour.latents

    @property
    def tests(self) -> dict[str, Bool[np.ndarray, " latent"]]:
        """Masks of the features that pass each test."""
        asked = self.criteria
        with np.errstate(invalid="ignore"):
            found = {
                "behaviour": self.behaviour.passes(asked.reading, above=asked.rate, least=asked.least),
                "sources": self.sources.share >= asked.source_share,
                "copying": self.copy_rank <= asked.copy_rank,
            }
        if asked.off is not None:
            found["corruption"] = (self.corruption.n > 0) & (self.corruption.n_off > asked.off * self.corruption.n)
        return found

    @property
    def verdict(self) -> Bool[np.ndarray, " latent"]:
        """Mask of the features that pass all tests."""
        return np.logical_and.reduce(list(self.tests.values()))

    @property
    def found(self) -> Int[np.ndarray, " n"]:
        """The induction features."""
        return self.latents[self.verdict]

    def share(self) -> Measure:
        """Return the share of live features that are induction features, Wilson 95 %.

        The null is the share that passes when each feature is tested with the B of another one, with its interval.
        """
        n, k = len(self.latents), int(self.verdict.sum())
        null = self.by_chance()
        if n < MINIMUM:
            return Measure(self.definition, n, null=null, missing=f"{n} features; at least {MINIMUM} are needed")
        found = wilson(k, n)
        return Measure(self.definition, n, found.value, found.low, found.high, "Wilson 95 %", null=null)

    def by_chance(self, test: str | None = None) -> Estimate | None:
        """Return the share that passes all tests, or one of them, for the B of another feature; None if not tested."""
        if self.n_null is None or self.null_tests is None or not self.n_other:
            return None
        return wilson(self.n_null if test is None else self.null_tests[test], self.n_other)

    def passing(self, test: str) -> Measure:
        """Return the share of live features that pass one of `tests`; the null is as in `share`.

        Only features that pass the other tests are tested for corruption: its share is of them, without a null.
        """
        asked, null = np.ones(len(self.latents), bool), self.by_chance(test)
        definition = f"share of live features that pass the test of {test}"
        if test == "corruption":
            asked, null = self.corruption.n > 0, None
            definition = "share of the features passing the other tests that pass the test of corruption"
        n = int(asked.sum())
        if n < MINIMUM:
            return Measure(definition, n, null=null, missing=f"{n} features; at least {MINIMUM} are needed")
        found = wilson(int(self.tests[test][asked].sum()), n)
        return Measure(definition, n, found.value, found.low, found.high, "Wilson 95 %", null=null)

    def heads(self) -> Int[np.ndarray, " head"]:
        """Return the number of induction features by their top head."""
        head = self.sources.head[self.verdict]
        return np.bincount(head[head >= 0], minlength=self.sources.by_head.shape[1])


def induction_features(  # noqa: PLR0913 - what is judged, by what, how much of it, and who is told
    live: LiveIndex,
    latents: Sequence[int] | Int[np.ndarray, " n"] | None = None,
    *,
    criteria: Criteria | None = None,
    n_blocks: int | None = 200,
    n_places: int = 32,
    n_corrupted: int = 8,
    null: bool = True,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> InductionFeatures:
    """Judge features by all four tests, without choosing a head beforehand.

    Args:
        live: the index with its model and SAE.
        latents: the features; default: all live ones.
        criteria: criteria for an induction feature.
        n_blocks: maximum number of blocks that contain B (`behaviour`).
        n_places: later A's of each feature sampled for DFA.
        n_corrupted: later A's at which earlier ones are replaced.
        null: also test each feature with the B of another, to estimate how many pass by chance.
        seed: seed of all samples.
        on_progress: called as blocks are processed.

    Raises:
        IndexFormatError: no such latent.
        StudyError: no latents.
    """
    asked = criteria or Criteria()
    index, text = live.index, Text.of(live.index)
    chosen = np.flatnonzero(index.table()["n_active"].to_numpy() > 0) if latents is None else np.asarray(latents)
    chosen = np.unique(chosen).astype(np.int64)
    if not len(chosen):
        raise StudyError("no latents", expected="at least one", do="name some, or index a corpus on which they fire")
    finder = BigramFinder(text)
    plan = _Plan(asked, n_blocks, n_places, n_corrupted, seed)
    own = targets(index)[chosen]
    report = on_progress or (lambda _stage, _done, _total: None)
    judged = _judge(live, text, finder, chosen, own, plan, report)
    if not null:
        return judged
    other = np.roll(own[np.random.default_rng((seed, 3)).permutation(len(own))], 1)
    by_chance = _judge(
        live, text, finder, chosen, other, plan, lambda stage, done, total: report(f"null: {stage}", done, total)
    )
    another = other != own
    tests = {name: int((passed & another).sum()) for name, passed in by_chance.tests.items()}
    return replace(
        judged, n_null=int((by_chance.verdict & another).sum()), null_tests=tests, n_other=int(another.sum())
    )


@dataclass(frozen=True)
class _Plan:
    criteria: Criteria
    n_blocks: int | None
    n_places: int
    n_corrupted: int
    seed: int


def _judge(
    live: LiveIndex,
    text: Text,
    finder: BigramFinder,
    latents: np.ndarray,
    tokens: np.ndarray,
    plan: _Plan,
    report: Progress,
) -> InductionFeatures:
    index, asked, n = live.index, plan.criteria, len(latents)
    found = behaviour(index, latents, tokens=tokens, n_blocks=plan.n_blocks, seed=plan.seed, finder=finder)
    places = _places(index, found, finder, plan)
    sources = _prior_sources(live, text, places, n, report)
    ranks = copy_ranks(live, latents, tokens, sources.head, report)
    none = np.zeros(n, np.int64)
    untested = Corruption(none, none, np.full(n, np.nan), none, np.full(n, np.nan))
    judged = InductionFeatures(asked, found, sources, ranks, untested, None)
    if asked.off is None:
        return judged
    so_far = np.logical_and.reduce([passed for name, passed in judged.tests.items() if name != "corruption"])
    few = np.zeros(len(places.row), dtype=bool)
    for row in np.flatnonzero(so_far):
        own = np.flatnonzero(places.row == row)
        few[own[drawn(len(own), plan.n_corrupted, (plan.seed, int(latents[row]), 4))]] = True
    return replace(judged, corruption=_corrupt(live, text, places.at(few), n, plan.seed, report))
