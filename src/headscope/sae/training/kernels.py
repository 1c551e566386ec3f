"""Sparse arithmetic of SAE training: selecting active latents, and products over active pairs only.

With L0 active latents of d_sae on each input, the only dense product in a step is the encoder's; decoding and all
gradients are sums over the active (input, latent) pairs. Three operations cover every variant of the objective:

    products       p_i = a[latent_i] . b[row_i]                         values of pairs, gradients of activations
    sum_by_row     out[n] = sum over pairs of row n:    w_i a[latent_i]  decoding
    sum_by_latent  out[j] = sum over pairs of latent j: w_i b[row_i]     gradients of encoder and decoder

A batch with a large share of active pairs uses dense products instead, with the same results.

Where the processor has fast int8 products, the encoder's product is quantised and only proposes candidates, which are
then computed in float32 (`headscope.sae.training.proposals`).
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from headscope.sae.training import c_kernels
from headscope.sae.training.proposals import BLOCK, fast_bytes, proposed, proposed_topk
from headscope.sae.training.ranks import ALONE, Ranks

DENSE_ABOVE = 0.1
"""Share of active pairs above which dense products are faster."""


@dataclass(frozen=True)
class Pairs:
    """Active (input, latent) pairs of a batch, sorted by latent, then by row."""

    row: Int[Tensor, " pair"]
    latent: Int[Tensor, " pair"]
    batch: int
    d_sae: int

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.row)

    @property
    def dense(self) -> bool:
        """Whether there are so many that dense products are faster."""
        return len(self) > DENSE_ABOVE * self.batch * self.d_sae

    @cached_property
    def latent_starts(self) -> Int[Tensor, " starts"]:
        """Offset of each latent's first pair, and the end."""
        return _offsets(self.latent, self.d_sae)

    @cached_property
    def to_rows(self) -> Int[Tensor, " pair"]:
        """The permutation that sorts pairs by row, then by latent."""
        if self.row.is_cpu and c_kernels.library() is not None:
            return c_kernels.order_by_row(self.row, self.row_starts)
        return self.row.argsort(stable=True)

    @cached_property
    def row_starts(self) -> Int[Tensor, " starts"]:
        """Offset of each row's first pair in that order, and the end."""
        return _offsets(self.row, self.batch)

    def kept(self, which: Tensor) -> "Pairs":
        """Select pairs by a mask, or by ascending indices."""
        return Pairs(self.row[which], self.latent[which], self.batch, self.d_sae)

    def between(self, first: int, end: int) -> tuple["Pairs", slice]:
        """Return the pairs of a range of latents, numbered from its start, and their slice."""
        if (first, end) == (0, self.d_sae):
            return self, slice(None)  # with cached properties
        at = slice(*self.latent_starts[[first, end]].tolist())
        return Pairs(self.row[at], self.latent[at] - first, self.batch, end - first), at

    def matrix(self, weights: Float[Tensor, " pair"]) -> Float[Tensor, "batch d_sae"]:
        """Return the weights as a matrix that is zero elsewhere."""
        full = weights.new_zeros(self.batch, self.d_sae)
        full[self.row, self.latent] = weights
        return full

    def latent_sums(self, weights: Float[Tensor, " pair"]) -> Float[Tensor, " d_sae"]:
        """Return the sum of each latent's weights."""
        if weights.is_cuda:  # addition there has no fixed order
            return sum_by_latent(self, weights, weights.new_ones(self.batch, 1))[:, 0]
        return weights.new_zeros(self.d_sae).index_add_(0, self.latent, weights)


