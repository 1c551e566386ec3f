"""Exemplars: the feature of each family that is studied closely, chosen by a rule and not by hand. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope.errors import IndexFormatError
from headscope.index.store import FeatureIndex
from headscope.proxies import parse
from headscope.proxies.families import AfterAny, Induction, WithinAfter
from headscope.proxies.masks import vocabulary_of
from headscope.proxies.search import search
from headscope.proxies.search_records import SearchPlan
from headscope.proxies.search_table import STUDY, add_proxies, row_of
from headscope.report.records import KINDS, Exemplar, Kind, Settings

MIN_ACTIVE = 100
"""Minimum number of active tokens of an exemplar on the scoring half: fewer give unreliable numbers."""
_COLUMN: dict[Kind, str] = {"induction": "induction", "local context": "local", "high-level context": "context"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Candidate:
    """A live feature and the best proxy of one family."""

    kind: Kind
    latent: int
    proxy: str
    pearson: float
    sure: bool
    """Whether the search found enough to classify the feature into the family."""
    row: dict[str, Any]


def choose(index: FeatureIndex, settings: Settings, on_progress: Progress | None = None) -> tuple[Exemplar, ...]:
    """Choose the exemplars of an index: for each kind the feature whose best proxy correlates most with it.

    The proxy is chosen on one half of the documents and scored on the other (`proxies.search`). A feature represents a
    family when its best proxy is of that family, correlates with it at 0.3 or more, and with the lower end of its
    interval above all rotations. Features that the search classified into the family take precedence over those with
    too few documents to be sure.

    Args:
        index: open; with `settings.search` None it gets the columns `proxies`, unless it has them.
        settings: number of features to search.
        on_progress: called as features are searched.

    Returns:
        At most one of each kind, in their order.
    """
    rows = _rows(index, settings, on_progress)
    found = [candidate for row in rows for candidate in _candidates(row)]
    chosen = []
    for kind in KINDS:
        own = [c for c in found if c.kind == kind]
        if own:
            best = max(own, key=lambda c: (c.sure, c.pearson, -c.latent))
            chosen.append(_exemplar(index, best, len(own), len(rows)))
    return tuple(chosen)


def _rows(index: FeatureIndex, settings: Settings, on_progress: Progress | None) -> list[dict[str, Any]]:
    """Return the proxy results of features."""
    if settings.search is None:
        try:
            table = index.columns(STUDY)
        except IndexFormatError:
            add_proxies(index, on_progress=on_progress)
            table = index.columns(STUDY)
        return [row for row in table.to_pylist() if row["n_active"]]
    latents = _heaviest(index, settings.search)
    rows = []
    for row in map(row_of, search(index, latents)):
        rows.append(row)
        if on_progress is not None:
            on_progress("proxies", len(rows), len(latents))
    return rows


def _heaviest(index: FeatureIndex, n: int) -> list[int]:
    """Return the live features with the largest summed activation."""
    table = index.sql("SELECT latent, n_active * mean AS mass FROM features WHERE n_active > 0")
    latent, mass = table["latent"].to_numpy(), table["mass"].to_numpy()
    return latent[np.argsort(-mass, kind="stable")[:n]].tolist()


def _candidates(row: dict[str, Any]) -> list[_Candidate]:
    """Return the candidates of a feature: the family of its best proxy, if that is one of the post's three."""
    if row["n_active"] < MIN_ACTIVE or row.get("pearson") is None:
        return []
    null, low = row["pearson_null_high"], row["pearson_low"]
    surely = row["pearson"] if low is None else low
    if row["pearson"] < SearchPlan().min_pearson or (null is not None and surely <= null):
        return []
    return [
        _Candidate(kind, row["latent"], row["proxy"], row["pearson"], row["kind"] == kind, row)
        for kind, column in _COLUMN.items()
        if row.get(f"{column}_proxy") == row["proxy"]
    ]


def _exemplar(index: FeatureIndex, best: _Candidate, n_family: int, n_searched: int) -> Exemplar:
    token = index.feature(best.latent).logit_top[0][0]
    doubt = "" if best.sure else "; too few documents or tokens to be sure of the family"
    why = (
        f"largest correlation with its best proxy, on documents the proxy was not chosen on, among the {n_family} of "
        f"{n_searched:,} features searched whose best proxy is of this family{doubt}"
    )
    return Exemplar(best.kind, best.latent, best.proxy, best.pearson, token, _sources(index, best), why)


def _sources(index: FeatureIndex, best: _Candidate) -> tuple[int, ...]:
    """Return the tokens the proxy names, which should be the source tokens."""
    match parse(best.proxy):
        case Induction(token=token):
            named = [token]
        case WithinAfter(tokens=tokens) | AfterAny(tokens=tokens):
            named = list(tokens)
        case _:  # a union of them
            found = index.sources(best.latent)
            return () if found is None else tuple(source.token for source in found.tokens[:3])
    return tuple(vocabulary_of(index).ids(named).tolist())
