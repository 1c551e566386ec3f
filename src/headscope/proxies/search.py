"""Search for the best proxy of every feature: chosen on one half of the documents, scored on the other.

Candidates for each feature: induction of its top logit token and of its top source token; the ten tokens after a source
token; everything after one of its source tokens; and sets of current tokens, next tokens and bigrams. The search uses
active tokens and counts, never an array of features by tokens; a mask is computed once for all features that need it.
"""

import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.proxies.algebra import Or, Proxy
from headscope.proxies.blocks import Blocks, Token
from headscope.proxies.families import after_any, bigram, induction_of, next_token_in, token_in, within_after
from headscope.proxies.masks import read_blocks, vocabulary_of
from headscope.proxies.search_records import FAMILIES, Family, FamilyScores, FeatureProxies, Kind, Score, SearchPlan
from headscope.proxies.token_sets import Activation, best_set
from headscope.stats import MINIMUM_UNITS, PairSums, Ranking, clustered_auc, resampled, unit_draws

_CACHED = 1 << 29  # bytes of cached masks
_MAX_THREADS = 8


def in_fitting_half(name: str) -> bool:
    """Whether proxies are chosen on the document of this name; uses a different hash than the SAE's split."""
    return hashlib.sha256(f"proxies {name}".encode()).digest()[0] < 128


def search(
    index: FeatureIndex, latents: Sequence[int] | None = None, plan: SearchPlan | None = None
) -> Iterator[FeatureProxies]:
    """Find the best proxies of features.

    Args:
        index: the index of the features.
        latents: features in order; default: all live ones, grouped by their top logit token.
        plan: the search settings.

    Yields:
        The result of each feature, in order; several are searched at a time, each in a thread. Memory is about 30 bytes
            per position of the corpus, some 20 more per thread, and 512 MB of masks.

    Raises:
        IndexFormatError: no such latent.
        StudyError: one half of the documents is empty.
    """
    if latents is None:
        latents = live_latents(index)
    for latent in latents:
        index.check_latent(latent)
    searcher, threads = _Search(index, plan or SearchPlan()), min(_MAX_THREADS, os.cpu_count() or 1)
    pool, running = ThreadPoolExecutor(threads), deque[Future[FeatureProxies]]()
    try:
        for latent in latents:
            running.append(pool.submit(searcher.of, latent))
            if len(running) > 2 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def live_latents(index: FeatureIndex) -> list[int]:
    """Return the live latents, grouped by their top logit token."""
    table = index.table()
    logit, n_active = table["top_logit"].to_numpy(), table["n_active"].to_numpy()
    order = np.argsort(logit, kind="stable")
    return [int(i) for i in order if n_active[i]]


@dataclass(frozen=True, eq=False)
class _Corpus:
    """The text of an index, flat, and its two halves."""

    blocks: list[Blocks]
    block_size: int

    @cached_property
    def tokens(self) -> Int[np.ndarray, " token"]:
        return np.concatenate([b.tokens.ravel() for b in self.blocks])

    @cached_property
    def text(self) -> Bool[np.ndarray, " token"]:
        return np.concatenate([b.text.ravel() for b in self.blocks])

    @cached_property
    def document(self) -> Int[np.ndarray, " token"]:
        return np.concatenate([b.document.ravel() for b in self.blocks])

    @cached_property
    def fit(self) -> Bool[np.ndarray, " token"]:
        """Text tokens on which proxies are chosen."""
        return self.text & np.array([in_fitting_half(name) for name in self.blocks[0].documents])[self.document]

    @cached_property
    def scored(self) -> Bool[np.ndarray, " token"]:
        """All other text tokens."""
        return self.text & ~self.fit

    @cached_property
    def unit(self) -> Int[np.ndarray, " token"]:
        """Document number, among those scored, of each scored token; -1 elsewhere."""
        unit = np.full(self.text.size, -1, dtype=np.int32)
        unit[self.scored] = np.unique(self.document[self.scored], return_inverse=True)[1]
        return unit

    @cached_property
    def n_by_unit(self) -> Int[np.ndarray, " unit"]:
        return self.by_unit(self.scored)

    def by_unit(self, mask: Bool[np.ndarray, " token"]) -> Int[np.ndarray, " unit"]:
        """Return the number of scored tokens of each unit where a mask holds."""
        n_units = int(self.unit.max(initial=-1)) + 1
        return np.bincount(self.unit[mask & self.scored], minlength=n_units)

    def neighbour(self, by: int) -> Int[np.ndarray, " token"]:
        """Return the token `by` positions later in the block; -1 outside it."""
        tokens = self.tokens.reshape(-1, self.block_size)
        found = np.full_like(tokens, -1)
        if by > 0:
            found[:, :-by] = tokens[:, by:]
        else:
            found[:, -by:] = tokens[:, :by]
        return found.ravel()


