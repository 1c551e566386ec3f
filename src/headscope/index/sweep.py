"""One sweep over all activations, latent by latent: distributions, and the selection of examples. Numpy only.

Latents are taken in ranges that fit in memory. A latent that does not fit by itself is read in slices: counts cover all
of its rows, while quantiles and examples come from an even sample of them, drawn by a hash of position.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from headscope.index.config import N_BINS, QUANTILES, IndexPlan
from headscope.index.parts import SortedParts

_CONTEXT = (10, 4)  # tokens before and after that decide whether two top examples are duplicates
_WEAKEST = (1 << 32) - 1  # minus the bits of an activation: the strongest first
_CANDIDATES = 20  # multiple of the number of top examples that is searched for distinct ones

Rows = dict[str, np.ndarray]
Blocks = Int[np.ndarray, "block position"]


@dataclass(frozen=True)
class Groups:
    """Example groups of many latents, by columns; one row per group, in the order of a card."""

    latent: Int[np.ndarray, " group"]
    kind: Int[np.ndarray, " group"]
    """Index into `KINDS`."""
    number: Int[np.ndarray, " group"]
    low: Float[np.ndarray, " group"]
    high: Float[np.ndarray, " group"]
    n: Int[np.ndarray, " group"]
    """Active tokens in the group."""
    mass: Float[np.ndarray, " group"]
    """Their summed activation."""
    sampled: Bool[np.ndarray, " group"]
    """Whether both are estimated from an even sample of the latent's active tokens."""
    n_chosen: Int[np.ndarray, " group"]
    position: Int[np.ndarray, " chosen"]
    """Positions of the chosen examples, strongest first, group after group."""
    duplicates: Int[np.ndarray, " chosen"]
    """Further tokens with the same context, among the strongest searched; only `top` is searched."""


KINDS = ("top", "random", "quantile", "interval", "threshold")


@dataclass(frozen=True)
class Distributions:
    """Distributions of the activations of each latent; zeros for one that is never active."""

    quantiles: Float[np.ndarray, "latent q"]
    histogram: Int[np.ndarray, "latent bin"]
    mass: Float[np.ndarray, "latent bin"]
    central: Float[np.ndarray, "latent power"]
    """Sums of `(f - mean)^k` for k of 1 to 4: computing them from sums of `f^k` would cancel where the mean is large.
    """


def sweep(
    pairs: SortedParts,
    maximum: Float[np.ndarray, " latent"],
    mean: Float[np.ndarray, " latent"],
    blocks: Blocks,
    plan: IndexPlan,
    write: Callable[[Rows], None],
    report: Callable[[int], None],
) -> tuple[Distributions, Groups]:
    """Merge the pairs of all parts.

    Args:
        pairs: with the columns position, activation and heads.
        maximum: largest activation of each latent.
        mean: activation of each, over its active tokens.
        blocks: tokens of the corpus.
        plan: number of examples, and of rows in memory.
        write: called with consecutive rows, sorted by latent, then position.
        report: called with the number of latents done.
    """
    n = len(maximum)
    found = Distributions(
        quantiles=np.zeros((n, len(QUANTILES))),
        histogram=np.zeros((n, N_BINS), dtype=np.int64),
        mass=np.zeros((n, N_BINS)),
        central=np.zeros((n, 4)),
    )
    groups: list[Groups] = []
    for first, last in pairs.ranges(plan.range_rows):
        kept, strongest, weakest = [], [], []
        n_rows = pairs.counts[first:last].sum()
        if n_rows == 0:  # all of them dead
            report(last)
            continue
        rate = min(1.0, plan.range_rows / n_rows)
        for rows in _read(pairs, first, last, rate):
            write(rows)
            _count(found, rows, maximum, mean)
            narrow = {name: rows[name] for name in ("latent", "position", "activation")}
            kept.append(_sample(narrow, rate))
            strongest.append(_first(narrow, -narrow["activation"], plan.top * _CANDIDATES) if rate < 1 else narrow)
            weakest.append(_first(narrow, narrow["activation"], plan.near_threshold) if rate < 1 else narrow)
        rows, top, low = _joined(kept), _joined(strongest), _joined(weakest)
        if len(rows["latent"]):
            _quantiles(found.quantiles, rows)
            groups += choose_groups(rows, (top, low), pairs.counts, maximum, blocks, plan)
        report(last)
    return found, _concatenated(groups)


