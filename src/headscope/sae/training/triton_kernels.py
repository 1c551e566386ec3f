"""SAE training kernels for GPUs, in Triton: the functions of `kernels.py`, under the same names.

The encoder's product is the only dense one. `select_above` multiplies inputs and encoder rounded to bfloat16 on the
tensor cores and keeps one bit per (latent, row): may the pre-activation be above the limit? Those bits (1/32 of the
float32 matrix, which is never written), counted by `_CHUNK` rows, give each candidate's position: a prefix sum of the
counts, then each chunk writes its own. No atomics, no sort, no buffer of guessed size. Candidates are recomputed in
float32 by `products`, and its result decides.

With x~, w~ the rounded vectors, and d terms in a sum,

    |x.w - x~.w~| <= |x - x~| |w| + |x~| |w - w~|                       (Cauchy and Schwarz)
    |sum computed - x~.w~| <= 1.5 d 2^-23 |x~| |w~|                     (tensor cores: each term loses at most one unit
                                                                         in the last place of the sum's largest)
    |float32 x.w - x.w| <= 1.01 d 2^-24 |x| |w|                         (any order of summation, d < 2^18)

A pair is a candidate unless the rounded product plus all three bounds, and the rounding error of adding the bias, is at
most the limit. NaN is not, so an input that is not finite is decided in float32 as well. The second line is how tensor
cores from Volta to Hopper were found to add (Fasi, Higham, Mikaitis & Pranesh 2021,
https://doi.org/10.7717/peerj-cs.330); numbers below 2^-100 are ignored.

Sums are float32 in an order that depends on the shapes alone, so that a run is reproducible bit for bit. Only the
proposing kernel is autotuned, since its tuning cannot change a result.

Without a GPU everything runs in Triton's interpreter, with `TRITON_INTERPRET=1` set before triton is imported.
"""

# pyright: reportMissingImports=false
# ruff: noqa: PLR0913
# (triton exists for Linux only; a kernel has an argument for each pointer and size)

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import TrainingError
from headscope.sae.training.kernels import Pairs

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError as error:
    raise TrainingError(
        "triton is not installed", expected="it, to train on a GPU", do="pip install 'headscope[gpu]' (Linux)"
    ) from error

_INTERPRETED = bool(knobs.runtime.interpret)
_CHUNK = 128  # rows whose candidates are counted together; also the rows of a tile of the proposing kernel
_WORD = 32  # bits
_STEP = 64  # step of the proposing kernel's loop over d_in
_ITEMS = 16  # (latent, chunk) items written by one program
_ACCUMULATION = 2.0**-21  # per term and unit of |x||w|: the second and third line above, with a margin of one half
_OFFSET = 2.0**-20  # bound on the relative error of adding bias and limit, with a margin
_NORM_UP = 1 + 2.0**-10  # a computed norm times this is an upper bound of the norm
_OPTIONS = {"enable_fp_fusion": True}  # set explicitly, so that no version's default changes a sum


def _configs() -> list[Any]:
    """Return (latents of a tile, warps, stages) to tune over on Hopper and Ampere; none to tune in the interpreter."""
    choices = [(256, 8, 3), (256, 8, 4), (128, 8, 3), (128, 8, 4), (64, 4, 3), (64, 4, 4)]
    made = [triton.Config({"block": block}, num_warps=warps, num_stages=stages) for block, warps, stages in choices]
    return made[-1:] if _INTERPRETED else made


