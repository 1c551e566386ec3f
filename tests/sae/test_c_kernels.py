"""The loops in C are torch's, whatever the number of threads; without a compiler they are left to torch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cases import examples
from headscope.sae.config import TrainConfig
from headscope.sae.training import c_kernels, kernels
from headscope.sae.training.trainer import Trainer

EXACTLY = {"rtol": 0, "atol": 0, "equal_nan": True}
SIZES = {"n": st.integers(1, 40), "d": st.integers(1, 200), "seed": st.integers(0, 2**32 - 1)}


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    if c_kernels.library() is None:
        pytest.skip("no compiler")


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    c_kernels.library.cache_clear()
    monkeypatch.setenv("PATH", "")
    yield
    c_kernels.library.cache_clear()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@examples(50)
@given(**SIZES, bad=st.sampled_from([0.0, -1e30, torch.inf, -torch.inf, torch.nan]))
def test_the_largest_component_is_that_of_each_row(n: int, d: int, seed: int, bad: float) -> None:
    vectors = normal(seed, n, d)
    vectors[seed % n, seed % d] = bad
    assert_close(c_kernels.largest_of_rows(vectors), vectors.abs().amax(1), **EXACTLY)


@examples(50)
@given(**SIZES, more=st.integers(0, 70))
def test_rows_are_rounded_as_torch_rounds_them(n: int, d: int, seed: int, more: int) -> None:
    vectors = 100 * normal(seed, n, d)
    scale = torch.exp2((vectors.abs().amax(1) / 127).log2().ceil())
    vectors[:, 0] = 2.5 * scale  # half-way: to even
    room = torch.full((n, d + more), 99, dtype=torch.int8)
    lost, size = c_kernels.round_rows(vectors, scale, room[:, :d])
    scaled = vectors / scale[:, None]
    assert_close(room[:, :d], scaled.round().to(torch.int8), **EXACTLY)
    assert (room[:, d:] == 99).all()
    assert (room[:, 0] == 2).all()
    assert_close(lost, torch.linalg.vector_norm(scaled - scaled.round(), dim=1), rtol=1e-5, atol=1e-6)
    assert_close(size, torch.linalg.vector_norm(scaled.round(), dim=1), rtol=1e-5, atol=1e-6)


@examples(50)
@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 300),
    part=st.sampled_from([64, 128, 320]),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_marks_are_where_products_exceed_their_limits(n: int, batch: int, part: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    order, scale = torch.randperm(n, generator=g), torch.rand(n, generator=g) + 0.5
    products = torch.randint(-1000, 1000, (n, batch), generator=g, dtype=torch.int32)
    limit = torch.full((batch,), 3000.0) - 6000 * (torch.rand(batch, generator=g) < share)
    marks = c_kernels.Marks(order, scale, batch)
    for start in range(0, batch, part):
        rows = slice(start, start + part)
        marks.add(c_kernels.Products(rows, products[:, rows].contiguous()), limit[rows])
    above = torch.zeros(n, batch, dtype=torch.bool)
    above[order] = products * scale[:, None] > limit
    assert len(marks) == above.sum()
    for found, expected in zip(marks.places(), above.nonzero(as_tuple=True), strict=True):
        assert_close(found, expected, **EXACTLY)


@pytest.mark.skipif(not c_kernels.tiles_fit(), reason="a processor without tiles")
@examples(100)
@given(
    n=st.integers(1, 20).map(lambda groups: 8 * groups),
    batch=st.integers(1, 200),
    d=st.integers(1, 200),
    scale=st.sampled_from([0.01, 1.0]),
    limit=st.sampled_from([-1e9, 0.0, 1000.0, 1e9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tiles_are_the_products_of_bytes(n: int, batch: int, d: int, scale: float, limit: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    latents, inputs = (torch.randint(-127, 128, (m, d), generator=g, dtype=torch.int8) for m in (n, batch))
    order, scales, limits = torch.randperm(n, generator=g), torch.full((n,), scale), torch.full((batch,), limit)
    exact = latents.int() @ inputs.T.int()
    found, expected = (c_kernels.Marks(order, scales, batch) for _ in range(2))
    for start in range(0, batch, 128):
        rows = slice(start, min(batch, start + 128))
        tiles = c_kernels.Tiles(rows, latents, inputs[rows])
        products = c_kernels.Products(rows, exact[:, rows].contiguous())
        found.add(tiles, limits[rows])
        expected.add(products, limits[rows])
        for together in (m for m in (8, 16, 32, 64) if n % m == 0):
            assert_close(tiles.largest(together), products.largest(together), **EXACTLY)
    assert len(found) == len(expected)
    for one, other in zip(found.places(), expected.places(), strict=True):
        assert_close(one, other, **EXACTLY)


@examples(50)
@given(**SIZES, n_pairs=st.integers(0, 100))
def test_products_and_sums_are_torchs(n: int, d: int, seed: int, n_pairs: int) -> None:
    g = torch.Generator().manual_seed(seed)
    of_latents, of_rows = normal(seed, 30, d), normal(seed + 1, n, d)
    latent = torch.randint(30, (n_pairs,), generator=g).sort().values
    row, weights = torch.randint(n, (n_pairs,), generator=g), normal(seed + 2, n_pairs)
    expected = (of_latents[latent].double() * of_rows[row].double()).sum(1)
    assert_close(c_kernels.products(latent, row, of_latents, of_rows).double(), expected, rtol=1e-5, atol=1e-4)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(latent, minlength=30).cumsum(0)])
    summed = torch.zeros(30, d, dtype=torch.float64).index_add_(0, latent, weights[:, None].double() * of_rows[row])
    memory = torch.full((30, d), torch.nan)
    assert c_kernels.weighted_sums(row, starts, weights, of_rows, memory) is memory
    assert_close(memory.double(), summed, rtol=1e-5, atol=1e-4)
    assert_close(c_kernels.weighted_sums(row, starts, weights, of_rows), memory, **EXACTLY)


@examples(50)
@given(n=st.integers(1, 40), n_pairs=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
def test_pairs_are_ordered_by_row_as_torch_orders_them(n: int, n_pairs: int, seed: int) -> None:
    row = torch.randint(n, (n_pairs,), generator=torch.Generator().manual_seed(seed))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=n).cumsum(0)])
    before = starts.clone()
    assert_close(c_kernels.order_by_row(row, starts), row.argsort(stable=True), **EXACTLY)
    assert_close(starts, before, **EXACTLY)


@examples(100)
@given(
    n=st.integers(1, 60),
    groups=st.integers(1, 40),
    k=st.integers(1, 40),
    few=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_limits_are_the_kth_largest(n: int, groups: int, k: int, few: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    most, k = 3 if few else 10_000, min(k, groups)
    largest = torch.randint(-most, most + 1, (groups, n), generator=g, dtype=torch.int32)
    margin, unit = torch.rand(groups, n + 7, generator=g)[:, 3:-4] * (not few), torch.rand(groups, generator=g) + 0.5
    best = ((largest - margin) * unit[:, None]).T.topk(k).values.relu()
    limit = c_kernels.limits_of_rows(largest, margin, unit, k)
    assert (limit <= best[:, -1]).all()
    assert (limit >= best[:, -1] - 1.01 * 2**-14 * best[:, 0]).all()


@examples(100)
@given(
    n=st.integers(1, 20),
    n_pairs=st.integers(0, 300),
    k=st.integers(1, 20),
    few=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_largest_of_each_row_are_kept(n: int, n_pairs: int, k: int, few: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    row, values = torch.randint(n, (n_pairs,), generator=g), torch.randn(n_pairs, generator=g)
    values = values.round() if few else values  # many are equal
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=n).cumsum(0)])
    kept = c_kernels.largest_of_pairs(values, row.argsort(stable=True), starts, k)
    for i in range(n):
        own = (row == i).nonzero()[:, 0]
        best = values[own].sort(descending=True, stable=True).indices[:k].sort().values
        assert_close(kept[own].nonzero()[:, 0], best, **EXACTLY)


def test_tensors_that_are_views_are_read_as_they_are() -> None:
    wide = normal(0, 6, 40)
    view, pairs = wide.T[:20], torch.arange(6)
    assert_close(c_kernels.largest_of_rows(view), view.abs().amax(1), **EXACTLY)
    found = c_kernels.products(pairs, pairs, view, view)
    assert_close(found, view[:6].square().sum(1), rtol=1e-5, atol=1e-5)
    starts = torch.arange(14)[::2]
    summed = c_kernels.weighted_sums(pairs.repeat(2), starts, wide[0, :24:2], view)
    assert_close(summed[0], view[0] * wide[0, 0] + view[1] * wide[0, 2], rtol=1e-5, atol=1e-5)
    for room in (torch.full((6, 6), torch.nan).T, torch.full((6, 20), torch.nan)[:, :6]):
        assert c_kernels.weighted_sums(pairs.repeat(2), starts, wide[0, :24:2], view, room) is room
        assert_close(room, summed, **EXACTLY)


def test_numbers_of_other_kinds_never_come_to_c() -> None:
    x, pairs = normal(0, 6, 8), kernels.Pairs(torch.arange(6), torch.arange(6), 6, 6)
    with pytest.raises(RuntimeError):  # torch's
        kernels.products(pairs, x.double(), x)
    with pytest.raises(RuntimeError):
        kernels.sum_by_row(pairs, x[:, 0].double(), x)
    with pytest.raises(AssertionError, match="int32"):
        c_kernels.products(torch.arange(6, dtype=torch.int32), torch.arange(6), x, x)
    with pytest.raises(AssertionError, match="bfloat16"):
        c_kernels.largest_of_rows(x.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2"])
def test_the_compilers_level_changes_no_product(level: str) -> None:
    subprocess.run([sys.executable, "-c", _AT_LEVEL, level], check=True)


_AT_LEVEL = """
import sys
import torch
from headscope.sae.training import c_kernels
c_kernels._FLAGS = tuple(sys.argv[1] if flag == "-O3" else flag for flag in c_kernels._FLAGS)
assert c_kernels.library() is not None
g = torch.Generator().manual_seed(0)
a, b = (torch.randint(-127, 128, (96, 100), generator=g, dtype=torch.int8) for _ in range(2))
products = c_kernels.Products(slice(0, 96), a.int() @ b.T.int())
parts = [products, *([c_kernels.Tiles(slice(0, 96), a, b)] if c_kernels.tiles_fit() else [])]
for part in parts:
    assert torch.equal(part.largest(8), products.largest(8))
    marks = c_kernels.Marks(torch.arange(96), torch.ones(96), 96)
    marks.add(part, torch.full((96,), 50_000.0))
    assert torch.equal(torch.stack(marks.places()), (products.products > 50_000).nonzero().T)
