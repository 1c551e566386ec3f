"""Excerpts of an index's text as JSON, each token once."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from headscope.encode import Json
from headscope.index.store import FeatureIndex

Runs = dict[int, list[tuple[int, int]]]
"""Ranges [start, end) of blocks, by block, sorted and disjoint."""


def join_runs(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges and merge those that touch or are one token apart."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if joined and start <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def text_runs(blocks: Iterable[int], runs: Iterable[list[tuple[int, int]]]) -> Runs:
    """Yield all ranges of each block, each token once."""
    made: Runs = {}
    for block, own in zip(blocks, runs, strict=True):
        made.setdefault(block, []).extend(own)
    return {block: join_runs(own) for block, own in sorted(made.items())}


def text_json(runs: Runs, tokens_of: Callable[[int], Int[np.ndarray, " position"]]) -> list[list[Any]]:
    """Write ranges of text as [block, start, ids]."""
    made = []
    for block, own in runs.items():
        tokens = tokens_of(block)
        made += [[block, start, tokens[start:end].tolist()] for start, end in own]
    return made


def corpus_json(runs: Runs, index: FeatureIndex) -> Json:
    """Return the text of some ranges, with the document at each of their positions."""
    where, names = {}, {}
    for block, own in runs.items():
        document = index.documents_of(block)
        starts = [0, *(np.flatnonzero(document[1:] != document[:-1]) + 1).tolist()]
        where[block] = [[start, int(document[start])] for start in starts if start < own[-1][1]]
        names |= {number: index.documents[number] for _, number in where[block]}
    return {"text": text_json(runs, index.tokens_of), "document_at": where, "documents": names}