class _Keys:
    """A key for each token of the corpus, such as its token id, with its counts in the fitting half."""

    def __init__(self, of_token: Int[np.ndarray, " token"], corpus: _Corpus, plan: SearchPlan) -> None:
        self.of_token, self._document, self._plan = of_token, corpus.document, plan
        found = of_token[corpus.fit]
        self.keys, counts = np.unique(found[found >= 0], return_counts=True)
        self.counts = counts.astype(np.float64)

    def best(
        self, position: Int[np.ndarray, " active"], f: Float[np.ndarray, " active"], of: Activation, limit: int
    ) -> tuple[list[int], float]:
        """Return the keys whose presence correlates best with f, and the correlation."""
        present = self.of_token[position] >= 0
        position, f = position[present], f[present]
        key = np.searchsorted(self.keys, self.of_token[position])
        chosen, pearson = best_set(key, f, self.counts, self._seen_often(key, position), of, limit)
        return self.keys[chosen].tolist(), pearson

    def _seen_often(
        self, key: Int[np.ndarray, " active"], position: Int[np.ndarray, " active"]
    ) -> Bool[np.ndarray, " key"]:
        """Return keys active on enough tokens and documents not to be accidental."""
        n_documents = int(self._document.max()) + 1
        of_key = np.unique(key * n_documents + self._document[position]) // n_documents
        often = np.bincount(key, minlength=len(self.keys)) >= self._plan.min_repeats
        return often & (np.bincount(of_key, minlength=len(self.keys)) >= self._plan.min_documents)


@dataclass(frozen=True)
class _Pairs:
    """The active tokens of a feature in a half."""

    position: Int[np.ndarray, " active"]
    f: Float[np.ndarray, " active"]

    def __len__(self) -> int:
        return len(self.position)


