"""Find candidate active (input, latent) pairs by an int8 matrix product.

Processors multiply int8 several times as fast as float32. Each vector is divided by its own scale and rounded, `x
/ s = x^ + error` with components from -127 to 127, and the product of the integers, which is exact, is raised by a
bound on the rounding error. With `lost = |x / s - x^|` and `size = |x^| + lost`, of input and latent,

    |x.w / (s t) - x^.w^|  <=  lost_x size_w + size_x lost_w            (Cauchy and Schwarz).

Bound, bias and limit are added through a few more integer components, rounded in the direction that raises the sum. So
any pair above its limit has a product above zero; those pairs are recomputed in float32, which decides. Limits derived
from the products themselves, for the k largest of a row, are compared with them afterwards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch import _int_mm as int_mm  # pyright: ignore[reportPrivateImportUsage] - no public function has it
from torch.nn.functional import pad

from headscope.sae.training import c_kernels

BLOCK = 1024
"""Latents processed together."""
_PRODUCTS = 2**22  # in memory at a time, unless one part is larger
_ROWS = 1024  # inputs whose bytes fit the processor's cache, where products are computed tile by tile
_WIDEST = 2**13  # components for which 32 latents fit a thread's stack there
_PART = 64  # minimum number of inputs processed together
_GROUP = 8  # latents in a group at first
_SPREAD = 8  # times k: groups among which the k-th largest is looked for
_MARGIN = 1.2  # multiple of what was added to a product that is subtracted for a value below it
_MOST = 127  # of a byte
_SHARE = 126  # digit of a share of 1, which rounding must not lift above what a byte holds
_ACCUMULATION = 2.0**-22  # error of a float32 sum, a term and unit of the product of norms; four times the bound
_LEAST, _LARGEST = 1e-15, 1e15  # components that are scaled: float32 loses nothing of products but by rounding
_OUTLYING = 8  # times the median of components, in size, from which one is shared out
_MOST_SHARED = 2.0**40
_SLACK = 1e-4  # relative, for what float32 rounds in bounds and shares, and in adding the bias


@cache
def fast_bytes() -> bool:
    """Whether this processor multiplies int8 faster than float32, and exactly."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported()) and exact_bytes()


def exact_bytes() -> bool:
    """Whether int8 products are exact here: older instructions saturate sums of two of them at 16 bits."""
    most = torch.full((_GROUP, 64), _MOST, dtype=torch.int8)
    return bool((int_mm(most, most.T) == 64 * _MOST**2).all())


class Side(NamedTuple):
    """Inputs or latents, before rounding."""

    vectors: Float[Tensor, "n d"]
    largest: Float[Tensor, " n"]
    """Largest component of each vector."""
    floor: float
    """Lower bound of `largest` for the scale: smaller vectors have fewer digits."""
    offset: Float[Tensor, " n"]
    """Added to all products of a vector."""

    def part(self, start: int, end: int) -> "Side":
        """Return a slice of the vectors."""
        return Side(self.vectors[start:end], self.largest[start:end], self.floor, self.offset[start:end])

    @property
    def scale(self) -> Float[Tensor, " n"]:
        """The divisor of the vectors."""
        return self.largest.clamp_min(self.floor) / _MOST

    def digits(self, floor: float) -> Float[Tensor, " n"]:
        """Return the offset where the other side's scale is that of its floor, for one component of `_SHARE` there.

        In float64, where the least float32 divided by a scale is not zero.
        """
        return self.offset.double() / self.scale / (floor / _MOST) / _SHARE


@dataclass(frozen=True)
class Layout:
    """Number of components of each term, and how it is split between the two sides."""

    lost: float
    """Factor on `lost`, by which `size` is divided."""
    bound: int
    """Components of each half of the bound."""
    raising: tuple[int, int]
    """Components of positive offsets, of inputs and of latents."""
    lowering: tuple[int, int]
    """Components of negative ones."""

    @property
    def width(self) -> int:
        """Components of all terms."""
        return 2 * self.bound + sum(self.raising) + sum(self.lowering)


