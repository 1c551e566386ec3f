"""Prompts from the corpus in which a feature fires, each with a corruption that silences it.

A prompt is an excerpt: the BOS, then the text from shortly before the source tokens to the active token. Prompts in
which the feature no longer fires, and those in whose corruption it still does, are counted and excluded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int

from headscope.errors import HeadscopeError, StudyError
from headscope.index.live import LiveIndex
from headscope.report.records import Exemplar, Settings
from headscope.report.subject import Subject
from headscope.studies.how.corruptions import FeatureMetric, PromptPair, pair, replace_tokens
from headscope.studies.support.active import Text

_LONGEST = 64
_BEFORE = 4
_TRIED = 8
"""Candidates per wanted pair."""


@dataclass(frozen=True)
class CorpusPair:
    """One prompt and its corruption."""

    pair: PromptPair
    document: int
    replaced: tuple[int, ...]
    """Positions of the prompt whose tokens are replaced in the corruption."""
    sources: tuple[int, ...]
    """Positions of its source tokens: for induction the B after each replaced A, else the replaced ones."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of an exemplar, with statistics of the candidates."""

    found: tuple[CorpusPair, ...]
    died: tuple[bool, ...]
    """For each prompt in which the feature fires, whether the corruption silenced it."""
    control: tuple[bool, ...]
    """Whether replacing as many other tokens did."""


def pairs_of(subject: Subject, exemplar: Exemplar) -> Pairs:
    """Extract prompts from the corpus, and corrupt them: for induction the earlier A's, else the source tokens.

    Done once for all sections about an exemplar.

    Raises:
        StudyError: the feature survives every corruption, or nowhere has tokens to replace before it.
    """
    return subject.once(("pairs", exemplar), lambda: _pairs(subject.live, subject.settings, exemplar))


def _pairs(live: LiveIndex, settings: Settings, exemplar: Exemplar) -> Pairs:
    metric = FeatureMetric(live.model, live.sae, exemplar.latent)
    text = Text.of(live.index)
    pool = text.tokens[text.is_text]
    wanted, tried = settings.prompts, 0
    found: list[CorpusPair] = []
    died, control = [], []
    for candidate in _candidates(live, settings.seed, exemplar, text):
        if tried == _TRIED * wanted or len(found) == wanted:
            break
        tried += 1
        rng = np.random.default_rng((settings.seed, exemplar.latent, candidate.position))
        clean = torch.from_numpy(candidate.tokens).to(live.model.device)
        if metric.read(clean, -1).activation <= 0:  # fires with more context only
            continue
        others = candidate.others()
        if len(others) >= len(candidate.replaced):
            at = rng.choice(others, len(candidate.replaced), replace=False)
            control.append(metric.read(_corrupt(clean, at, pool, rng), -1).activation <= 0)
        try:
            made = pair(metric, clean, _corrupt(clean, candidate.replaced, pool, rng))
        except HeadscopeError:
            died.append(False)
            continue
        died.append(True)
        found.append(
            CorpusPair(made, candidate.document, tuple(candidate.replaced.tolist()), tuple(candidate.sources.tolist()))
        )
    if not found:
        raise StudyError(
            f"feature {exemplar.latent}: {len(died)} prompts cut from the corpus in which it fires, and none in which "
            "replacing its source tokens turns it off",
            expected="at least one",
            do="take a feature that depends on earlier tokens, or more prompts",
        )
    return Pairs(tuple(found), tuple(died), tuple(control))


@dataclass(frozen=True)
class _Candidate:
    position: int
    document: int
    tokens: Int[np.ndarray, " position"]
    replaced: Int[np.ndarray, " n"]
    sources: Int[np.ndarray, " n"]

    def others(self) -> Int[np.ndarray, " m"]:
        """Return the positions before the query that are neither replaced nor sources, nor the BOS."""
        every = np.arange(1, len(self.tokens) - 1)
        return every[~np.isin(every, self.replaced) & ~np.isin(every, self.sources)]


def _candidates(live: LiveIndex, seed: int, exemplar: Exemplar, text: Text) -> Iterator[_Candidate]:
    """Yield active tokens preceded by tokens to replace, one per document in turn, drawn at random."""
    size = live.index.block_size
    position = live.index.activations(exemplar.latent).position
    position = position[text.is_text.reshape(-1)[position]]
    rng = np.random.default_rng((seed, exemplar.latent))
    position = rng.permutation(position)
    document = text.document.reshape(-1)[position]
    turn = np.zeros(len(position), dtype=np.int64)
    order = np.argsort(document, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(document[order]) != 0)[: len(order)])
    turn[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    for at in position[np.argsort(turn, kind="stable")].tolist():
        block, query = divmod(at, size)
        row, is_text = text.tokens[block].astype(np.int64), text.is_text[block]
        candidate = _cut(exemplar, row, is_text, query, live.model.bos)
        if candidate is not None:
            tokens, replaced, sources = candidate
            yield _Candidate(at, int(text.document[block, query]), tokens, replaced, sources)


def _cut(
    exemplar: Exemplar, row: np.ndarray, is_text: np.ndarray, query: int, bos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the prompt, the replaced positions, and its sources; None where there is nothing to replace."""
    special = np.flatnonzero(~is_text[:query])
    first = max(query - _LONGEST + 2, int(special[-1]) + 1 if len(special) else 0)  # of the same document
    before = np.arange(first, query)
    if exemplar.kind == "induction":
        before = before[:-1]  # for an A just before the query, B would be the query
        replaced = before[(row[before] == row[query]) & np.isin(row[before + 1], exemplar.sources)]
        sources = replaced + 1
    else:
        replaced = sources = before[np.isin(row[before], exemplar.sources)]
    if not len(replaced):
        return None
    start = max(first, int(replaced[0]) - _BEFORE)
    tokens = np.concatenate([[bos], row[start : query + 1]])
    return tokens, replaced - start + 1, sources - start + 1


def _corrupt(tokens: torch.Tensor, at: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Replace some tokens by tokens drawn from the text that are not in the prompt."""
    inside = set(tokens.tolist())
    new: dict[int, int] = {}
    for place in at.tolist():
        drawn = [int(t) for t in pool[rng.integers(len(pool), size=256)] if int(t) not in inside]
        if drawn:
            new[place] = drawn[0]
    return replace_tokens(tokens, new)