def _read(pairs: SortedParts, first: int, last: int, rate: float) -> Iterator[Rows]:
    names = ("position", "activation", "heads")
    if rate < 1:
        yield from pairs.slices(first, names)
    else:
        yield pairs.rows(first, last, names)


def _joined(pieces: list[Rows]) -> Rows:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def priority(position: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Map a position to a number in [0, 1) (SplitMix64), so that draws do not depend on how the work was split."""
    x = position.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) / 2.0**64


def _sample(rows: Rows, rate: float) -> Rows:
    if rate == 1:
        return rows
    chosen = priority(rows["position"]) < rate
    return {name: column[chosen] for name, column in rows.items()}


def _first(rows: Rows, by: np.ndarray, n: int) -> Rows:
    order = np.argsort(by, kind="stable")[:n]
    return {name: column[order] for name, column in rows.items()}


def _count(found: Distributions, rows: Rows, maximum: np.ndarray, mean: np.ndarray) -> None:
    """Add rows to the histograms and the central moments."""
    latent, f = rows["latent"], rows["activation"].astype(np.float64)
    if not len(latent):
        return
    first, n = latent[0], latent[-1] - latent[0] + 1
    which = np.minimum((f * (N_BINS / maximum[latent])).astype(np.int64), N_BINS - 1)
    which += (latent - first) * N_BINS
    span = slice(first, first + n)
    found.histogram[span] += np.bincount(which, minlength=n * N_BINS).reshape(n, N_BINS)
    found.mass[span] += np.bincount(which, weights=f, minlength=n * N_BINS).reshape(n, N_BINS)
    centred = f - mean[latent]
    for column, power in enumerate((centred, centred**2, centred**3, centred**4)):
        found.central[span, column] += np.bincount(latent - first, weights=power, minlength=n)


def _quantiles(quantiles: np.ndarray, rows: Rows) -> None:
    """Compute the quantiles of each latent, with linear interpolation between order statistics."""
    order = _sorted(rows["latent"], _bits(rows["activation"]))
    latent, f = rows["latent"][order], rows["activation"][order].astype(np.float64)
    present, start, n = np.unique(latent, return_index=True, return_counts=True)
    at = np.asarray(QUANTILES) * (n[:, None] - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, n[:, None] - 1)
    below, above = f[start[:, None] + low], f[start[:, None] + high]
    quantiles[present] = below + (at - low) * (above - below)


# ------------------------------------------------------------------------------------------------------------ examples
def choose_groups(
    rows: Rows, ends: tuple[Rows, Rows], counts: np.ndarray, maximum: np.ndarray, blocks: Blocks, plan: IndexPlan
) -> list[Groups]:
    """Choose the card groups of some latents: top, random, true quantiles, equal-width intervals, near threshold.

    Args:
        rows: all pairs of these latents, or an even sample of them.
        ends: the same, or at least the strongest; and the same, or at least the weakest.
        counts: active tokens of each latent of the dictionary.
        maximum: largest activation of each.
        blocks: the tokens of the corpus.
        plan: number of each.
    """
    top, low = ends
    drawn = (priority(rows["position"]) * 2**32).astype(np.int64)
    rank, n = _rank(rows["latent"], _WEAKEST - _bits(rows["activation"]))
    interval = (rows["activation"] / (maximum[rows["latent"]] / plan.intervals)).astype(np.int64)
    interval = np.clip(interval, 0, plan.intervals - 1)
    quantile = _split(rank, n, plan.quantiles)
    none = np.zeros_like(rank)
    low_rank, n_low = _rank(low["latent"], _WEAKEST - _bits(low["activation"]))
    scale = counts[rows["latent"]] / n  # 1 unless the rows are a sample
    width = maximum / plan.intervals
    chosen = [
        _top(top, blocks, plan.top),
        _groups("random", rows, none, drawn, plan.random, scale),
        _groups("quantile", rows, quantile, drawn, plan.per_quantile, scale),
        _intervals(
            _groups("interval", rows, plan.intervals - 1 - interval, drawn, plan.per_interval, scale), width, plan
        ),
        _whole("threshold", low, np.flatnonzero(n_low - 1 - low_rank < plan.near_threshold)),
    ]
    return [_by_latent(_concatenated(chosen))]


def _bits(f: Float[np.ndarray, " n"]) -> np.ndarray:
    """Map non-negative float32 to integers below 2^32 in the same order."""
    return np.ascontiguousarray(f, dtype=np.float32).view(np.uint32).astype(np.int64)


def _sorted(group: Int[np.ndarray, " n"], by: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the order by group, then by a number below 2^32, then stable; one key sorts faster than two."""
    return np.argsort((group.astype(np.int64) << 32) | by, kind="stable")


def runs(values: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """Return start and length of each run of equal numbers, which must not be negative."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return starts, np.diff(np.append(starts, len(values)))


def _rank(latent: Int[np.ndarray, " n"], by: Int[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of each row among those of its latent (0 is the smallest; stable), and the number of these."""
    order = _sorted(latent, by)
    starts, lengths = runs(latent[order])
    rank, n = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    n[order] = np.repeat(lengths, lengths)
    return rank, n


def _split(rank: np.ndarray, n: np.ndarray, parts: int) -> np.ndarray:
    """Return which of `parts` nearly equal runs each rank falls in; the first ones are longer (`np.array_split`)."""
    short, longer = np.divmod(n, parts)
    boundary = longer * (short + 1)
    late = longer + (rank - boundary) // np.maximum(short, 1)
    return np.where(rank < boundary, rank // (short + 1), late)


def _groups(
    kind: str,
    rows: Rows,
    number: np.ndarray,
    order_by: np.ndarray,
    n: int,
    scale: np.ndarray,
) -> Groups:
    """Make groups by (latent, number), with the first `n` rows of each by `order_by`, strongest first."""
    group = rows["latent"] * (number.max(initial=0) + 1) + number
    order = _sorted(group, order_by)
    start, length = runs(group[order])
    chosen = np.arange(len(order)) - np.repeat(start, length) < n
    f = rows["activation"][order].astype(np.float64)
    group = np.repeat(np.arange(len(start)), length)
    picked = np.flatnonzero(chosen)
    picked = picked[np.lexsort((rows["position"][order][picked], -f[picked], group[picked]))]
    return Groups(
        latent=rows["latent"][order][start],
        kind=np.full(len(start), KINDS.index(kind)),
        number=number[order][start],
        low=np.minimum.reduceat(f, start),
        high=np.maximum.reduceat(f, start),
        n=np.rint(length * scale[order][start]).astype(np.int64),
        mass=np.add.reduceat(f, start) * scale[order][start],
        sampled=scale[order][start] != 1,
        n_chosen=np.bincount(group[picked], minlength=len(start)),
        position=rows["position"][order][picked],
        duplicates=np.zeros(len(picked), np.int64),
    )


def _whole(kind: str, rows: Rows, at: Int[np.ndarray, " chosen"]) -> Groups:
    """Make one group per latent that contains and shows all of some rows."""
    chosen = {name: column[at] for name, column in rows.items()}
    none = np.zeros(len(at), np.int64)
    return _groups(kind, chosen, none, none, len(at), np.ones(len(at)))


def _intervals(groups: Groups, width: np.ndarray, plan: IndexPlan) -> Groups:
    """Number the groups from the lowest, with the bounds of the interval rather than of its members."""
    number = plan.intervals - 1 - groups.number
    low = number * width[groups.latent]
    fields = vars(groups) | {"number": number, "low": low, "high": low + width[groups.latent]}
    return Groups(**fields)


def _top(rows: Rows, blocks: Blocks, n: int) -> Groups:
    """Make the groups of the strongest active tokens, without duplicate contexts."""
    rank, _ = _rank(rows["latent"], _WEAKEST - _bits(rows["activation"]))
    candidates = np.flatnonzero(rank < n * _CANDIDATES)
    candidates = candidates[_sorted(rows["latent"][candidates], rank[candidates])]  # latent by latent, strongest first
    latent, position = rows["latent"][candidates], rows["position"][candidates]
    key = _text_hash(latent, position, blocks)
    _, first, which, copies = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    distinct = np.zeros(len(candidates), dtype=bool)
    distinct[first] = True
    at = np.flatnonzero(distinct)
    distinct_rank, _ = _rank(latent[at], at)
    at = at[distinct_rank < n]
    return replace(_whole("top", rows, candidates[at]), duplicates=copies[which[at]] - 1)


def _text_hash(latent: Int[np.ndarray, " n"], position: Int[np.ndarray, " n"], blocks: Blocks) -> np.ndarray:
    """Hash a latent and the tokens around a position, in order, to 64 bits."""
    before, after = _CONTEXT
    block, query = np.divmod(position, blocks.shape[1])
    at = query[:, None] + np.arange(-before, after + 1)
    inside = (at >= 0) & (at < blocks.shape[1])
    tokens = np.where(inside, blocks[block[:, None], np.clip(at, 0, blocks.shape[1] - 1)], -1)
    total = latent.astype(np.uint64) + np.uint64(1)
    for column in tokens.T:
        total = (total ^ (column + 2).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total


def _concatenated(groups: list[Groups]) -> Groups:
    names = Groups.__dataclass_fields__
    if not groups:
        kinds = {"low": float, "high": float, "mass": float, "sampled": bool}
        return Groups(**{name: np.empty(0, kinds.get(name, int)) for name in names})
    return Groups(**{name: np.concatenate([getattr(g, name) for g in groups]) for name in names})


def _by_latent(groups: Groups) -> Groups:
    """Sort the groups by latent, stable within one."""
    order = np.argsort(groups.latent, kind="stable")
    start = np.cumsum(groups.n_chosen) - groups.n_chosen
    lengths = groups.n_chosen[order]
    chosen = np.repeat(start[order] - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    fields = {
        name: getattr(groups, name)[order]
        for name in Groups.__dataclass_fields__
        if name not in ("position", "duplicates")
    }
    return Groups(**fields, position=groups.position[chosen], duplicates=groups.duplicates[chosen])


def chosen_pairs(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Return (latent, position) of all examples, each once, by position."""
    latent = np.repeat(groups.latent, groups.n_chosen)
    order = np.lexsort((latent, groups.position))
    latent, position = latent[order].astype(np.int64), groups.position[order].astype(np.int64)
    new = (np.diff(latent, prepend=-1) != 0) | (np.diff(position, prepend=-1) != 0)
    return latent[new], position[new]


def top_tokens(groups: Groups, blocks: Int[np.ndarray, "block position"], d_sae: int) -> list[list[int]]:
    """Return the tokens at each feature's top examples."""
    found: list[list[int]] = [[] for _ in range(d_sae)]
    ends = np.cumsum(groups.n_chosen)
    for i in np.flatnonzero(groups.kind == 0):
        position = groups.position[ends[i] - groups.n_chosen[i] : ends[i]]
        block, query = np.divmod(position, blocks.shape[1])
        found[int(groups.latent[i])] = blocks[block, query].tolist()
    return found