class Rounded(NamedTuple):
    """Both sides as int8, with the components that raise products."""

    inputs: Int8[Tensor, "batch width"]
    latents: Int8[Tensor, "groups_of_8 width"]
    """Padded with zeros, whose products are never above zero."""
    everywhere: Int[Tensor, " some"]
    """Latents whose biases exceed what components can hold: their products count as above zero."""
    bound: slice
    """The two components that add the bound of the rounding error."""
    times: int
    """Repetitions of each of the two."""
    biases: int
    """Components of biases, which are the last of latents."""

    def added(self, n: int) -> Float[Tensor, "group batch"]:
        """Return the most that bound and rounding of biases add to products of inputs, per group of n latents."""
        of_latents = self.latents[:, self.bound].view(-1, n, 2).amax(1).float()
        bound = of_latents @ self.inputs[:, self.bound].T.float() * self.times
        digits = self.latents[:, self.latents.shape[1] - self.biases :].abs().sum(1)
        return bound + digits.view(-1, n).amax(1)[:, None] + self.biases * _SHARE

    def parts(self, *, tiles: bool) -> Iterator[c_kernels.Products | c_kernels.Tiles]:
        """Yield the raised products of all latents with some inputs, in memory that the next part overwrites.

        Args:
            tiles: use products tile by tile, where the processor supports them.
        """
        if tiles and self.latents.shape[1] <= _WIDEST and not len(self.everywhere) and c_kernels.tiles_fit():
            for start in range(0, len(self.inputs), _ROWS):
                inputs = self.inputs[start : start + _ROWS]
                yield c_kernels.Tiles(slice(start, start + len(inputs)), self.latents, inputs)
            return
        n = max(1, _PRODUCTS // len(self.latents) // _PART) * _PART
        memory = torch.empty(len(self.latents) * n, dtype=torch.int32)  # allocating memory costs a third of the product
        for start in range(0, len(self.inputs), n):
            inputs = self.inputs[start : start + n]
            raised = memory[: len(self.latents) * len(inputs)].view(len(self.latents), len(inputs))
            int_mm(self.latents, inputs.T, out=raised)
            raised[self.everywhere] = 1
            yield c_kernels.Products(slice(start, start + len(inputs)), raised)


def proposed(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    limit: Float[Tensor, " batch"],
    most: float = math.inf,
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]] | None:
    """Return (latent, row), sorted, of all pairs with `x . encoder_j + bias_j > limit` in float32, and of some others.

    None where int8 cannot decide: numbers that are not finite or of extreme sizes, or limits far below zero; and where
    there would be more than `most`. Latents whose biases are far larger than products are proposed for all inputs.
    """
    x, encoder = balanced(x, encoder)
    sides = _sides(x, encoder, bias, -limit)
    if sides is None or (rounded := _rounded(*sides)) is None:
        return None
    n, zero = len(rounded.latents), x.new_zeros(len(x))
    found = _marks(torch.arange(n), x.new_ones(n), len(x))
    for part in rounded.parts(tiles=isinstance(found, c_kernels.Marks)):
        found.add(part, zero[part.rows])
        if len(found) > most:
            return None
    return found.places()