"""


def test_the_number_of_threads_changes_nothing() -> None:
    x, before, found = normal(0, 500, 64), torch.get_num_threads(), []
    latent, row = torch.arange(400).repeat_interleave(2), torch.arange(800) % 500
    for n in (1, 3):
        torch.set_num_threads(n)
        summed = c_kernels.weighted_sums(row, torch.arange(0, 801, 2), x.flatten()[:800], x)
        marks = c_kernels.Marks(torch.arange(500), torch.ones(500), 500)
        if c_kernels.tiles_fit():
            rounded = (40 * x).to(torch.int8)
            marks.add(c_kernels.Tiles(slice(0, 500), rounded, rounded), torch.full((500,), 9000.0))
        places = marks.places()
        found.append([c_kernels.products(latent, row, x, x), summed, c_kernels.largest_of_rows(x), *places])
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert_close(one, three, **EXACTLY)


@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_training_is_the_same_but_for_rounding(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(0, 2048, 32)
    config = TrainConfig(variant=variant, d_sae=128, target_l0=4.0, batch=256, buffer=512, tokens=256 * 50)

    def trained() -> dict[str, Tensor]:
        trainer = Trainer(x, config)
        for batch in x.split(256):
            trainer.step(batch)
        return trainer.p

    compiled = trained()
    monkeypatch.setattr(c_kernels, "library", lambda: None)
    for name, weight in trained().items():
        assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("without_a_compiler")
def test_without_a_compiler_there_is_no_library() -> None:
    assert c_kernels.library() is None
    assert not c_kernels.fit(torch.zeros(1))


@pytest.mark.parametrize("does", ["exit 1", "touch $9", "exit 0"])
def test_a_compiler_that_makes_nothing_of_use_is_left_alone(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, "cc").write_text(f"#!/bin/sh\n{does}\n")
    Path(tmp_path, "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    c_kernels.library.cache_clear()
    try:
        assert c_kernels.library() is None
    finally:
        c_kernels.library.cache_clear()


@pytest.mark.parametrize("like", [torch.zeros(1, dtype=torch.float64), torch.zeros(1, device="meta")])
def test_other_numbers_and_places_are_left_to_torch(like: Tensor) -> None:
    assert not c_kernels.fit(like)


@pytest.mark.slow
def test_one_runtime_of_threads_is_loaded() -> None:
    said = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True).stdout.split()
    assert len(said) == 1, said


_LOADED = """
from pathlib import Path
from headscope.sae.training import c_kernels
assert c_kernels.library() is not None
print(*{line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line})
"""
