"""The Triton kernels in Triton's interpreter; `test_triton_kernels.py` runs this file in a process of its own.

Triton reads `TRITON_INTERPRET` when it is first imported, so the variable has to be there before, and would change
every later use of triton in the process.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cases import examples
from headscope.errors import TrainingError
from headscope.sae.training import kernels, objectives, triton_kernels
from headscope.sae.training.kernels import Pairs

FEW = examples(12)
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
SIZES: dict[str, Any] = {
    "batch": st.integers(1, 20) | st.sampled_from([127, 128, 129]),
    "d": st.integers(1, 20) | st.sampled_from([63, 64, 65, 129, 257]),
    "d_sae": st.integers(1, 12) | st.sampled_from([16, 63, 65]),
    "seed": st.integers(0, 2**31 - 1),
}


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def every_pair(batch: int, d_sae: int) -> Pairs:
    latent, row = torch.ones(d_sae, batch).nonzero(as_tuple=True)
    return Pairs(row, latent, batch, d_sae)


def some_pairs(batch: int, d_sae: int, seed: int, share: float) -> Pairs:
    pairs = every_pair(batch, d_sae)
    [u, busy] = normal(seed, (len(pairs),), (d_sae,))
    limit = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - share))
    return pairs.kept(u + busy[pairs.latent] > limit)  # some latents are busy, some have no pair


def same_pairs(got: Pairs, expected: Pairs) -> None:
    assert_close(torch.stack([got.latent, got.row]), torch.stack([expected.latent, expected.row]), rtol=0, atol=0)
    assert (got.batch, got.d_sae) == (expected.batch, expected.d_sae)


# ----------------------------------------------------------------------------------------------------------- selection
@FEW
@given(**SIZES, limited=st.booleans(), level=st.sampled_from([0, 2_000_000, 100_000_000]))
def test_of_whole_numbers_the_selection_is_exactly_that_of_whole_numbers(batch, d, d_sae, seed, limited, level) -> None:
    """Products below 2^24 are exact in float32, their inputs are not in bfloat16; ties with the limit are not above."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1023, 1024, (batch, d), generator=g)
    w = torch.randint(-31, 32, (d_sae, d), generator=g)
    exact = w @ x.T
    bias = -exact[torch.arange(d_sae), torch.arange(d_sae) % batch] - level // 100  # a tie in each latent
    limit = torch.randint(-2000, 2000, (batch,), generator=g) if limited else torch.zeros(batch, dtype=torch.int64)
    pre = exact + bias[:, None]
    latent, row = (pre > limit).nonzero(as_tuple=True)
    got, values = triton_kernels.select_above(x.float(), w.float(), bias.float(), limit.float() if limited else None)
    same_pairs(got, Pairs(row, latent, batch, d_sae))
    assert_close(values, pre[latent, row].float(), rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "d", "d_sae", "scale"), [(37, 130, 29, 1.0), (21, 64, 11, 1e-18), (9, 70, 33, 1e18)])
def test_the_selection_is_what_the_products_of_all_pairs_say(batch, d, d_sae, scale) -> None:
    x, w, bias, limit = normal(1, (batch, d), (d_sae, d), (d_sae,), (batch,))
    x, bias, limit = x * scale, bias * scale, limit * scale
    pairs = every_pair(batch, d_sae)
    pre = triton_kernels.products(pairs, w, x) + bias[pairs.latent]
    above = pre > limit[pairs.row]
    got, values = triton_kernels.select_above(x, w, bias, limit)
    same_pairs(got, pairs.kept(above))
    assert_close(values, pre[above], rtol=0, atol=0)