def proposed_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " batch"]] | None:
    """Return (latent, row) as `proposed` for limits chosen here: likely just below each row's k-th largest, or 0.

    A row's limit is the k-th largest of maxima, each over some latents, of products minus what was added to them. Units
    of products are the latents' scales, so latents are sorted by these. Where a limit is too high, fewer than k pairs
    turn out above it in float32, and the row must be processed again. None as in `proposed`, and for a bias too large
    for its components or fewer than 8 k latents.
    """
    x, encoder = balanced(x, encoder)
    sides = _sides(x, encoder, bias, x.new_zeros(len(x)))
    if sides is None:
        return None
    inputs, latents = sides
    rounded = _rounded(inputs, latents)
    if rounded is None or len(rounded.everywhere) or len(rounded.latents) < k * _GROUP:
        return None
    scale, order = pad(latents.scale, (0, -len(encoder) % _GROUP), value=latents.scale.max().item()).sort(stable=True)
    rounded = rounded._replace(latents=rounded.latents.index_select(0, order))  # `everywhere` is empty
    n = _GROUP * _together(len(order) // _GROUP, k)
    margin, unit = _MARGIN * rounded.added(n), scale.view(-1, n).amin(1)
    found, limits = _marks(order, scale, len(x)), []
    for part in rounded.parts(tiles=isinstance(found, c_kernels.Marks)):
        limits.append(_likely(part.largest(n), margin[:, part.rows], unit, k))
        found.add(part, limits[-1] * (1 - _SLACK))
    return *found.places(), torch.cat(limits) * inputs.scale


def _likely(largest: Tensor, margin: Tensor, unit: Tensor, k: int) -> Float[Tensor, " part"]:
    """Return the k-th largest of each input's maxima, minus what was added to them, or 0."""
    if c_kernels.fit(unit):
        return c_kernels.limits_of_rows(largest, margin, unit, k)
    likely = (largest - margin) * unit[:, None]
    return likely.T.contiguous().topk(k, sorted=False).values.amin(1).clamp_min(0)


class _Places:
    """Like `c_kernels.Marks`: (latent, row) pairs with products above limits, found by group, then individually."""

    def __init__(self, latent: Tensor, scale: Tensor, batch: int) -> None:
        self._latent, self._scale, self._batch = latent, scale.view(-1, _GROUP), batch
        self._most = self._scale.amax(1)
        self._found: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._found))

    def add(self, part: c_kernels.Products | c_kernels.Tiles, limit: Tensor) -> None:
        assert isinstance(part, c_kernels.Products)  # tiles imply marks
        rows, products = part
        groups = products.view(-1, _GROUP, products.shape[1])
        group, row = (groups.amax(1) * self._most[:, None] > limit).nonzero(as_tuple=True)
        which, within = (groups[group, :, row] * self._scale[group] > limit[row, None]).nonzero(as_tuple=True)
        self._found.append(self._latent[group[which] * _GROUP + within] * self._batch + row[which] + rows.start)

    def places(self) -> tuple[Tensor, Tensor]:
        place = torch.cat(self._found).sort().values
        return place // self._batch, place % self._batch


def _marks(latent: Tensor, scale: Tensor, batch: int) -> "c_kernels.Marks | _Places":
    return (c_kernels.Marks if c_kernels.fit(scale) else _Places)(latent, scale, batch)


def _together(n_groups: int, k: int) -> int:
    """Return the number of groups per maximum before the k-th largest is selected, so that 8 k to 16 k are left.

    Two of the k largest then rarely fall together, and fewer are sorted.
    """
    n = 1
    while n_groups % (2 * n) == 0 and n_groups >= 2 * n * _SPREAD * k:
        n *= 2
    return n


def _sides(x: Tensor, encoder: Tensor, bias: Tensor, offset: Tensor) -> tuple[Side, Side] | None:
    inputs, latents = _side(x, offset), _side(encoder, bias)
    return None if inputs is None or latents is None else (inputs, latents)


def _rounded(inputs: Side, latents: Side) -> Rounded | None:
    layout = _layout(inputs, latents)
    if layout is None:
        return None
    of_inputs = whole(inputs, latents.floor, layout, of_latents=False)
    d, n = inputs.vectors.shape[1], len(latents.vectors)
    of_latents = of_inputs.new_zeros(n + -n % _GROUP, of_inputs.shape[1])
    for start in range(0, n, BLOCK):
        part = latents.part(start, start + BLOCK)
        whole(part, inputs.floor, layout, of_latents=True, out=of_latents[start : start + len(part.vectors)])
    everywhere = too_high(latents, inputs.floor, layout).nonzero()[:, 0]
    bound, biases = slice(d, d + 2 * layout.bound, layout.bound), layout.raising[1] + layout.lowering[1]
    return Rounded(of_inputs, of_latents, everywhere, bound, layout.bound, biases)


def balanced(
    x: Float[Tensor, "batch d_in"], encoder: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "d_sae d_in"]]:
    """Return equivalent operands in which outlier components of the inputs are shared between both sides.

    By powers of two. Otherwise int8, whose steps are a share of the largest component, would leave few for the others.
    """
    shares = _shares(x)
    if not _OUTLYING < shares.max().item() < math.inf:
        return x, encoder
    larger = (shares / _shares(encoder)).nan_to_num(1.0).clamp(1, _MOST_SHARED)  # components can be zero on both sides
    factor = torch.exp2((larger.log2() / 2).round())
    return x / factor, encoder * factor


