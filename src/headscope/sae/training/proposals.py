"""Which pairs of an input and a latent can be active at all, by a product of whole numbers of eight bits.

Processors multiply bytes several times as fast as float32. Each vector is divided by a scale of its own and rounded,
`x / s = x^ + error` with components from -127 to 127, and the product of the whole numbers, which is exact, is raised
by a bound on what rounding did to it. With `lost = |x / s - x^|` and `size = |x^| + lost`, of input and latent,

    |x.w / (s t) - x^.w^|  <=  lost_x size_w + size_x lost_w            (Cauchy and Schwarz).

Bound, bias and limit are added by a few more components, whole numbers too, rounded to the side that raises the sum. So
whatever is above its limit has a product above zero; what has one is computed again in float32, which decides.
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

BLOCK = 1024
"""Latents whose pre-activations are in memory at a time."""
_GROUP = 8  # latents that are looked at together first
_MOST = 127  # of a byte
_SHARE = 126  # digit of a share of 1, which rounding must not lift above what a byte holds
_ACCUMULATION = 2.0**-22  # error of a float32 sum, a term and unit of the product of norms; four times the bound
_LEAST, _LARGEST = 1e-15, 1e15  # components that are scaled: float32 loses nothing of products but by rounding
_OUTLYING = 8  # times the median of components, in size, from which one is shared out
_MOST_SHARED = 2.0**40
_SLACK = 1e-4  # relative, for what float32 rounds in bounds and shares, and in adding the bias


@cache
def fast_bytes() -> bool:
    """Whether this processor multiplies bytes faster than float32, and exactly."""
    return torch.backends.mkldnn.is_available() and bool(torch.cpu._is_vnni_supported()) and exact_bytes()


def exact_bytes() -> bool:
    """Whether products of bytes are exact here: older instructions saturate sums of two of them at 16 bits."""
    most = torch.full((_GROUP, 64), _MOST, dtype=torch.int8)
    return bool((int_mm(most, most.T) == 64 * _MOST**2).all())


class Side(NamedTuple):
    """Inputs or latents, before they are rounded."""

    vectors: Float[Tensor, "n d"]
    largest: Float[Tensor, " n"]
    """Component of each vector."""
    floor: float
    """The least `largest` of which a scale is made: smaller vectors have fewer digits."""
    offset: Float[Tensor, " n"]
    """Added to all products of a vector."""

    def part(self, start: int, end: int) -> "Side":
        """Some of them."""
        return Side(self.vectors[start:end], self.largest[start:end], self.floor, self.offset[start:end])

    @property
    def scale(self) -> Float[Tensor, " n"]:
        """What vectors are divided by."""
        return self.largest.clamp_min(self.floor) / _MOST

    def digits(self, floor: float) -> Float[Tensor, " n"]:
        """The offset where the other side's scale is that of its floor, for one component of `_SHARE` there.

        In float64, where the least float32 divided by a scale is not zero.
        """
        return self.offset.double() / self.scale / (floor / _MOST) / _SHARE


@dataclass(frozen=True)
class Layout:
    """How many components each term takes, and how it is divided between the two sides."""

    lost: float
    """Factor on `lost`, by which `size` is divided."""
    bound: int
    """Components of each half of the bound."""
    raising: tuple[int, int]
    """Components of positive offsets, of inputs and of latents."""
    lowering: tuple[int, int]
    """Components of negative ones."""


def proposed(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    limit: Float[Tensor, " batch"],
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]] | None:
    """(latent, row), in this order, of all pairs with `x . encoder_j + bias_j > limit` in float32, and of some others.

    None where bytes cannot tell: numbers that are not finite or of extreme sizes, or limits far below zero. Latents
    whose biases are far larger than products are proposed for all inputs.
    """
    x, encoder = balanced(x, encoder)
    inputs, latents = _side(x, -limit), _side(encoder, bias)
    if inputs is None or latents is None or (layout := _layout(inputs, latents)) is None:
        return None
    of_inputs = whole(inputs, latents.floor, layout, of_latents=False).T
    everywhere = too_high(latents, inputs.floor, layout)
    memory = torch.empty(BLOCK, len(x), dtype=torch.int32)  # fresh memory costs a third of the product
    found = []
    for start, of_latents in _blocks(latents, inputs.floor, layout):
        raised = int_mm(of_latents, of_inputs, out=memory[: len(of_latents)])
        for j in everywhere[start : start + BLOCK].nonzero()[:, 0].tolist():
            raised[j] = 1
        found.append(torch.stack(_positive(raised)) + torch.tensor([[start], [0]]))
    latent, row = torch.cat(found, 1)
    return latent, row


def balanced(
    x: Float[Tensor, "batch d_in"], encoder: Float[Tensor, "d_sae d_in"]
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "d_sae d_in"]]:
    """The same products, with components that are far larger in inputs than the others shared out between both sides.

    By powers of two. Else bytes, whose steps are a share of the largest component, would have few left for the others.
    """
    shares = _shares(x)
    if not _OUTLYING < shares.max().item() < math.inf:
        return x, encoder
    larger = (shares / _shares(encoder)).nan_to_num(1.0).clamp(1, _MOST_SHARED)  # components can be zero on both sides
    factor = torch.exp2((larger.log2() / 2).round())
    return x / factor, encoder * factor


def _shares(vectors: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Size of each component over the median of those that are not zero."""
    size = torch.linalg.vector_norm(vectors, dim=0)
    return size / size[size != 0].median() if size.any() else size