def _offsets(sorted_or_not: Int[Tensor, " pair"], n: int) -> Int[Tensor, " starts"]:
    counts = torch.bincount(sorted_or_not, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


# ------------------------------------------------------------------------------------------------------- three products
def products(
    pairs: Pairs, of_latents: Float[Tensor, "d_sae d"], of_rows: Float[Tensor, "batch d"]
) -> Float[Tensor, " pair"]:
    """Compute the dot product of each pair's two vectors."""
    if pairs.dense:
        return (of_latents @ of_rows.T)[pairs.latent, pairs.row]
    if (gpu := gpu_kernels(of_rows)) is not None:
        return gpu.products(pairs, of_latents, of_rows)
    if c_kernels.fit(of_latents, of_rows):
        return c_kernels.products(pairs.latent, pairs.row, of_latents, of_rows)
    _quiet_csr()
    zeros = of_rows.new_zeros(len(pairs))
    shape = (pairs.d_sae, pairs.batch)
    where = torch.sparse_csr_tensor(pairs.latent_starts, pairs.row, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(where, of_latents, of_rows.T, beta=0.0).values()


def sum_by_row(
    pairs: Pairs, weights: Float[Tensor, " pair"], of_latents: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """Compute the weighted sum of the latents' vectors at each row; zero at rows without pairs."""
    if pairs.dense:
        return pairs.matrix(weights) @ of_latents
    if (gpu := gpu_kernels(of_latents)) is not None:
        return gpu.sum_by_row(pairs, weights, of_latents)
    order = pairs.to_rows
    return _bags(pairs.latent[order], pairs.row_starts, weights[order], of_latents)


def sum_by_latent(
    pairs: Pairs,
    weights: Float[Tensor, " pair"],
    of_rows: Float[Tensor, "batch d"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """Compute the weighted sum of the rows' vectors at each latent; zero at latents without pairs.

    `out`, if given, is written and returned: allocating memory of this size costs the CPU more than the sum.
    """
    if pairs.dense:
        return torch.mm(pairs.matrix(weights).T, of_rows, out=out)
    if (gpu := gpu_kernels(of_rows)) is not None:
        return gpu.sum_by_latent(pairs, weights, of_rows, out)
    if out is None or c_kernels.fit(weights, of_rows, out):
        return _bags(pairs.row, pairs.latent_starts, weights, of_rows, out)
    firsts = range(0, pairs.d_sae, BLOCK)
    ends = pairs.latent_starts[BLOCK::BLOCK].tolist()
    for first, start, end in zip(firsts, [0, *ends], [*ends, len(pairs)], strict=False):
        starts = pairs.latent_starts[first : first + BLOCK + 1] - start
        at = slice(start, end)
        _bags(pairs.row[at], starts, weights[at], of_rows, out[first : first + BLOCK])
    return out


def _bags(indices: Tensor, starts: Tensor, weights: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor:
    if c_kernels.fit(weights, vectors):
        return c_kernels.weighted_sums(indices, starts, weights, vectors, out)
    bags = embedding_bag(indices, vectors, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return bags if out is None else out.copy_(bags)


def take_parallel(gradient: Float[Tensor, "d_sae d"], unit_vectors: Float[Tensor, "d_sae d"]) -> None:
    """Subtract from each row of a gradient, in place, its component along the same row of unit-norm vectors."""
    if c_kernels.fit(gradient, unit_vectors) and gradient.is_contiguous():
        c_kernels.take_parallel(gradient, unit_vectors)
        return
    for d_rows, rows in zip(gradient.split(BLOCK), unit_vectors.split(BLOCK), strict=True):
        d_rows.addcmul_(rows, torch.linalg.vecdot(d_rows, rows)[:, None], value=-1)


def gpu_kernels(like: Tensor) -> ModuleType | None:
    """Return the same functions as Triton kernels, for tensors that these support."""
    if not like.is_cuda or like.dtype == torch.float64 or find_spec("triton") is None:
        return None
    from headscope.sae.training import triton_kernels

    return triton_kernels


@cache
def _quiet_csr() -> None:
    """Suppress the warning that compressed sparse tensors are in beta; torch issues it once per process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


# ------------------------------------------------------------------------------------------------------------ selection
def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " batch"] | None = None,
) -> tuple[Pairs, Float[Tensor, " pair"]]:
    """Return all pairs whose pre-activation `x . encoder_j + bias_j` is above 0, or above the row's threshold.

    The set is that of float32 arithmetic (float64 for such inputs), whatever the method.

    Returns:
        The pairs and their pre-activations.
    """
    if (gpu := gpu_kernels(x)) is not None:
        return gpu.select_above(x, encoder, bias, threshold)
    batch, d_sae = len(x), len(encoder)
    limit = x.new_zeros(batch) if threshold is None else threshold
    if _bytes_do(x) and (found := proposed(x, encoder, bias, limit, DENSE_ABOVE * batch * d_sae)) is not None:
        latent, row = found
        return _decided(Pairs(row, latent, batch, d_sae), x, encoder, bias, limit)
    parts = list(_computed(x, encoder, bias, limit))
    latent, row, pre = (torch.cat(same) for same in zip(*parts, strict=True))
    return Pairs(row, latent, batch, d_sae), pre


def _bytes_do(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and fast_bytes()


def _decided(pairs: Pairs, x: Tensor, encoder: Tensor, bias: Tensor, limit: Tensor) -> tuple[Pairs, Tensor]:
    """Select the pairs that are above their limits in float32, and their pre-activations."""
    pre = products(pairs, encoder, x) + bias[pairs.latent]
    kept = (pre > limit[pairs.row]).nonzero()[:, 0]
    return pairs.kept(kept), pre[kept]


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    n: int,
    guess: float | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Pairs, Float[Tensor, " pair"]]:
    """Select the n largest pre-activations of the whole batch, without non-positive ones.

    Args:
        x: inputs.
        encoder: by latent.
        bias: of the latents.
        n: number of pairs.
        guess: of the n-th largest value; affects only speed.
        ranks: the processes whose inputs together form the batch.
    """
    if guess is None:
        share = n / (len(x) * ranks.size * len(encoder))
        [guess] = ranks.mean(_guessed(x, encoder, bias, share))
    bound = _usable(guess)
    while True:
        pairs, pre = select_above(x, encoder, bias, x.new_full((len(x),), bound))
        [mean] = ranks.mean(len(pairs))
        if round(mean * ranks.size) >= n or bound == 0:
            break
        bound = bound * 0.7 if bound > 1e-6 else 0.0
    if ranks.size > 1:
        kept = (pre >= ranks.nth_largest(pre, n)).nonzero()[:, 0]
    else:
        kept = pre.topk(min(n, len(pre)), sorted=False).indices.sort().values
    return pairs.kept(kept), pre[kept]


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    guess: float | None = None,
) -> tuple[Pairs, Float[Tensor, " pair"]]:
    """Select the k largest pre-activations of each row, without non-positive ones.

    Args:
        x: inputs.
        encoder: by latent.
        bias: of the latents.
        k: number per row.
        guess: of the least, over rows, k-th largest value in units of the row's norm; affects only speed, and is unused
            where limits come from int8 products.
    """
    if _bytes_do(x) and (proposals := proposed_topk(x, encoder, bias, k)) is not None:
        latent, row, limit = proposals
        pairs, pre = _decided(Pairs(row, latent, len(x), len(encoder)), x, encoder, bias, limit)
    else:
        bound = _usable(_guessed_topk(x, encoder, bias, k) if guess is None else guess)
        size = torch.linalg.vector_norm(x, dim=1)
        limit = torch.where(size.isfinite(), size * bound, 0.0)
        pairs, pre = select_above(x, encoder, bias, limit)
    found = torch.bincount(pairs.row, minlength=len(x))
    short = (found < k) & (limit > 0)
    if short.any():  # rows for which the limit was too high
        which = short.nonzero()[:, 0]
        latent, row, values = (torch.cat(same) for same in zip(*_topk_dense(x, encoder, bias, k, which), strict=True))
        keep = ~short[pairs.row]
        pairs, pre = _sorted(
            torch.cat([pairs.latent[keep], latent]),
            torch.cat([pairs.row[keep], row]),
            torch.cat([pre[keep], values]),
            pairs,
        )
    kept = _largest_of_rows(pairs, pre, k)
    return pairs.kept(kept), pre[kept]


def _largest_of_rows(pairs: Pairs, pre: Tensor, k: int) -> Bool[Tensor, " pair"]:
    """Mark the k largest pairs of each row; of equal ones the first."""
    order = pairs.to_rows
    if c_kernels.fit(pre):
        return c_kernels.largest_of_pairs(pre, order, pairs.row_starts, k)
    row = pairs.row[order]
    place = torch.arange(len(pairs), device=pre.device) - pairs.row_starts[row]
    width = max(k, int(place.max()) + 1 if len(pairs) else 0)
    table = pre.new_full((pairs.batch, width), -math.inf)
    table[row, place] = pre[order]
    least = table.kthvalue(width - k + 1, dim=1, keepdim=True).values
    above, equal = table > least, table == least
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    kept = torch.empty_like(pairs.row, dtype=torch.bool)
    kept[order] = chosen[row, place]
    return kept


def _guessed_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> float:
    """Estimate a value that the k-th largest pre-activations of nearly all rows exceed, in units of their norms."""
    rows = x[:: max(1, len(x) // 64)]
    least = torch.addmm(bias, rows, encoder.T).topk(min(k, len(encoder)), dim=1).values[:, -1]
    return 0.9 * (least / torch.linalg.vector_norm(rows, dim=1).clamp_min(1e-12)).min().item()


def _topk_dense(
    x: Tensor, encoder: Tensor, bias: Tensor, k: int, which: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return (latent, row, pre-activation) of the k largest of some rows, without non-positive ones."""
    for rows in which.split(BLOCK):
        pre, latent = torch.addmm(bias, x[rows], encoder.T).topk(min(k, len(encoder)), dim=1)
        positive = pre > 0
        yield latent[positive], rows[:, None].expand_as(pre)[positive], pre[positive]


def _usable(guess: float) -> float:
    """Whether a search terminates from this guess; overflowed weights give guesses from which it does not."""
    return guess if 0 < guess < math.inf else 0.0


def _guessed(x: Tensor, encoder: Tensor, bias: Tensor, share: float) -> float:
    """Estimate a value that slightly more than a share of all pre-activations exceed, from some of the rows."""
    rows = x[:: max(1, len(x) // 64)]
    pre = torch.addmm(bias, rows, encoder.T).flatten()
    n = min(len(pre), round(1.3 * share * len(pre)) + 8)
    return max(0.0, pre.topk(n).values[-1].item())


def _sorted(latent: Tensor, row: Tensor, values: Tensor, like: Pairs) -> tuple[Pairs, Tensor]:
    order = (latent * like.batch + row).argsort()
    return Pairs(row[order], latent[order], like.batch, like.d_sae), values[order]


def _computed(x: Tensor, encoder: Tensor, bias: Tensor, limit: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(encoder), BLOCK):
        block = slice(start, start + BLOCK)
        pre = torch.addmm(bias[block, None], encoder[block], x.T)
        latent, row = (pre > limit).nonzero(as_tuple=True)
        yield latent + start, row, pre[latent, row]