# ------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
@no_type_check
def _round_rows(vectors, rounded, size, lost, d, d_padded, norm_up, block: tl.constexpr):
    """Round one row to bfloat16, zero-padded to `d_padded`; norms of the result and of the error, rounded upwards."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    x = tl.load(vectors + row * d + column, mask=column < d, other=0.0).to(tl.float32)
    kept = x.to(tl.bfloat16)
    tl.store(rounded + row * d_padded + column, kept, mask=column < d_padded)
    back = kept.to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    unit = tl.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    a, b = back / unit, (x - back) / unit
    tl.store(size + row, unit * tl.sqrt(tl.sum(a * a, axis=0)) * norm_up)
    tl.store(lost + row, unit * tl.sqrt(tl.sum(b * b, axis=0)) * norm_up)


@triton.jit
@no_type_check
def _propose(
    latents,
    latent_size,
    latent_lost,
    latent_offset,
    rows,
    row_size,
    row_lost,
    row_offset,
    bits,
    counts,
    d_sae,
    batch,
    d_padded,
    accumulation,
    chunk: tl.constexpr,
    word: tl.constexpr,
    step: tl.constexpr,
    widen: tl.constexpr,
    block: tl.constexpr,
):
    """Compute a tile [block latents, chunk rows] of the rounded product, raised by its error bound, as bits and counts.

    Chunks run fastest: concurrent programs share a few tiles of latents, and all rows stay in the cache.
    """
    n_chunks = tl.cdiv(batch, chunk)
    of_chunk = tl.program_id(0) % n_chunks
    latent = tl.program_id(0) // n_chunks * block + tl.arange(0, block)
    row = of_chunk * chunk + tl.arange(0, chunk)
    j = tl.minimum(latent, d_sae - 1).to(tl.int64)
    n = tl.minimum(row, batch - 1).to(tl.int64)
    inner = tl.arange(0, step)
    w_at = latents + j[:, None] * d_padded + inner[None, :]
    x_at = rows + n[None, :] * d_padded + inner[:, None]
    score = tl.zeros((block, chunk), tl.float32)
    for _ in range(0, d_padded, step):
        w, x = tl.load(w_at), tl.load(x_at)
        if widen:  # the interpreter would multiply the bits of bfloat16 as integers
            w, x = w.to(tl.float32), x.to(tl.float32)
        score = tl.dot(w, x, score)
        w_at += step
        x_at += step
    w_size, w_lost = tl.load(latent_size + j), tl.load(latent_lost + j)
    x_size, x_lost = tl.load(row_size + n), tl.load(row_lost + n)
    w_full, x_full = w_size + w_lost, x_size + x_lost
    score += tl.load(latent_offset + j)[:, None] + tl.load(row_offset + n)[None, :]
    score += w_full[:, None] * (x_lost + accumulation * x_full)[None, :] + w_lost[:, None] * x_size[None, :]
    may = (score > 0) | (score != score)
    may = (may & (row < batch)[None, :]).to(tl.int32)
    there = latent < d_sae
    item = latent.to(tl.int64) * n_chunks + of_chunk
    tl.store(counts + item, tl.sum(may, axis=1), mask=there)
    shifted = tl.reshape(may, (block, chunk // word, word)) << tl.arange(0, word)[None, None, :]
    words = tl.arange(0, chunk // word)
    tl.store(bits + item[:, None] * (chunk // word) + words[None, :], tl.sum(shifted, axis=2), mask=there[:, None])


@triton.jit
@no_type_check
def _write_pairs(
    bits, ends, row, latent, n_items, n_chunks, chunk: tl.constexpr, word: tl.constexpr, items: tl.constexpr
):
    """Write the (row, latent) of each bit of some (latent, chunk) items, at the offset given by earlier counts."""
    item = tl.program_id(0).to(tl.int64) * items + tl.arange(0, items)
    there = item < n_items
    end = tl.load(ends + item, mask=there, other=0)
    start = tl.load(ends + item - 1, mask=there & (item > 0), other=0)
    if tl.max(end - start, axis=0) > 0:
        place = tl.arange(0, chunk)
        at = bits + item[:, None] * (chunk // word) + (place // word)[None, :]
        on = (tl.load(at, mask=there[:, None], other=0) >> (place % word)[None, :]) & 1
        to = start[:, None] + tl.cumsum(on, axis=1) - 1
        tl.store(row + to, (item % n_chunks * chunk)[:, None] + place[None, :], mask=on == 1)
        tl.store(latent + to, (item // n_chunks)[:, None] + place[None, :] * 0, mask=on == 1)


@triton.jit
@no_type_check
def _dot_pairs(row, latent, of_latents, of_rows, out, n_pairs, d, pairs: tl.constexpr, block: tl.constexpr):
    """Compute the dot products of some pairs' two vectors."""
    pair = tl.program_id(0).to(tl.int64) * pairs + tl.arange(0, pairs)
    there = pair < n_pairs
    n = tl.load(row + pair, mask=there, other=0).to(tl.int64)
    j = tl.load(latent + pair, mask=there, other=0).to(tl.int64)
    total = tl.zeros((pairs, block), tl.float32)
    for first in range(0, d, block):
        column = first + tl.arange(0, block)
        mask = there[:, None] & (column < d)[None, :]
        a = tl.load(of_latents + j[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(of_rows + n[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + pair, tl.sum(total, axis=1), mask=there)


@triton.jit
@no_type_check
def _sum_bags(
    starts, order, index, weights, vectors, out, d, ordered: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr
):
    """Compute one bag's weighted sum of vectors, `block` components of it: pairs `starts[bag]` to `starts[bag + 1]`."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    start, end = tl.load(starts + bag), tl.load(starts + bag + 1)
    total = tl.zeros((pairs, block), tl.float32)
    for first in range(start, end, pairs):
        pair = first + tl.arange(0, pairs)
        there = pair < end
        if ordered:
            pair = tl.load(order + pair, mask=there, other=0)
        weight = tl.load(weights + pair, mask=there, other=0.0).to(tl.float32)
        of = tl.load(index + pair, mask=there, other=0).to(tl.int64)
        mask = there[:, None] & (column < d)[None, :]
        vector = tl.load(vectors + of[:, None] * d + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += weight[:, None] * vector
    tl.store(out + bag * d + column, tl.sum(total, axis=0), mask=column < d)


_propose_tuned: Any = triton.autotune(_configs(), key=["d_sae", "batch", "d_padded"])(_propose)


# ------------------------------------------------------------------------------------------------------- three products
def products(
    pairs: Pairs, of_latents: Float[Tensor, "d_sae d"], of_rows: Float[Tensor, "batch d"]
) -> Float[Tensor, " pair"]:
    """`headscope.sae.training.kernels.products`: the dot product of each pair's two vectors, in float32.

    Raises:
        TrainingError: the vectors are neither float32 nor bfloat16.
    """
    _check(of_latents, of_rows)
    return _products(pairs.row, pairs.latent, of_latents, of_rows)


def _products(row: Tensor, latent: Tensor, of_latents: Tensor, of_rows: Tensor) -> Tensor:
    n, d = len(row), of_rows.shape[1]
    out = of_rows.new_empty(n, dtype=torch.float32)
    if n:
        tile = {"pairs": 16, "block": _power_of_two(d, at_most=128)}
        of_latents, of_rows = of_latents.contiguous(), of_rows.contiguous()
        _launch(_dot_pairs, (_parts(n, 16),), row, latent, of_latents, of_rows, out, n, d, **tile)
    return out


def sum_by_row(
    pairs: Pairs, weights: Float[Tensor, " pair"], of_latents: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """`headscope.sae.training.kernels.sum_by_row`: the weighted sum of the latents' vectors at each row, in float32.

    Raises:
        TrainingError: the numbers are neither float32 nor bfloat16.
    """
    return _bags(pairs.row_starts, pairs.to_rows, pairs.latent, weights, of_latents)


def sum_by_latent(
    pairs: Pairs,
    weights: Float[Tensor, " pair"],
    of_rows: Float[Tensor, "batch d"],
    out: Float[Tensor, "d_sae d"] | None = None,
) -> Float[Tensor, "d_sae d"]:
    """`headscope.sae.training.kernels.sum_by_latent`: the weighted sum of the rows' vectors at each latent, in float32.

    `out`, contiguous and float32, is written and returned if given.

    Raises:
        TrainingError: the numbers are neither float32 nor bfloat16.
    """
    return _bags(pairs.latent_starts, None, pairs.row, weights, of_rows, out)


def _bags(
    starts: Tensor, order: Tensor | None, index: Tensor, weights: Tensor, vectors: Tensor, out: Tensor | None = None
) -> Tensor:
    _check(weights, vectors)
    n, d = len(starts) - 1, vectors.shape[1]
    out = vectors.new_empty(n, d, dtype=torch.float32) if out is None else out
    block = _power_of_two(d, at_most=256)
    given = (starts, index if order is None else order, index, weights.contiguous(), vectors.contiguous(), out, d)
    _launch(_sum_bags, (n, _parts(d, block)), *given, ordered=order is not None, pairs=8, block=block)
    return out


# ----------------------------------------------------------------------------------------------------------- selection
def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " batch"] | None = None,
) -> tuple[Pairs, Float[Tensor, " pair"]]:
    """`headscope.sae.training.kernels.select_above`: the pairs whose pre-activation is above 0 or the row's threshold.

    The set is that of float32 arithmetic: of all pairs, those with `products(...) + bias` above the limit.

    Returns:
        The pairs and their pre-activations.

    Raises:
        TrainingError: the numbers are neither float32 nor bfloat16.
    """
    _check(x, encoder, bias)
    x, encoder, bias = x.contiguous(), encoder.contiguous(), bias.float()
    limit = torch.zeros_like(x[:, 0], dtype=torch.float32) if threshold is None else threshold.float()
    row, latent = candidates(x, encoder, bias, limit)
    pre = _products(row, latent, encoder, x) + bias[latent]
    kept = (pre > limit[row]).nonzero()[:, 0]
    return Pairs(row, latent, len(x), len(encoder)).kept(kept), pre[kept]


def candidates(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    limit: Float[Tensor, " batch"],
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Return (row, latent) of all pairs whose pre-activation may be above the row's limit, by latent, then by row.

    Uses the rounded product and its error bound (see above); the result includes all pairs that float32 finds.
    """
    batch, d_sae, device = len(x), len(encoder), x.device
    n_chunks = _parts(batch, _CHUNK)
    n_items = d_sae * n_chunks
    bits = torch.empty(n_items, _CHUNK // _WORD, dtype=torch.int32, device=device)
    counts = torch.empty(n_items, dtype=torch.int32, device=device)
    of_rows, of_latents = _rounded(x), _rounded(encoder)
    d_padded = of_rows[0].shape[1]
    _launch(
        _propose_tuned,
        lambda chosen: (_parts(d_sae, chosen["block"]) * n_chunks,),
        *(*of_latents, bias + _slack(bias), *of_rows, _slack(limit) - limit, bits, counts),
        *(d_sae, batch, d_padded, (x.shape[1] + 8) * _ACCUMULATION),
        **{"chunk": _CHUNK, "word": _WORD, "step": _STEP, "widen": _INTERPRETED},
    )
    ends = counts.cumsum(0, dtype=torch.int64)
    row, latent = torch.empty(2, int(ends[-1]), dtype=torch.int64, device=device)
    grid = (_parts(n_items, _ITEMS),)
    tile = {"chunk": _CHUNK, "word": _WORD, "items": _ITEMS}
    _launch(_write_pairs, grid, bits, ends, row, latent, n_items, n_chunks, **tile)
    return row, latent


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round vectors to bfloat16, padded to whole steps; also return the norms of the results and of the errors."""
    n, d = vectors.shape
    d_padded = _parts(d, _STEP) * _STEP
    rounded = vectors.new_empty(n, d_padded, dtype=torch.bfloat16)
    size, lost = vectors.new_empty(2, n, dtype=torch.float32)
    block = _power_of_two(d_padded)
    _launch(_round_rows, (n,), vectors, rounded, size, lost, d, d_padded, _NORM_UP, block=block)
    return rounded, size, lost


def _slack(offset: Tensor) -> Tensor:
    """Bound the rounding error of adding an offset; an infinite limit loses nothing."""
    return (offset.abs() * _OFFSET).nan_to_num(posinf=0.0)


def _launch(kernel: Any, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], *given: Any, **chosen: Any) -> None:
    kernel[grid](*given, **chosen, **_OPTIONS)


def _power_of_two(d: int, *, at_most: int | None = None) -> int:
    """Return the least power of two that is not below d."""
    power = 1 << (d - 1).bit_length()
    return power if at_most is None else min(power, at_most)


def _parts(n: int, size: int) -> int:
    """Return the number of parts of a size in n, the last one possibly smaller."""
    return -(-n // size)


def _check(*tensors: Tensor) -> None:
    for t in tensors:
        if t.dtype not in (torch.float32, torch.bfloat16):
            raise TrainingError(
                f"{t.dtype} on a GPU", expected="float32 or bfloat16", do="train in float32, or on the CPU"
            )