def too_high(latents: Side, floor: float, layout: Layout) -> Bool[Tensor, " n"]:
    """Which latents have biases that the components for them cannot hold."""
    return latents.digits(floor) > layout.raising[1] * _MOST


def _blocks(latents: Side, floor: float, layout: Layout) -> Iterator[tuple[int, Int8[Tensor, "n d"]]]:
    for start in range(0, len(latents.vectors), BLOCK):
        yield start, whole(latents.part(start, start + BLOCK), floor, layout, of_latents=True)


def _side(vectors: Tensor, offset: Tensor) -> Side | None:
    """None where they are not finite, zero, or of sizes whose products float32 may not hold."""
    largest = torch.cat([part.abs().amax(1) for part in vectors.split(BLOCK)])
    some = largest[largest != 0]
    if not len(some) or not some.max().item() < _LARGEST or (floor := some.median().item() / 2) < _LEAST:
        return None
    return Side(vectors, largest, floor, offset)


def _layout(inputs: Side, latents: Side) -> Layout | None:
    """None where an input's positive offset needs too many components, or one is not a number.

    Those of latents that do are not taken into account; negative ones that do are taken for less than they are.
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
    """What float32 loses in a sum of d products, in units of the product of the norms."""
    return 2 * (d + 8) * _ACCUMULATION


def whole(side: Side, floor: float, layout: Layout, *, of_latents: bool) -> Int8[Tensor, "n d_and_more"]:
    """Rounded vectors, and the components that add bound and offsets to their products with the other side's.

    Args:
        side: inputs or latents.
        floor: the other side's.
        layout: of both.
        of_latents: which of the two they are.
    """
    scaled = side.vectors / side.scale[:, None]
    rounded = scaled.round()
    lost = torch.linalg.vector_norm(scaled - rounded, dim=1)
    size = torch.linalg.vector_norm(rounded, dim=1)
    lost = lost + _accumulation(scaled.shape[1]) * (size + lost)
    lost = torch.where(side.largest > 0, lost.clamp_min(_LEAST), lost)  # squares of the least components are zero
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
    columns = [term.ceil().clamp(-_MOST, _MOST).to(torch.int8)[:, None].expand(-1, n) for term, n in terms]
    return torch.cat([rounded.to(torch.int8), *columns], 1)


def _positive(raised: Int[Tensor, "latent batch"]) -> tuple[Tensor, Tensor]:
    """(latent, row), in this order, of what is above zero: they are few, so groups of 8 latents are read first."""
    n_latents, batch = raised.shape
    if n_latents % _GROUP:
        latent, row = raised.gt(0).nonzero(as_tuple=True)
        return latent, row
    groups = raised.view(-1, _GROUP, batch)
    group, row = groups.amax(1).gt(0).nonzero(as_tuple=True)
    found, within = groups[group, :, row].gt(0).nonzero(as_tuple=True)
    place = ((group[found] * _GROUP + within) * batch + row[found]).sort().values
    return place // batch, place % batch