def nearly_missed() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that all lose the most that rounding can take, and biases that leave the smallest of products above 0."""
    d = 96
    lossy = 1 + 2.0**-8 - 2.0**-20  # is 1 in bfloat16
    x = torch.full((3, d), lossy) * torch.tensor([[1.0], [2.0], [4.0]])
    w = torch.full((5, d), lossy) * torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    pre = triton_kernels.products(every_pair(3, 5), w, x).view(5, 3)
    bias = -pre[:, 0]
    return x, w, torch.nextafter(bias, torch.tensor(torch.inf))


def test_the_bound_holds_where_rounding_loses_the_most(monkeypatch) -> None:
    x, w, bias = nearly_missed()
    got, pre = triton_kernels.select_above(x, w, bias)
    assert len(got) == 15
    assert pre.min() > 0
    rounded = triton_kernels._rounded

    def unbounded(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, size, lost = rounded(vectors)
        return kept, size, torch.zeros_like(lost)

    monkeypatch.setattr(triton_kernels, "_rounded", unbounded)
    assert len(triton_kernels.select_above(x, w, bias)[0]) < 15  # without the bound, pairs are missed


@FEW
@given(batch=SIZES["batch"], d=SIZES["d"], seed=SIZES["seed"], dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_rounding_keeps_and_loses(batch, d, seed, dtype) -> None:
    """The interpreter rounds towards zero, a GPU to the nearest: the bound is measured, so it knows of neither."""
    [x] = normal(seed, (batch, d))
    x = x.to(dtype)
    rounded, size, lost = triton_kernels._rounded(x)
    assert rounded.shape[1] % triton_kernels._STEP == 0
    back = rounded[:, :d].double()
    assert_close(back, x.double(), rtol=2.0**-7, atol=0)
    assert (rounded[:, d:] == 0).all()
    for computed, exact in [(size, back.norm(dim=1)), (lost, (x.double() - back).norm(dim=1))]:
        assert (computed >= exact).all()
        assert_close(computed.double(), exact, rtol=2e-3, atol=1e-30)


def test_few_pairs_are_computed_again() -> None:
    """The bound is narrow: at one active pair in a hundred, most candidates are active."""
    x, w = normal(2, (128, 64), (128, 64))
    pre = w @ x.T
    bias = -pre.quantile(0.99, dim=1)
    row, _ = triton_kernels.candidates(x, w, bias, torch.zeros(128))
    assert len(row) < 1.2 * (pre + bias[:, None] > 0).sum()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inputs_that_are_not_finite_are_decided_as_in_float32() -> None:
    x, w, bias = normal(3, (6, 10), (8, 10), (8,))
    x[1, 2], x[3, 4], x[4, 0] = torch.nan, torch.inf, -torch.inf
    got, pre = triton_kernels.select_above(x, w, bias)
    expected, values = kernels.select_above(x, w, bias)
    same_pairs(got, expected)
    assert_close(pre, values, **FLOAT32)
    assert (got.row == 3).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_limit_of_infinity_takes_none_or_all_of_a_row() -> None:
    x, w, bias = normal(4, (3, 5), (7, 5), (7,))
    limit = torch.tensor([torch.inf, -torch.inf, 0.0])
    got, _ = triton_kernels.select_above(x, w, bias, limit)
    assert torch.bincount(got.row, minlength=3)[:2].tolist() == [0, 7]
    row, _ = triton_kernels.candidates(x, w, bias, limit)
    assert not (row == 0).any()


def test_nothing_may_be_active() -> None:
    x, w = normal(5, (9, 33), (12, 33))
    got, pre = triton_kernels.select_above(x, w, torch.full((12,), -1e4))
    assert (len(got), len(pre)) == (0, 0)
    assert_close(triton_kernels.sum_by_row(got, pre, w), torch.zeros(9, 33))
    assert_close(triton_kernels.sum_by_latent(got, pre, x), torch.zeros(12, 33))
    assert len(triton_kernels.products(got, w, x)) == 0


# ------------------------------------------------------------------------------------------------------- three products
@FEW
@given(**SIZES, share=st.sampled_from([0.0, 0.05, 0.3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_products_and_sums_are_those_of_full_matrices(batch, d, d_sae, seed, share, dtype) -> None:
    pairs = some_pairs(min(batch, 40), d_sae, seed, share)
    a, b, weights = (t.to(dtype) for t in normal(seed, (d_sae, d), (pairs.batch, d), (len(pairs),)))
    f = pairs.matrix(weights.double())
    got = triton_kernels.products(pairs, a, b)
    assert_close(got, (b.double() @ a.double().T)[pairs.row, pairs.latent].float(), **FLOAT32)
    assert_close(triton_kernels.sum_by_row(pairs, weights, a), (f @ a.double()).float(), **FLOAT32)
    assert_close(triton_kernels.sum_by_latent(pairs, weights, b), (f.T @ b.double()).float(), **FLOAT32)


def test_the_eager_functions_give_the_same() -> None:
    x, w, bias, limit, grad = normal(6, (65, 70), (40, 70), (40,), (65,), (65, 70))
    bias = bias - 12
    for threshold in (None, limit):
        got, pre = triton_kernels.select_above(x, w, bias, threshold)
        expected, values = kernels.select_above(x, w, bias, threshold)
        assert 50 < len(got) < 400
        same_pairs(got, expected)
        assert_close(pre, values, **FLOAT32)
    assert_close(triton_kernels.products(got, w, grad), kernels.products(got, w, grad), **FLOAT32)
    assert_close(triton_kernels.sum_by_row(got, pre, w), kernels.sum_by_row(got, pre, w), **FLOAT32)
    assert_close(triton_kernels.sum_by_latent(got, pre, grad), kernels.sum_by_latent(got, pre, grad), **FLOAT32)


def test_views_are_read_as_what_they_show() -> None:
    x, w, bias = normal(7, (9, 24), (12, 7), (14,))
    seen = x[:, ::2], w.T, bias[::2]
    copied = tuple(t.clone(memory_format=torch.contiguous_format) for t in seen)
    pairs, pre = triton_kernels.select_above(*seen)
    expected, values = triton_kernels.select_above(*copied)
    same_pairs(pairs, expected)
    assert_close(pre, values, rtol=0, atol=0)
    weights = torch.stack([pre, pre], 1)[:, 0]
    for function, view, copy in [("sum_by_latent", seen[0], copied[0]), ("sum_by_row", seen[1], copied[1])]:
        of = getattr(triton_kernels, function)
        assert_close(of(pairs, weights, view), of(pairs, pre, copy), rtol=0, atol=0)
    assert_close(
        triton_kernels.products(pairs, seen[1], seen[0]),
        triton_kernels.products(pairs, copied[1], copied[0]),
        rtol=0,
        atol=0,
    )


def test_a_second_run_is_the_first_bit_for_bit() -> None:
    x, w, bias = normal(8, (50, 40), (30, 40), (30,))

    def run() -> list[Tensor]:
        pairs, pre = triton_kernels.select_above(x, w, bias - 8)
        sums = [triton_kernels.sum_by_row(pairs, pre, w), triton_kernels.sum_by_latent(pairs, pre, x)]
        return [pairs.row, pairs.latent, pre, *sums]

    for first, second in zip(run(), run(), strict=True):
        assert_close(first, second, rtol=0, atol=0)


def test_float64_is_refused_rather_than_rounded(no_type_checks) -> None:
    x, w, bias = (t.double() for t in normal(9, (3, 4), (5, 4), (5,)))
    with pytest.raises(TrainingError, match=r"torch\.float64 on a GPU"):
        triton_kernels.select_above(x, w, bias)


# ---------------------------------------------------------------------------------------------------------- objectives
@pytest.mark.parametrize("prefixes", [(), (7, 20)])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated", "topk", "batchtopk"])
def test_a_step_of_each_variant_is_that_of_the_eager_functions(name, prefixes, monkeypatch) -> None:
    batch, d_in, d_sae = 12, 20, 40
    x, encoder, decoder, b_enc, b_dec = normal(10, (batch, d_in), (d_sae, d_in), (d_sae, d_in), (d_sae,), (d_in,))
    p = {"encoder": encoder, "decoder": decoder, "b_enc": b_enc - 6, "b_dec": b_dec}
    p |= {"log_threshold": b_enc * 0.1, "r_mag": b_enc * 0.2, "b_mag": b_enc}

    def outcome() -> objectives.Outcome:
        space = objectives.Space(prefixes=prefixes)
        made: dict[str, objectives.Objective] = {
            "relu": objectives.ReLU(space),
            "jumprelu": objectives.JumpReLU(space),
            "gated": objectives.Gated(space),
            "topk": objectives.TopK(3.0, space),
            "batchtopk": objectives.TopK(3.0, space, over_batch=True),
        }
        return made[name](p, x, objectives.Now(0.5, torch.zeros(d_sae, dtype=torch.bool)))

    expected = outcome()
    for module in (objectives, kernels):
        for function in ("products", "select_above", "sum_by_latent", "sum_by_row"):
            monkeypatch.setattr(module, function, getattr(triton_kernels, function))
    got = outcome()
    same_pairs(got.active, expected.active)
    assert 10 < len(got.active) < 200
    assert_close(got.values, expected.values, **FLOAT32)
    assert_close(got.squared_error, expected.squared_error, **FLOAT32)
    assert_close(got.gradients, expected.gradients, **FLOAT32)