def _shares(vectors: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Return the size of each component over the median of the non-zero ones."""
    size = vectors.square().sum(0).sqrt()
    return size / size[size != 0].median() if size.any() else size


def too_high(latents: Side, floor: float, layout: Layout) -> Bool[Tensor, " n"]:
    """Mark latents whose biases exceed what their components can hold."""
    return latents.digits(floor) > layout.raising[1] * _MOST


def _side(vectors: Tensor, offset: Tensor) -> Side | None:
    """Make a side; None where vectors are not finite, zero, or of sizes whose products float32 may not hold."""
    if c_kernels.fit(vectors):
        largest = c_kernels.largest_of_rows(vectors)
    else:
        largest = torch.cat([part.abs().amax(1) for part in vectors.split(BLOCK)])
    some = largest[largest != 0]
    if not len(some) or not some.max().item() < _LARGEST or (floor := some.median().item() / 2) < _LEAST:
        return None
    return Side(vectors, largest, floor, offset)


def _layout(inputs: Side, latents: Side) -> Layout | None:
    """Choose the layout; None where an input's positive offset needs too many components, or one is NaN.

    Latents whose offsets do are ignored; negative offsets that do are underestimated.
    """
    d = inputs.vectors.shape[1]
    lost = math.sqrt(d) / 2 + _accumulation(d) * (_MOST + 1) * math.sqrt(d)
    factor = (_MOST - 1) / lost
    bound = math.ceil((_MOST * math.sqrt(d) + lost) * (1 + _SLACK) / factor / _MOST)
    most, raising, lowering = d // 8 + 8, [], []
    for side, floor in ((inputs, latents.floor), (latents, inputs.floor)):
        digits = side.digits(floor) / _MOST
        high, low = digits.max().item(), digits.min().item()
        if math.isnan(low) or (side is inputs and high > most):
            return None
        raising.append(math.ceil(min(max(high, 0.0), most)))
        lowering.append(math.ceil(min(max(-low, 0.0), most)))
    return Layout(factor, bound, (raising[0], raising[1]), (lowering[0], lowering[1]))


def _accumulation(d: int) -> float:
    """Bound the rounding error of a float32 sum of d products, in units of the product of the norms."""
    return 2 * (d + 8) * _ACCUMULATION


def whole(
    side: Side,
    floor: float,
    layout: Layout,
    *,
    of_latents: bool,
    out: Int8[Tensor, "n d_and_more"] | None = None,
) -> Int8[Tensor, "n d_and_more"]:
    """Return rounded vectors, with the components that add bound and offsets to products with the other side.

    Args:
        side: inputs or latents.
        floor: the other side's.
        layout: of both.
        of_latents: which of the two they are.
        out: output memory; allocated when not given.
    """
    n, d = side.vectors.shape
    if out is None:
        out = torch.empty(n, d + layout.width, dtype=torch.int8, device=side.vectors.device)
    lost, size = _round(side, out[:, :d])
    lost = lost + _accumulation(d) * (size + lost)
    lost = torch.where(side.largest > 0, lost.clamp_min(_LEAST), lost)  # squares of tiny ones are 0
    bound = [lost * layout.lost, (size + lost) / (layout.lost * layout.bound)]
    own, other = int(of_latents), 1 - int(of_latents)
    share, digits = side.floor / side.largest.clamp_min(side.floor) * _SHARE, side.digits(floor)
    offsets = [
        (digits.clamp_min(0) / max(1, layout.raising[own]), layout.raising[own]),
        (digits.clamp_max(0) / max(1, layout.lowering[own]), layout.lowering[own]),
    ]
    shares = [
        (share * (1 + _SLACK), layout.raising[other]),
        ((share * (1 - _SLACK)).floor(), layout.lowering[other]),
    ]
    terms = [(term * (1 + _SLACK), layout.bound) for term in (bound[::-1] if of_latents else bound)]
    terms += shares + offsets if of_latents else offsets + shares
    columns = [term.ceil().clamp(-_MOST, _MOST)[:, None].expand(-1, times) for term, times in terms]
    for column, to in zip(columns, out[:, d:].split([times for _, times in terms], 1), strict=True):
        to.copy_(column)
    return out


def _round(side: Side, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write vectors divided by their scales, rounded; return norms of the errors and of the rounded vectors."""
    if c_kernels.fit(side.vectors):
        return c_kernels.round_rows(side.vectors, side.scale, out)
    scaled = side.vectors / side.scale[:, None]
    rounded = scaled.round()
    out.copy_(rounded)
    return torch.linalg.vector_norm(scaled - rounded, dim=1), torch.linalg.vector_norm(rounded, dim=1)
