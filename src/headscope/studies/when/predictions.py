"""The model's predictions at a feature's false negatives, compared with its true positives.

The post (Kissane et al., 2024) judged by eye that "board" should not be predicted at the false negatives of its
induction feature; here the model's predictions are measured. It runs on the necessary blocks only.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from headscope.errors import StudyError
from headscope.index.store import FeatureIndex
from headscope.models.hf import Model
from headscope.proxies import Proxy, Token, vocabulary_of
from headscope.stats import MINIMUM, MINIMUM_UNITS, Measure, Ranking, clustered_auc, quotient, resampled, unit_draws
from headscope.studies.when.records import PredictionGroup, Predictions
from headscope.studies.when.split import Split


def predictions(
    index: FeatureIndex,
    model: Model,
    latent: int,
    proxy: Proxy | str | Bool[np.ndarray, " token"],
    tokens: Sequence[Token] | None = None,
    *,
    n_examples: int = 200,
    batch_size: int = 8,
    seed: int = 0,
) -> Predictions:
    """Compare p(X) at false negatives, true positives and elsewhere.

    Args:
        index: open.
        model: the one it was built with.
        latent: the feature.
        proxy: its text, or a mask.
        tokens: X, by text or id; default: the feature's top logit token.
        n_examples: maximum number of tokens per kind, sampled at random.
        batch_size: blocks per run of the model.
        seed: seed of the sample.

    Raises:
        IndexFormatError: another model, or no such latent.
        ProxyError: a proxy that cannot be evaluated, or no such token.
        StudyError: no token, or fewer than one example.
    """
    index.check_same(model=model)
    chosen = [index.feature(latent).logit_top[0][0]] if tokens is None else tokens
    ids = np.unique(vocabulary_of(index).ids(chosen))
    if not len(ids) or n_examples < 1:
        raise StudyError(f"{len(ids)} tokens, {n_examples} examples", expected="at least one", do="name a token")
    split, name = Split.read(index, latent, proxy)
    active = np.zeros_like(split.mask)
    active[split.position] = True
    kinds = {
        "false negatives": split.mask & ~active,
        "true positives": split.mask & active,
        "elsewhere": split.text.is_text & ~split.mask & ~active,
    }
    rng = np.random.default_rng(seed)
    everywhere = {kind: np.flatnonzero(mask) for kind, mask in kinds.items()}
    drawn = {
        kind: np.sort(rng.choice(every, min(n_examples, len(every)), replace=False))
        for kind, every in everywhere.items()
    }
    p = next_token_probability(index, model, ids, np.concatenate(list(drawn.values())), batch_size=batch_size)
    parts = np.split(p, np.cumsum([len(at) for at in drawn.values()])[:-1])
    found = [
        PredictionGroup(kind, len(everywhere[kind]), at, part, _mean(part, split.text.unit[at], seed))
        for (kind, at), part in zip(drawn.items(), parts, strict=True)
    ]
    missed, hit, elsewhere = found
    return Predictions(latent, name, tuple(ids.tolist()), missed, hit, elsewhere, _auc(hit, missed, split))


def next_token_probability(
    index: FeatureIndex,
    model: Model,
    tokens: Int[np.ndarray, " id"],
    position: Int[np.ndarray, " position"],
    *,
    batch_size: int = 8,
) -> Float[np.ndarray, " position"]:
    """Return the model's probability that the next token is one of `tokens`, at some positions of an index's corpus.

    Raises:
        IndexFormatError: a position outside the corpus.
    """
    block, query = np.divmod(position, index.block_size)
    blocks, row = np.unique(block, return_inverse=True)
    found = np.zeros(len(position))
    ids = torch.from_numpy(tokens).to(model.device)
    for first in range(0, len(blocks), batch_size):
        batch = np.stack([index.tokens_of(int(b)) for b in blocks[first : first + batch_size]]).astype(np.int64)
        logits = model.logits(torch.from_numpy(batch).to(model.device))
        here = np.flatnonzero((row >= first) & (row < first + batch_size))
        at = torch.from_numpy(row[here] - first), torch.from_numpy(query[here])
        found[here] = logits[at].double().softmax(-1)[:, ids].sum(-1).cpu().numpy()
    return found


def _mean(p: Float[np.ndarray, " token"], unit: Int[np.ndarray, " token"], seed: int) -> Measure:
    measure = Measure("mean probability that the next token is one of X", len(p))
    if len(p) < MINIMUM:
        return replace(measure, missing=f"{len(p)} tokens: at least {MINIMUM} are needed")
    _, of = np.unique(unit, return_inverse=True)
    sums = np.stack([np.bincount(of, p), np.bincount(of).astype(np.float64)], axis=1)
    bounds = resampled(quotient, sums, unit_draws(len(sums), n_samples=1000, seed=seed))
    return _bounded(replace(measure, value=float(p.mean())), bounds, "bootstrap over documents, 95 %", len(sums))


def _auc(hit: PredictionGroup, missed: PredictionGroup, split: Split) -> Measure:
    definition = "P(p(X) at a true positive > at a false negative) + P(equal) / 2"
    measure = Measure(definition, len(hit.position) + len(missed.position))
    for group in (hit, missed):
        if len(group.position) < MINIMUM:
            few = f"{len(group.position)} {group.name}: at least {MINIMUM} are needed"
            return replace(measure, missing=few)
    p = np.concatenate([hit.probability, missed.probability])
    order = np.argsort(-p)
    true = order < len(hit.position)
    ranking = Ranking.of(p[order], true, 0, 0)
    position = np.concatenate([hit.position, missed.position])[order]
    units, of = np.unique(split.text.unit[position], return_inverse=True)
    group = np.searchsorted(ranking.n, np.arange(len(p)), side="right")
    placed = zip((true, ~true), ranking.placements(), strict=True)
    sums = [np.bincount(of[own], by_group[group[own]], minlength=len(units)) for own, by_group in placed]
    counts = [np.bincount(of[own], minlength=len(units)) for own in (true, ~true)]
    bounds = clustered_auc(ranking.auc(), *sums, *counts)
    how = "over documents, 95 % (Obuchowski 1997)"
    return _bounded(replace(measure, value=ranking.auc()), bounds, how, len(units))


def _bounded(measure: Measure, bounds: tuple[float, float] | None, how: str, n_documents: int) -> Measure:
    if bounds:
        return replace(measure, low=bounds[0], high=bounds[1], interval=how)
    few = f"{n_documents} documents, at least {MINIMUM_UNITS} are needed"
    return replace(measure, missing=f"no interval: {few if n_documents < MINIMUM_UNITS else 'they all agree'}")