class _Search:
    """State shared by features: the corpus, masks, counts of tokens, and resampled documents."""

    def __init__(self, index: FeatureIndex, plan: SearchPlan) -> None:
        self._index, self._plan = index, plan
        self._corpus = corpus = _Corpus(list(read_blocks(index)), index.block_size)
        self._vocabulary = vocabulary_of(index)
        self._masks: OrderedDict[Proxy, np.ndarray] = OrderedDict()
        self._lock = Lock()
        self._n_fit, self._n_scored = int(corpus.fit.sum()), int(corpus.scored.sum())
        if not self._n_fit or not self._n_scored:
            raise StudyError(
                f"{len(index.documents)} documents, of which none is in the half where proxies are "
                f"{'scored' if self._n_fit else 'chosen'}",
                expected="text of several documents: they are divided by a hash of their names",
                do="index a folder with a file for each document",
            )
        d_vocab, previous = len(self._vocabulary.tokens), corpus.neighbour(-1).astype(np.int64)
        self._present = _Keys(corpus.tokens, corpus, plan)
        self._next = _Keys(corpus.neighbour(1), corpus, plan)
        self._bigrams = _Keys(np.where(previous < 0, -1, previous * d_vocab + corpus.tokens), corpus, plan)
        n_blocks = index.n_blocks
        rng = np.random.default_rng(plan.seed)
        self._rotations = rng.choice(np.arange(1, n_blocks), min(plan.n_rotations, n_blocks - 1), replace=False)
        self._draws = unit_draws(max(1, len(corpus.n_by_unit)), n_samples=plan.n_resamples, seed=plan.seed)

    def of(self, latent: int) -> FeatureProxies:
        """Search for one feature."""
        corpus, plan = self._corpus, self._plan
        found = self._index.activations(latent)
        position, f = found.position, found.activation.astype(np.float64)
        fit = _Pairs(position[corpus.fit[position]], f[corpus.fit[position]])
        scored = _Pairs(position[corpus.scored[position]], f[corpus.scored[position]])
        best = self._fitted(latent, fit) if len(fit) else {}
        families = [self._scored(family, *best[family], scored) for family in FAMILIES if family in best]
        families.sort(key=lambda s: -s.fit_pearson)
        null_high = None
        if families:
            families[0], null_high = self._with_null(families[0], _Pairs(position, f))
        return FeatureProxies(
            latent=latent,
            kind=self._kind(families, null_high) if min(len(fit), len(scored)) >= plan.min_active else None,
            n=self._n_scored,
            n_active=len(scored),
            n_active_fit=len(fit),
            null_high=null_high,
            families=tuple(families),
        )

    def _kind(self, families: Sequence[FamilyScores], null_high: float | None) -> Kind:
        if not families:
            return "unexplained"
        pearson = families[0].scores["pearson"]
        surely = pearson.value if pearson.low is None else pearson.low
        explains = (
            pearson.value is not None
            and surely is not None
            and pearson.value >= self._plan.min_pearson
            and (null_high is None or surely > null_high)
            and families[0].n_proxy >= self._plan.min_active
            and families[0].n_documents >= MINIMUM_UNITS
        )
        return families[0].family if explains else "unexplained"

    # ------------------------------------------------------------------------------------------------------ choosing
    def _fitted(self, latent: int, fit: _Pairs) -> dict[Family, tuple[Proxy, float]]:
        """Return the best proxy of each family on the fitting half, with its correlation there."""
        of = Activation(self._n_fit, float(fit.f.sum()), float((fit.f**2).sum()))
        candidates: dict[Family, list[tuple[Proxy, float]]] = {"token": self._token_sets(fit, of)}
        for family, proxies in self._context(latent).items():
            candidates[family] = [(proxy, self._fit_pearson(proxy, fit, of)) for proxy in proxies]
        best: dict[Family, tuple[Proxy, float]] = {}
        for family, tried in candidates.items():
            if tried and max(pearson for _, pearson in tried) > 0:
                best[family] = max(tried, key=lambda t: t[1])
        return best

    def _context(self, latent: int) -> dict[Family, list[Proxy]]:
        """Return the candidates from a feature's weights and source tokens."""
        plan, name = self._plan, self._vocabulary.name
        sources = self._index.sources(latent)
        tokens = [name(s.token) for s in sources.tokens if s.token not in self._vocabulary.special] if sources else []
        copied = dict.fromkeys([name(self._index.feature(latent).logit_top[0][0]), *tokens[:1]])
        found: dict[Family, list[Proxy]] = {
            "induction": [induction_of(token, fuzzy=fuzzy) for token in copied for fuzzy in (False, True)]
        }
        if tokens:
            sets = _different([tokens[:k] for k in plan.source_sets])
            single = [[token] for token in tokens[: plan.n_sources]]
            found["local context"] = [within_after(s, plan.window) for s in _different([*single, *sets])]
            found["high-level context"] = [after_any(s) for s in _different([tokens[:1], *sets])]
        return found

    def _token_sets(self, fit: _Pairs, of: Activation) -> list[tuple[Proxy, float]]:
        plan, vocabulary = self._plan, self._vocabulary
        found: list[tuple[Proxy, float]] = []
        for keys, make in ((self._present, token_in), (self._next, next_token_in)):
            chosen, pearson = keys.best(fit.position, fit.f, of, plan.max_tokens)
            if chosen:
                found.append((make([vocabulary.name(i) for i in chosen]), pearson))
        chosen, pearson = self._bigrams.best(fit.position, fit.f, of, plan.max_bigrams)
        if chosen:
            pairs = [divmod(i, len(vocabulary.tokens)) for i in chosen]
            each = [bigram(vocabulary.name(a), vocabulary.name(b)) for a, b in pairs]
            found.append((each[0] if len(each) == 1 else Or(tuple(each)), pearson))
        return found

    def _fit_pearson(self, proxy: Proxy, fit: _Pairs, of: Activation) -> float:
        mask = self._mask(proxy)
        n_true = float(np.count_nonzero(mask & self._corpus.fit))
        pearson = of.pearson(np.array([n_true]), np.array([fit.f[mask[fit.position]].sum()]))
        return float(np.nan_to_num(pearson, nan=-1.0)[0])

    def _mask(self, proxy: Proxy) -> Bool[np.ndarray, " token"]:
        n = self._corpus.text.size
        with self._lock:
            packed = self._masks.get(proxy)
            if packed is not None:
                self._masks.move_to_end(proxy)
        if packed is not None:
            return np.unpackbits(packed, count=n).view(bool)
        mask = np.concatenate([proxy.holds(blocks).ravel() for blocks in self._corpus.blocks])
        packed = np.packbits(mask)
        with self._lock:
            self._masks[proxy] = packed
            while len(self._masks) > 1 and len(self._masks) * packed.size > _CACHED:
                self._masks.popitem(last=False)
        return mask

    # ------------------------------------------------------------------------------------------------------- scoring
    def _scored(self, family: Family, proxy: Proxy, fit_pearson: float, scored: _Pairs) -> FamilyScores:
        corpus, mask = self._corpus, self._mask(proxy)
        true, y, unit = corpus.by_unit(mask), mask[scored.position], corpus.unit[scored.position]
        active, both = (np.bincount(u, minlength=len(true)) for u in (unit, unit[y]))
        shift = float(scored.f.sum() / max(1, self._n_scored))
        sums = PairSums.of(unit, scored.f, y, corpus.n_by_unit - active, true - both, shift=shift)
        scores = {name: Score(_number(value[0])) for name, value in _statistics(sums.total()).items()}
        for name, score in scores.items():
            interval = resampled(lambda drawn, of=name: _statistics(PairSums(drawn))[of], sums.values, self._draws)
            if score.value is not None and interval is not None:
                scores[name] = replace(score, low=interval[0], high=interval[1])
        scores["auc"] = self._auc(scored, y, true)
        return FamilyScores(
            family, proxy, fit_pearson, int(true.sum()), int(both.sum()), int(np.count_nonzero(true)), scores
        )

    def _auc(self, scored: _Pairs, y: Bool[np.ndarray, " active"], true: Int[np.ndarray, " unit"]) -> Score:
        n_by_unit, n_units = self._corpus.n_by_unit, len(true)
        order = np.argsort(-scored.f, kind="stable")
        n_silent, n_silent_true = self._n_scored - len(scored), int(true.sum() - y.sum())
        ranking = Ranking.of(scored.f[order], y[order], n_silent, n_silent_true)
        if not 0 < true.sum() < self._n_scored:
            return Score(None)
        of_true, of_false = ranking.placements()
        # the group of each active token; the inactive ones are last
        group = np.searchsorted(-ranking.threshold, -scored.f)
        unit = self._corpus.unit[scored.position]
        totals = []
        for placements, is_so, n in ((of_true, y, true), (of_false, ~y, n_by_unit - true)):
            at = np.bincount(unit[is_so], placements[group[is_so]], minlength=n_units)
            totals.append(at + placements[-1] * (n - np.bincount(unit[is_so], minlength=n_units)))
        auc = ranking.auc()
        interval = clustered_auc(auc, totals[0], totals[1], true, n_by_unit - true)
        return Score(auc) if interval is None else Score(auc, *interval)

    def _with_null(self, found: FamilyScores, pairs: _Pairs) -> tuple[FamilyScores, float | None]:
        """Add the null scores: of the same proxy with activations rotated by whole blocks, on all the text."""
        corpus, mask = self._corpus, self._mask(found.proxy)
        n_text, n_true = int(corpus.text.sum()), int(mask.sum())
        order = np.argsort(-pairs.f, kind="stable")
        position, f = pairs.position[order], pairs.f[order]
        rows = []
        for rotation in self._rotations:
            moved = (position + rotation * corpus.block_size) % len(mask)
            kept = corpus.text[moved]
            g, y = f[kept], mask[moved[kept]]
            silent, silent_true = n_text - len(g), n_true - int(y.sum())
            sums = PairSums.of(
                np.zeros(len(g), np.int64), g, y, np.array([silent]), np.array([silent_true]), shift=f.sum() / n_text
            ).total()
            auc = Ranking.of(g, y, silent, silent_true).auc() if 0 < n_true < n_text else float("nan")
            rows.append({name: float(value[0]) for name, value in _statistics(sums).items()} | {"auc": auc})
        nulls = {name: np.array([row[name] for row in rows]) for name in found.scores} if rows else {}
        scores = {
            name: replace(score, null=_number(nulls[name].mean())) if name in nulls else score
            for name, score in found.scores.items()
        }
        return replace(found, scores=scores), _number(nulls["pearson"].max()) if rows else None


def _statistics(sums: PairSums) -> dict[str, np.ndarray]:
    """Return all statistics but the AUC, for each row of sums."""
    with np.errstate(divide="ignore", invalid="ignore"):
        f1 = 2 * sums["both"] / (sums["active"] + sums["true"])
    return {
        "precision": sums.precision(),
        "recall": sums.recall(),
        "f1": f1,
        "pearson": sums.pearson(),
        "phi": sums.phi(),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _different(lists: Sequence[Sequence[Token]]) -> list[list[Token]]:
    """Return the distinct non-empty lists, in order."""
    return [list(of) for of in dict.fromkeys(map(tuple, lists)) if of]
