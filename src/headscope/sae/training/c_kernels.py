"""Loops of SAE training in C, where the machine has a compiler; torch does the same without one.

On first use `cc` compiles `c_kernels.c`, in about a second, for the current processor; the result is not stored for
others. With gcc they share torch's threads. Candidates are decided as without them; products and sums differ from
torch's at most by the rounding of another order of summation.
"""

import ctypes
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int8, Int32
from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_WORD = 64  # bits
_STEP = 64  # bytes per row of a tile


def fit(*like: Tensor) -> bool:
    """Whether the C functions support tensors like these: float32, not on a GPU, and a compiler is available."""
    return all(t.is_cpu and t.dtype == torch.float32 for t in like) and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None without a working compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    try:
        with TemporaryDirectory(prefix="headscope-") as folder:
            made = Path(folder, "c_kernels.so")
            command = [compiler, *_FLAGS, str(_SOURCE), "-lm", "-o", str(made)]
            # its own session: a Ctrl-C that waits for the end of a step must not kill it
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, start_new_session=True)
            return ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError):
        return None


def tiles_fit() -> bool:
    """Whether AMX int8 is available and the kernel grants it (it must be requested first)."""
    made = library()
    return made is not None and bool(made.tiles_work())


def _plain(kind: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Check dtype and device and make tensors contiguous, because the functions get bare addresses."""
    assert all(t.dtype == kind and t.is_cpu for t in tensors), [t.dtype for t in tensors]
    return [t.contiguous() for t in tensors]


def _call(name: str, *arguments: Tensor | int) -> None:
    """Call a function with addresses, sizes, and torch's number of threads."""
    made = library()
    assert made is not None
    given: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            given.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            given.append(ctypes.c_int64(argument))
    getattr(made, name)(*given, ctypes.c_int(torch.get_num_threads()))


def largest_of_rows(vectors: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return the largest absolute component of each row."""
    largest = vectors.new_empty(len(vectors))
    _call("largest_of_rows", *_plain(torch.float32, vectors), *vectors.shape, largest)
    return largest


def round_rows(
    vectors: Float[Tensor, "n d"], scale: Float[Tensor, " n"], out: Int8[Tensor, "n d_and_more"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Write `round(vectors / scale)`; return the norms of the rounding errors and of the rounded vectors."""
    assert out.stride(1) == 1
    vectors, scale = _plain(torch.float32, vectors, scale)
    lost, size = torch.empty_like(scale), torch.empty_like(scale)
    _call("round_rows", vectors, scale, *vectors.shape, out, out.stride(0), lost, size)
    return lost, size


def order_by_row(row: Int[Tensor, " pair"], starts: Int[Tensor, " n_and_one"]) -> Int[Tensor, " pair"]:
    """Compute `row.argsort(stable=True)`, given where each row's pairs start."""
    row, starts = _plain(torch.int64, row, starts)
    order = torch.empty_like(row)
    _call("order_by_row", row, len(row), starts.clone(), order)
    return order


def limits_of_rows(
    largest: Int32[Tensor, "group part"], margin: Float[Tensor, "group part"], unit: Float[Tensor, " group"], k: int
) -> Float[Tensor, " part"]:
    """Return the k-th largest `(largest - margin) * unit` of each row, or 0 where that is less.

    It can be too low by 2^-14 of the row's largest.
    """
    margin = margin if margin.stride(1) == 1 else margin.contiguous()
    _plain(torch.float32, margin, unit)
    limit = unit.new_empty(largest.shape[1])
    _call("limits_of_rows", largest, margin, margin.stride(0), unit, *largest.shape, k, limit)
    return limit


def largest_of_pairs(
    values: Float[Tensor, " pair"], order: Int[Tensor, " pair"], starts: Int[Tensor, " n_and_one"], k: int
) -> Bool[Tensor, " pair"]:
    """Mark the k largest pairs of each row, the first of equal ones; `order` and `starts` sort the pairs by row."""
    kept = torch.empty(len(values), dtype=torch.bool)
    given = [*_plain(torch.float32, values), *_plain(torch.int64, order, starts)]
    _call("largest_of_pairs", *given, len(starts) - 1, k, torch.empty_like(values), kept)
    return kept


def products(
    latent: Int[Tensor, " pair"],
    row: Int[Tensor, " pair"],
    of_latents: Float[Tensor, "d_sae d"],
    of_rows: Float[Tensor, "batch d"],
) -> Float[Tensor, " pair"]:
    """Compute the dot product of each pair's two vectors."""
    assert of_latents.shape[1] == of_rows.shape[1]
    out = of_rows.new_empty(len(latent))
    vectors = _plain(torch.float32, of_latents, of_rows)
    _call("products", *_plain(torch.int64, latent, row), len(latent), *vectors, of_rows.shape[1], out)
    return out


def weighted_sums(
    index: Int[Tensor, " pair"],
    starts: Int[Tensor, " n_and_one"],
    weights: Float[Tensor, " pair"],
    vectors: Float[Tensor, "m d"],
    out: Float[Tensor, "n d"] | None = None,
) -> Float[Tensor, "n d"]:
    """Sum `weights[p] vectors[index[p]]` over p from `starts[i]` to `starts[i + 1]`, for each i; in `out`."""
    n, d = len(starts) - 1, vectors.shape[1]
    summed = out if out is not None and out.is_contiguous() else vectors.new_empty(n, d)
    given = [*_plain(torch.int64, index, starts), *_plain(torch.float32, weights, vectors, summed)]
    _call("weighted_sums", *given[:-1], n, d, summed)
    return summed if out is None or out is summed else out.copy_(summed)


def take_parallel(gradient: Float[Tensor, "n d"], unit_vectors: Float[Tensor, "n d"]) -> None:
    """Subtract from each row of a gradient, in place, its component along the same row of unit-norm vectors."""
    assert gradient.is_contiguous()
    _call("take_parallel", *_plain(torch.float32, gradient, unit_vectors), *gradient.shape)


class Products(NamedTuple):
    """Products of all latents with some rows."""

    rows: slice
    products: Int32[Tensor, "n part"]

    def largest(self, together: int) -> Int32[Tensor, "group part"]:
        """Return the maximum over groups of `together` latents."""
        return self.products.view(-1, together, self.products.shape[1]).amax(1)


class Tiles:
    """The same without storing the products, which are computed tile by tile when they are read."""

    def __init__(self, rows: slice, latents: Int8[Tensor, "n d"], of_rows: Int8[Tensor, "part d"]) -> None:
        """Arrange some rows for the tiles."""
        (n, d), n_rows = latents.shape, len(of_rows)
        steps = -(-d // _STEP)
        packed = torch.empty(-(-n_rows // _WORD) * _WORD * steps * _STEP, dtype=torch.int8)
        latents, of_rows = _plain(torch.int8, latents, of_rows)
        _call("pack_rows", of_rows, n_rows, d, packed, steps)
        self.rows, self.arguments = rows, (latents, n, d, packed, n_rows, steps)

    def largest(self, together: int) -> Int32[Tensor, "group part"]:
        """Return the maximum over groups of `together` latents: 8, 16, 32 ..."""
        _, n, _, _, n_rows, _ = self.arguments
        largest = torch.empty(n // together, n_rows, dtype=torch.int32)
        _call("largest_of_tiles", *self.arguments, together, largest)
        return largest


class Marks:
    """A set of (latent, row) pairs, one bit each, filled row part by row part."""

    def __init__(self, latent: Int[Tensor, " n"], scale: Float[Tensor, " n"], batch: int) -> None:
        """Start with an empty set.

        Args:
            latent: numbers of latents, each once, in the order of products.
            scale: scale of each latent's products.
            batch: total number of rows.
        """
        [self._latent], [self._scale] = _plain(torch.int64, latent), _plain(torch.float32, scale)
        self._words = -(-batch // _WORD)
        self._bits = torch.zeros(len(latent), self._words, dtype=torch.int64)
        self._counts = torch.zeros(len(latent), dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return int(self._counts.sum())

    def add(self, part: "Products | Tiles", limit: Float[Tensor, " part"]) -> None:
        """Add the pairs with `product * scale > limit`, for a part whose rows start at a word boundary."""
        first = part.rows.start // _WORD
        given = [self._latent, self._scale, *_plain(torch.float32, limit), self._bits, self._words, first, self._counts]
        if isinstance(part, Tiles):
            _call("mark_tiles", *part.arguments, *given)
        else:
            _call("mark_above", *_plain(torch.int32, part.products), *part.products.shape, *given)

    def places(self) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
        """Return latent and row of all pairs, in this order."""
        starts = self._counts.cumsum(0) - self._counts
        latent, row = torch.empty(2, len(self), dtype=torch.int64)
        _call("marked", self._bits, starts, *self._bits.shape, latent, row)
        return latent, row
