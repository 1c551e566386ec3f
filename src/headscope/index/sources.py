"""Sums by (latent, threshold, source token), in bounded memory: rows are merged by key, and the smallest dropped."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_COMPACT_ROWS = 1 << 19


def merge_by_key(
    key: Int[Tensor, " row"], values: Float[Tensor, "row column"]
) -> tuple[Int[Tensor, " key"], Float[Tensor, "key column"]]:
    """Sum the rows of each key, in order; returned keys are sorted."""
    key, order = key.sort(stable=True)
    unique, which = torch.unique_consecutive(key, return_inverse=True)
    merged = torch.zeros(len(unique), values.shape[1], dtype=values.dtype, device=values.device)
    return unique, merged.index_add_(0, which, values.index_select(0, order))


def keep_largest(
    key: Int[Tensor, " key"], values: Float[Tensor, "key column"], owner: Int[Tensor, " key"], weight: int, n: int
) -> tuple[Int[Tensor, " kept"], Float[Tensor, "kept column"]]:
    """Select the n keys of each owner (sorted) with the largest value in the column `weight`."""
    by_weight = values[:, weight].sort(descending=True, stable=True).indices
    by_owner = by_weight[owner[by_weight].sort(stable=True).indices]  # owner by owner, largest first
    starts = torch.cat([owner.new_zeros(1), torch.unique_consecutive(owner, return_counts=True)[1].cumsum(0)])
    start_of = torch.repeat_interleave(starts[:-1], starts.diff())
    keep = by_owner[torch.arange(len(key), device=key.device) - start_of < n].sort().values
    return key[keep], values.index_select(0, keep)


class SourceSums:
    """Sums by key over a stream of rows; only the `n` keys of largest weight per owner are guaranteed to be kept."""

    def __init__(self, n_tokens: int, weight: int, n: int | None) -> None:
        """Start empty. Keys are `owner * n_tokens + token`; `weight` is the column to rank by; `n` None: keep all."""
        self._n_tokens, self._weight, self._n = n_tokens, weight, n
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._rows, self._limit = 0, _COMPACT_ROWS

    def add(self, key: Int[Tensor, " row"], values: Float[Tensor, "row column"]) -> None:
        """Add rows."""
        key, values = merge_by_key(key, values)
        self._pieces.append((key, values))
        self._rows += len(key)
        if self._rows > self._limit:
            self._compact()

    def _compact(self) -> None:
        """Merge all pieces into one; repeated each time the size has doubled."""
        key, values = (torch.cat(column) for column in zip(*self._pieces, strict=True))
        key, values = merge_by_key(key, values.double())
        if self._n is not None:
            key, values = keep_largest(key, values, key // self._n_tokens, self._weight, self._n)
        self._pieces, self._rows = [(key, values)], len(key)
        self._limit = max(_COMPACT_ROWS, 2 * len(key))

    def result(self) -> tuple[Int[Tensor, " key"], Float[Tensor, "key column"]]:
        """Return the sorted keys and their sums."""
        if not self._pieces:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.float64)
        self._compact()
        return self._pieces[0]
