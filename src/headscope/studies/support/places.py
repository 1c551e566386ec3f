"""Corpus positions shown by a study, with the text around them."""

import numpy as np
from jaxtyping import Bool, Int

from headscope.encode import Json, significant
from headscope.index.excerpts import corpus_json, text_runs
from headscope.index.records import Activations
from headscope.index.store import FeatureIndex

_REACH = 16  # tokens shown on each side of a position


class Places:
    """Distinct positions of the corpus, with the feature's and proxy's values around them."""

    def __init__(self, index: FeatureIndex, active: Activations, mask: Bool[np.ndarray, " token"]) -> None:
        """Start empty.

        Args:
            index: the index of the corpus.
            active: where the feature is active.
            mask: where its proxy is true, over the whole corpus.
        """
        self._index, self._active, self._mask = index, active, mask
        self._row: dict[int, int] = {}

    def rows(self, positions: Int[np.ndarray, " place"]) -> list[int]:
        """Add positions; return their indices in `as_json()["contexts"]`."""
        return [self._row.setdefault(position, len(self._row)) for position in positions.tolist()]

    def as_json(self, changes: dict[int, float] | None = None) -> Json:
        """Return the positions in order, the text around them, and the changes at the positions there."""
        size = self._index.block_size
        contexts, runs = [], []
        for position in self._row:
            block, offset = divmod(position, size)
            start, end = max(0, offset - _REACH), min(size, offset + _REACH + 1)
            context = self._context(block * size, offset, start, end) | {"block": block}
            if changes is not None:
                context["change"] = [
                    [p, changes[block * size + p]] for p in range(start, end) if block * size + p in changes
                ]
            contexts.append(context)
            runs.append([(start, end)])
        blocks = [c["block"] for c in contexts]
        return {"contexts": contexts, **corpus_json(text_runs(blocks, runs), self._index)}

    def _context(self, base: int, offset: int, start: int, end: int) -> Json:
        position, activation = self._active.position, self._active.activation
        first, last = np.searchsorted(position, [base + start, base + end])
        at = (position[first:last] - base).tolist()
        on = list(zip(at, significant(activation[first:last]), strict=True))
        true = (np.flatnonzero(self._mask[base + start : base + end]) + start).tolist()
        return {"dst": offset, "act": dict(on).get(offset, 0.0), "on": on, "proxy": true}
