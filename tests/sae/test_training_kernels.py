"""The sparse arithmetic of training finds the pairs that plain products do, and sums over them as full matrices do."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from cases import each, examples
from headscope.sae.training import c_kernels, kernels, proposals
from headscope.sae.training.kernels import (
    Pairs,
    products,
    select_above,
    select_batch_topk,
    select_topk,
    sum_by_latent,
    sum_by_row,
)
from headscope.sae.training.proposals import BLOCK, whole

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = {
    "batch": st.integers(1, 17),
    "d_in": st.integers(1, 40),
    "d_sae": st.integers(1, 70),
    "seed": st.integers(0, 2**31 - 1),
}
SCALES = [1.0, 1e-5, 1e5]  # what norms make of them, squared, is a float32 number


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- pairs
def pairs_of(mask: Tensor) -> Pairs:
    """The pairs where a mask `[batch, d_sae]` is true, in their order."""
    latent, row = mask.T.nonzero(as_tuple=True)
    return Pairs(row, latent, *mask.shape)


def random_pairs(batch: int, d_sae: int, share: float, seed: int) -> tuple[Pairs, Tensor, Tensor]:
    """Pairs, a weight for each, and these in a matrix."""
    g = generator(seed)
    mask = torch.rand(batch, d_sae, generator=g) < share
    full = torch.randn(batch, d_sae, generator=g, dtype=torch.float64) * mask
    pairs = pairs_of(mask)
    return pairs, full[pairs.row, pairs.latent], full


@given(
    batch=st.integers(1, 9),
    d_sae=st.integers(1, 30),
    share=st.sampled_from([0, 0.05, 0.5, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_pairs_are_the_entries_of_a_matrix(batch: int, d_sae: int, share: float, seed: int) -> None:
    pairs, weights, full = random_pairs(batch, d_sae, share, seed)
    assert_close(pairs.matrix(weights), full, rtol=0, atol=0)
    assert_close(pairs.latent_sums(weights), full.sum(0), **EXACT)
    for latent in range(d_sae):
        start, end = pairs.latent_starts[latent : latent + 2].tolist()
        assert (pairs.latent[start:end] == latent).all()
        assert end - start == (pairs.latent == latent).sum()
    order = pairs.to_rows
    by_row = pairs.row[order] * d_sae + pairs.latent[order]
    assert (by_row.diff() > 0).all()
    for row in range(batch):
        start, end = pairs.row_starts[row : row + 2].tolist()
        assert (pairs.row[order][start:end] == row).all()
        assert end - start == (pairs.row == row).sum()
    which = torch.rand(len(pairs), generator=generator(1)) < 0.5
    for same in (which, which.nonzero()[:, 0]):
        kept = pairs.kept(same)
        assert_close(kept.matrix(weights[same])[kept.row, kept.latent], weights[which], rtol=0, atol=0)
        assert (len(kept), kept.batch, kept.d_sae) == (int(which.sum()), batch, d_sae)
    first, end = sorted((seed % (d_sae + 1), (seed // 7) % (d_sae + 1)))
    part, at = pairs.between(first, end)
    assert_close(part.matrix(weights[at]), full[:, first:end], rtol=0, atol=0)


@each("dense_above", [0.0, 2.0])
@given(
    batch=st.integers(1, 9),
    d_sae=st.integers(1, 30),
    share=st.sampled_from([0, 0.05, 0.5, 1]),
    seed=st.integers(0, 2**31 - 1),
)
def test_sums_over_pairs_are_products_of_matrices(
    dense_above: float, batch: int, d_sae: int, share: float, seed: int
) -> None:
    pairs, weights, full = random_pairs(batch, d_sae, share, seed)
    g = generator(3)
    a, b = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (d_sae, batch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "DENSE_ABOVE", dense_above)
        assert pairs.dense == (dense_above == 0 and len(pairs) > 0)
        assert_close(sum_by_row(pairs, weights, a), full @ a, **EXACT)
        assert_close(sum_by_latent(pairs, weights, b), full.T @ b, **EXACT)
        assert_close(products(pairs, a, b), (b @ a.T)[pairs.row, pairs.latent], **EXACT)


# ----------------------------------------------------------------------------------------------------- the bytes' bound
def difficult(
    batch: int, d_in: int, d_sae: int, seed: int, x_scale: float, w_scale: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, encoder and bias in float32 on which a bound can fail."""
    g = generator(seed)
    x = torch.randn(batch, d_in, generator=g) * x_scale
    encoder = torch.randn(d_sae, d_in, generator=g) * w_scale
    bias = torch.randn(d_sae, generator=g) * x_scale * w_scale
    if kind == "rows of many sizes":
        x = x * torch.exp(6 * torch.randn(batch, 1, generator=g))
        encoder = encoder * torch.exp(6 * torch.randn(d_sae, 1, generator=g))
    elif kind == "components of many sizes":
        x = x * torch.exp(6 * torch.randn(batch, d_in, generator=g))
    elif kind == "biases of many sizes":
        bias = bias * torch.exp(8 * torch.randn(d_sae, generator=g))
    elif kind == "zero rows":
        x[::2], encoder[1::2], bias[::3] = 0, 0, 0
    elif kind == "nearly on the threshold":  # the bias undoes the product of one row, but for rounding
        bias = -(encoder.double() @ x[0].double()).float()
    elif kind == "products that cancel":
        half = d_in // 2
        x[:, half : 2 * half] = x[:, :half]
        encoder[:, half : 2 * half] = -encoder[:, :half] * (1 + 1e-4)
        bias = torch.zeros(d_sae)
    elif kind == "errors that add up":  # nearly half a step of rounding in each component, to the same side
        steps = torch.full((d_in,), 20.49 / 127)
        steps[0] = 1
        x, encoder, bias = (steps * x_scale).expand_as(x), (steps * w_scale).expand_as(encoder), torch.zeros(d_sae)
    elif kind == "digits but for rounding":  # all that is lost is what float32 loses in dividing by the scale
        x, encoder = (t.sign() * (t.abs() / t.abs().max() * 127).round() for t in (x, encoder))
        x[:, 0], encoder[:, 0], bias = 127, 127, torch.zeros(d_sae)
        x, encoder = x * (0.1 * x_scale), encoder * (0.3 * w_scale)
    elif kind == "whole numbers":
        x, encoder, bias = (t.round() for t in (x, encoder, bias))
    return x, encoder, bias


KINDS = [
    "normal",
    "rows of many sizes",
    "components of many sizes",
    "biases of many sizes",
    "zero rows",
    "nearly on the threshold",
    "products that cancel",
    "errors that add up",
    "digits but for rounding",
    "whole numbers",
]
INPUTS: dict[str, Any] = SIZES | {
    "x_scale": st.sampled_from(SCALES),
    "w_scale": st.sampled_from(SCALES),
    "kind": st.sampled_from(KINDS),
    "of_rows": st.sampled_from([0.0, 1.0, -1.0]),
}


def limits(x: Tensor, encoder: Tensor, of_rows: float) -> Tensor:
    """A threshold for each row that part of its pre-activations exceed."""
    return of_rows * torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(encoder, dim=1).mean()


WAYS = {"tiles": c_kernels.tiles_fit(), "C": c_kernels.library() is not None, "torch": True}


@pytest.fixture(scope="module", autouse=True, params=[way for way, possible in WAYS.items() if possible])
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """With products tile by tile, with a compiler at hand, and without; `test_c_kernels.py` says what is missing."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(c_kernels, "library", lambda: None)
        elif request.param == "C":
            patch.setattr(c_kernels, "tiles_fit", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    """Processors whose products of bytes saturate check the rest all the same."""
    with pytest.MonkeyPatch.context() as patch:
        if not proposals.exact_bytes():
            patch.setattr(proposals, "int_mm", lambda a, b, out=None: torch.mm(a.int(), b.int(), out=out))
        yield


def test_bytes_are_used_where_their_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proposals.exact_bytes()
    monkeypatch.setattr(proposals, "int_mm", lambda a, b: (a.int() @ b.int()).clamp_max(2**15 - 1))
    assert not proposals.exact_bytes()
    assert not proposals.fast_bytes.__wrapped__()


def assert_bounded(x: Tensor, encoder: Tensor, bias: Tensor, limit: Tensor) -> bool:
    """The raised product of bytes is no less than any in float32; False where there is none."""
    inputs, latents = proposals._side(x, -limit), proposals._side(encoder, bias)
    layout = proposals._layout(inputs, latents) if inputs and latents else None
    if layout is None:
        return False
    of_inputs = whole(inputs, latents.floor, layout, of_latents=False)
    of_latents = whole(latents, inputs.floor, layout, of_latents=True)
    x, encoder, limit, bias = x.double(), encoder.double(), limit.double(), bias.double()[:, None]
    size = torch.linalg.vector_norm(encoder, dim=1)[:, None] * torch.linalg.vector_norm(x, dim=1)
    rounding = 2**-24 * (x.shape[1] * size + 4 * (bias.abs() + limit.abs()))  # of float32 sums
    in_steps = (encoder @ x.T + bias - limit + rounding) / latents.scale.double()[:, None] / inputs.scale.double()
    exceeds = of_latents.int() @ of_inputs.int().T >= in_steps
    assert exceeds[~proposals.too_high(latents, inputs.floor, layout)].all()
    return True


def assert_proposed(x: Tensor, encoder: Tensor, bias: Tensor, limit: Tensor) -> int | None:
    """All above the limit are proposed, once and in order; how many are, None where bytes cannot tell."""
    found = proposals.proposed(x, encoder, bias, limit)
    if found is None:
        return None
    latent, row = found
    proposed = torch.zeros(len(encoder), len(x), dtype=torch.bool)
    proposed[latent, row] = True
    exact = encoder.double() @ x.double().T + bias.double()[:, None]
    plain = torch.addmm(bias[:, None], encoder, x.T)
    assert proposed[exact > limit.double()].all()
    assert proposed[plain > limit].all()
    assert ((latent * len(x) + row).diff() > 0).all()
    return len(latent)


@examples(200)
@given(**INPUTS)
def test_the_bound_is_never_below_the_product(of_rows: float, **inputs: Any) -> None:
    x, encoder, bias = difficult(**inputs)
    assert_bounded(x, encoder, bias, limits(x, encoder, of_rows))


@examples(200)
@given(**INPUTS)
def test_all_that_is_above_the_threshold_is_proposed(of_rows: float, **inputs: Any) -> None:
    x, encoder, bias = difficult(**inputs)
    assert_proposed(x, encoder, bias, limits(x, encoder, of_rows))


@each("of_rows", [0.0, 1.0])
@each("kind", [kind for kind in KINDS if kind != "rows of many sizes"])
@each("d_in", [512, 2048, 5000])
def test_bytes_tell_of_long_vectors(d_in: int, kind: str, of_rows: float) -> None:
    x, encoder, bias = difficult(5, d_in, 24, 0, 1.0, 1.0, kind)
    limit = limits(x, encoder, of_rows)
    assert assert_bounded(x, encoder, bias, limit)
    assert assert_proposed(x, encoder, bias, limit) is not None


@examples(200)
@given(
    **SIZES,
    zero=st.sampled_from(["inputs", "latents"]),
    size=st.sampled_from([1e-44, 1e-20, 0.03, 1.0, 30.0, 1000.0]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    scale=st.sampled_from([*SCALES, 1e12]),
)
def test_offsets_decide_where_vectors_are_zero(
    batch: int, d_in: int, d_sae: int, seed: int, zero: str, size: float, spread: float, scale: float
) -> None:
    g = generator(seed)
    x, encoder = (
        torch.randn(n, d_in, generator=g) * torch.exp(spread * torch.randn(n, 1, generator=g)) * scale
        for n in (batch + 1, d_sae + 1)
    )
    (x if zero == "inputs" else encoder)[1:] = 0  # the first one has a scale
    limit = torch.randn(batch + 1, generator=g) * size
    bias = limit[torch.randint(batch + 1, (d_sae + 1,), generator=g)]
    bias = torch.nextafter(bias, torch.tensor(torch.inf))  # above one limit by what is the least
    assert_bounded(x, encoder, bias, limit)
    assert_proposed(x, encoder, bias, limit)


@each("sign", [1, -1])
@each("of_latents", [False, True])
def test_shares_and_offsets_that_are_nearly_whole_are_rounded_to_the_right_side(sign: int, *, of_latents: bool) -> None:
    """Shares are 1 to 126, and offsets of zero vectors 0 to 127 digits, but for a few units of the last place."""
    nearly = 1 + torch.arange(-4, 5)[:, None] * 2**-24
    scaled = (126 / torch.arange(1, 127) * nearly).flatten()
    scaled = torch.cat([scaled, torch.full((len(scaled),), 2.0)])[:, None]  # twice the floor, so that it is 1
    offset = (sign * torch.arange(128) * 126 / 127**2 * nearly).flatten()
    vectors = torch.zeros(len(offset), 1)
    vectors[0] = 2
    if of_latents:
        assert assert_bounded(vectors, scaled, torch.zeros(len(scaled)), -offset)
    else:
        assert assert_bounded(scaled, vectors, offset, torch.zeros(len(scaled)))


def test_neither_zero_vectors_nor_dead_latents_are_proposed() -> None:
    x, encoder, bias = torch.ones(6, 4), torch.ones(10, 4), torch.zeros(10)
    x[1:3], encoder[4:6], encoder[6:, ::2] = 0, 0, -1
    bias[6:] = torch.tensor([-7.0, -100.0, -1e6, -1e30])
    assert assert_proposed(x, encoder, bias, torch.zeros(6)) == 4 * 4


@each("small", [1e-18, 1e-25, 1e-42])
@each("of_latents", [False, True])
def test_vectors_far_smaller_than_the_others_are_proposed(small: float, *, of_latents: bool) -> None:
    x, encoder, _ = difficult(12, 16, 24, 0, 1.0, 1.0, "normal")
    (encoder if of_latents else x)[:3] *= small
    assert assert_proposed(x, encoder, torch.zeros(24), torch.zeros(12)) is not None


@each("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_sizes_that_float32_cannot_multiply_are_left_to_it(scale: float) -> None:
    x, encoder, _ = difficult(12, 16, 24, 0, scale, scale, "normal")
    found = assert_proposed(x, encoder, torch.zeros(24), torch.zeros(12))
    assert (found is None) == (scale in (1e-30, 1e30))


@each("bad", [torch.inf, -torch.inf, torch.nan])
@each("which", ["x", "encoder", "bias", "limit"])
def test_what_is_not_finite_is_selected_as_float32_selects_it(
    which: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, encoder, bias = difficult(12, 16, 40, 0, 1.0, 1.0, "normal")
    given = {"x": x, "encoder": encoder, "bias": bias - 6, "limit": torch.zeros(12)}
    given[which].view(-1)[7] = bad
    never = (which, bad) in {("bias", -torch.inf), ("limit", torch.inf)}
    always = (which, bad) == ("bias", torch.inf)
    assert (proposals.proposed(*given.values()) is not None) == (never or always)
    selected = []
    for bytes_do in (True, False):
        monkeypatch.setattr(kernels, "fast_bytes", lambda bytes_do=bytes_do: bytes_do)
        pairs, pre = select_above(*given.values())
        selected.append(pairs.matrix(pre))
    assert 12 < (selected[0] > 0).sum() < 200
    assert_close(selected[0], selected[1], rtol=1e-4, atol=1e-4)


def test_few_are_proposed_in_vain() -> None:
    x, encoder, bias = difficult(64, 128, 800, 0, 1.0, 1.0, "normal")
    found = proposals.proposed(x, encoder, bias - 30, torch.zeros(64))
    n_above = int((x @ encoder.T + bias - 30 > 0).sum())
    assert n_above > 100
    assert found is not None
    assert len(found[0]) < 2 * n_above


@each("times", [1, 30, 1000])
def test_a_component_far_larger_than_the_others_costs_little(times: float) -> None:
    x, encoder, bias = difficult(64, 128, 800, 0, 1.0, 1.0, "normal")
    x[:, 3] *= times
    encoder[:, 3] /= times
    found = proposals.proposed(x, encoder, bias - 30, torch.zeros(64))
    assert found is not None
    assert len(found[0]) < 2 * int((x @ encoder.T + bias - 30 > 0).sum())


@each("kind", [kind for kind in KINDS if kind != "rows of many sizes"])
def test_sharing_out_components_changes_no_product(kind: str) -> None:
    x, encoder, _ = (t.clone() for t in difficult(17, 40, 70, 0, 1.0, 1.0, kind))
    x[:, ::7] *= 1000
    x[:, 1], encoder[:, 1] = 0, 0
    other_x, other_encoder = proposals.balanced(x, encoder)
    assert other_x.abs().max() < x.abs().max()
    exact = encoder.double() @ x.double().T
    assert_close(other_encoder.double() @ other_x.double().T, exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item())


def test_one_latent_of_large_bias_is_proposed_alone() -> None:
    x, encoder, bias = difficult(64, 128, BLOCK + 16, 0, 1.0, 1.0, "normal")
    bias, limit = torch.full_like(bias, -30), torch.zeros(64)
    x[5] = -2 * encoder[BLOCK + 9]
    before = assert_proposed(x, encoder, bias, limit)
    bias[BLOCK + 9] = encoder[BLOCK + 9].square().sum() * 2.002  # little more than lifts x[5] above zero
    after = assert_proposed(x, encoder, bias, limit)
    assert before is not None
    assert after is not None
    assert 64 <= after < 1.1 * before + 64


def test_limits_far_below_zero_are_left_to_float32() -> None:
    x, encoder, bias = difficult(64, 128, 80, 0, 1.0, 1.0, "normal")
    limit = torch.zeros(64)
    limit[3] = -1e4
    assert proposals.proposed(x, encoder, bias, limit) is None


@pytest.fixture(params=[True, False], ids=["bytes", "float32"])
def proposal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whichever way is the faster on this machine, both are taken."""
    monkeypatch.setattr(kernels, "fast_bytes", lambda: request.param)
    return request.param


SHARED = settings(examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("proposal")
@SHARED
@given(**INPUTS)
def test_what_is_selected_is_what_float32_selects(of_rows: float, **inputs: Any) -> None:
    x, encoder, bias = difficult(**inputs)
    limit = limits(x, encoder, of_rows)
    pairs, pre = select_above(x, encoder, bias, limit)
    exact = x.double() @ encoder.double().T + bias.double()
    # two orders of summation in float32 differ by this much
    size = torch.linalg.vector_norm(x.double(), dim=1)[:, None] * torch.linalg.vector_norm(encoder.double(), dim=1)
    rounding = 2**-22 * (x.shape[1] + 2) * (size + bias.double().abs() + limit.double().abs()[:, None])
    selected = pairs.matrix(torch.ones_like(pre)) > 0
    assert selected[exact - limit.double()[:, None] > rounding].all()
    assert not selected[exact - limit.double()[:, None] < -rounding].any()
    assert ((pre - exact[pairs.row, pairs.latent]).abs() <= rounding[pairs.row, pairs.latent]).all()
    assert (pre > limit[pairs.row]).all()
    assert ((pairs.latent * len(x) + pairs.row).diff() > 0).all()


@pytest.mark.usefixtures("proposal")
@SHARED
@given(**SIZES, limit=st.integers(-3, 12))
def test_what_is_on_the_threshold_is_not_above_it(limit: int, batch: int, d_in: int, d_sae: int, seed: int) -> None:
    g = generator(seed)
    whole = [torch.randint(-2, 3, shape, generator=g).float() for shape in ((batch, d_in), (d_sae, d_in), (d_sae,))]
    pairs, pre = select_above(*whole, torch.full((batch,), float(limit)))
    exact = whole[0] @ whole[1].T + whole[2]  # whole numbers: no order of summation rounds them
    assert_close(pairs.matrix(torch.ones_like(pre)) > 0, exact > limit)
    assert_close(pre, exact[pairs.row, pairs.latent], rtol=0, atol=0)


@each("share", [0.0, 0.01, 0.5])
@each("d_sae", [1, 1023, 1024, 1025, 2048, 2055])
def test_given_memory_is_filled_in_blocks(d_sae: int, share: float) -> None:
    pairs, weights, full = random_pairs(7, d_sae, share, seed=0)
    assert pairs.dense == (share == 0.5)
    b = torch.randn(7, 5, generator=generator(3), dtype=torch.float64)
    memory = torch.full((d_sae, 5), torch.nan, dtype=torch.float64)
    assert sum_by_latent(pairs, weights, b, memory) is memory
    assert_close(memory, full.T @ b, **EXACT)


@pytest.mark.usefixtures("proposal")
@each("d_sae", [1023, 1024, 1025, 2055])
def test_blocks_of_latents_join(d_sae: int) -> None:
    x, encoder, bias = difficult(5, 16, d_sae, 0, 1.0, 1.0, "normal")
    pairs, pre = select_above(x, encoder, bias - 8)
    exact = x.double() @ encoder.double().T + bias.double() - 8
    assert_close(pairs.matrix(pre).double(), exact.relu(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("proposal")
def test_a_dense_batch_takes_the_plain_product() -> None:
    x, encoder, bias = difficult(6, 8, 30, 0, 1.0, 1.0, "normal")
    pairs, pre = select_above(x, encoder, bias + 100)
    assert pairs.dense
    assert_close(pairs.matrix(pre), torch.addmm(bias + 100, x, encoder.T))


# ------------------------------------------------------------------------------------------------------------- the k-th
def values() -> dict[str, Callable[[Tensor], Tensor]]:
    """Pre-activations on which a search for the k-th largest can fail."""
    return {
        "normal": lambda t: t,
        "ties": lambda t: (t * 2).round(),
        "all equal": torch.ones_like,
        "all negative": lambda t: -t.abs() - 0.1,
        "all zero": torch.zeros_like,
        "few positives": lambda t: torch.where(t > 2.0, t, -t.abs()),
        "many magnitudes": lambda t: torch.exp(t * 12),
        "small magnitudes": lambda t: torch.exp(t * 4 - 40),
        "one giant": lambda t: torch.where(t == t.max(), 1e30, t),
        "sorted": lambda t: t.flatten().sort().values.view_as(t),
        "one latent alone": lambda t: torch.where(torch.arange(t.shape[1]) == 0, t.abs(), -1.0),
        "one row alone": lambda t: torch.where(torch.arange(len(t))[:, None] == 0, t.abs(), -1.0),
    }


GUESSES = [None, -1.0, 0.0, 1e-9, 0.5, 3.0, 1e4]


def given_pre(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, encoder and bias whose pre-activations are these: the unit vectors as inputs."""
    return torch.eye(len(pre), dtype=pre.dtype), pre.T.contiguous(), torch.zeros(pre.shape[1], dtype=pre.dtype)


def assert_selected(pairs: Pairs, got: Tensor, pre: Tensor) -> None:
    assert_close(pre[pairs.row, pairs.latent], got, rtol=0, atol=0)
    assert (got > 0).all()
    assert ((pairs.latent * len(pre) + pairs.row).diff() > 0).all()


@each("name", values())
@examples(30)
@given(
    batch=st.integers(1, 30),
    d_sae=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
    guess=st.sampled_from(GUESSES),
)
def test_batch_topk_is_topk_of_the_flat_batch(
    name: str, batch: int, d_sae: int, share: float, seed: int, guess: float | None
) -> None:
    pre = values()[name](torch.randn(batch, d_sae, generator=generator(seed), dtype=torch.float64))
    n = max(1, round(share * pre.numel()))
    pairs, got = select_batch_topk(*given_pre(pre), n, guess)
    expected = pre.flatten().topk(n).values
    assert_close(got.sort(descending=True).values, expected[expected > 0], rtol=0, atol=0)
    assert_selected(pairs, got, pre)


@each("name", values())
@examples(30)
@given(
    batch=st.integers(1, 30),
    d_sae=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
    guess=st.sampled_from(GUESSES),
)
def test_topk_is_topk_of_each_row(
    name: str, batch: int, d_sae: int, share: float, seed: int, guess: float | None
) -> None:
    pre = values()[name](torch.randn(batch, d_sae, generator=generator(seed), dtype=torch.float64))
    k = max(1, round(share * d_sae))
    pairs, got = select_topk(*given_pre(pre), k, guess)
    assert_selected(pairs, got, pre)
    f = pairs.matrix(got).sort(1, descending=True).values
    assert_close(f[:, :k], pre.topk(k, dim=1).values.relu(), rtol=0, atol=0)
    assert not f[:, k:].any()


@pytest.mark.usefixtures("proposal")
@SHARED
@given(k=st.integers(1, 9), **INPUTS)
def test_topk_in_float32_is_that_of_exact_numbers_but_for_rounding(k: int, of_rows: float, **inputs: Any) -> None:
    x, encoder, bias = difficult(**inputs)
    k = min(k, len(encoder))
    pairs, pre = select_topk(x, encoder, bias, k, of_rows)
    exact = x.double() @ encoder.double().T + bias.double()
    size = torch.linalg.vector_norm(x.double(), dim=1)[:, None] * torch.linalg.vector_norm(encoder.double(), dim=1)
    rounding = (2**-22 * (x.shape[1] + 2) * (size + bias.double().abs())).amax(1, keepdim=True)
    got = pairs.matrix(pre).double().sort(1, descending=True).values
    assert (got[:, :k] - exact.topk(k, dim=1).values.relu()).abs().le(rounding).all()
    assert not got[:, k:].any()
    assert ((pre - exact[pairs.row, pairs.latent]).abs() <= rounding[pairs.row, 0]).all()
    assert ((pairs.latent * len(x) + pairs.row).diff() > 0).all()


@each("kind", ["normal", "sizes of latents", "biases", "one bias", "one giant", "no whole groups", "many latents"])
def test_few_are_proposed_in_vain_to_be_among_the_largest(kind: str) -> None:
    d_sae = {"no whole groups": 805, "many latents": 4096}.get(kind, 800)
    x, encoder, bias = difficult(64, 128, d_sae, 0, 1.0, 1.0, "normal")
    if kind == "sizes of latents":
        encoder *= torch.exp(0.5 * torch.randn(d_sae, 1, generator=generator(1)))
    elif kind == "biases":
        bias = 3 * torch.randn(d_sae, generator=generator(1))
    elif kind == "one bias":
        bias = torch.full((d_sae,), -1e-3)
        bias[17] = -1000.0
    elif kind == "one giant":
        encoder[17] *= 1000
    found = proposals.proposed_topk(x, encoder, bias, 8)
    assert found is not None
    latent, row, limit = found
    pre = torch.addmm(bias, x, encoder.T)
    assert (limit < pre.topk(8, dim=1).values[:, -1]).all()  # other rows would be looked at again
    assert 8 * 64 < len(latent) < 4 * 8 * 64
    proposed = torch.zeros_like(pre, dtype=torch.bool)
    proposed[row, latent] = True
    assert proposed[pre > limit[:, None]].all()
    assert ((latent * 64 + row).diff() > 0).all()


def test_rows_whose_limit_was_too_high_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, encoder, bias = difficult(20, 16, 64, 0, 1.0, 1.0, "normal")
    x[3], bias[:3], bias[3:] = 0.0, 2.0, -1.0  # there three are positive, above a limit of zero
    again, topk_dense = [], kernels._topk_dense

    def looked_at(*given: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        again.extend(given[-1].tolist())
        return topk_dense(*given)

    monkeypatch.setattr(kernels, "fast_bytes", lambda: True)
    monkeypatch.setattr(kernels, "_topk_dense", looked_at)
    monkeypatch.setattr(proposals, "_MARGIN", -5.0)
    pairs, pre = select_topk(x, encoder, bias, 5)
    expected = torch.addmm(bias, x, encoder.T).topk(5, dim=1).values.relu()
    assert_close(pairs.matrix(pre).sort(1, descending=True).values[:, :5], expected, rtol=1e-4, atol=1e-4)
    assert len(again) > 3
    assert 3 not in again


@pytest.mark.usefixtures("proposal")
def test_latents_of_large_biases_are_among_the_largest() -> None:
    x, encoder, bias = difficult(64, 128, 800, 0, 1.0, 1.0, "normal")
    bias[[3, 500]] = torch.tensor([1e6, 1e7])
    for k, expected in ((1, {500}), (2, {3, 500})):
        pairs, _ = select_topk(x, encoder, bias, k)
        assert set(pairs.latent.tolist()) == expected
        assert len(pairs) == 64 * k


@pytest.mark.usefixtures("proposal")
@each(("size", "guess"), [(0.0, 1e3), (1e19, None)])
def test_rows_without_a_limit_keep_what_was_found(size: float, guess: float | None) -> None:
    x, encoder, bias = difficult(20, 16, 30, 0, 1.0, 1.0, "normal")
    x[3], bias[:3], bias[3:] = size * x[3], 2.0, -1.0  # of zeros three are positive; the norm of others overflows
    pairs, pre = select_topk(x, encoder, bias, 5, guess)
    expected = torch.addmm(bias, x, encoder.T).topk(5, dim=1).values.relu()
    assert_close(pairs.matrix(pre).sort(1, descending=True).values[:, :5], expected, rtol=1e-4, atol=1e-4)
    assert expected[3].any()


@pytest.mark.parametrize("products", [1, 13_000])
def test_parts_of_the_inputs_join(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, encoder, bias = difficult(150, 40, 90, 0, 1.0, 1.0, "normal")
    limit = limits(x, encoder, 0.1)

    def found() -> list[Tensor]:
        by_limit, by_rank = proposals.proposed(x, encoder, bias, limit), proposals.proposed_topk(x, encoder, bias, 5)
        assert by_limit is not None
        assert by_rank is not None
        return [*by_limit, *by_rank]

    at_once = found()
    monkeypatch.setattr(proposals, "_PRODUCTS", products)
    for part, everything in zip(found(), at_once, strict=True):
        assert len(part) > 20
        assert_close(part, everything, rtol=0, atol=0)


@each("n", [1, 3600, 200_000])
@each("name", values())
def test_batch_topk_is_exact_where_its_bound_is_a_guess_from_some_rows(name: str, n: int) -> None:
    pre = values()[name](torch.randn(300, 1500, generator=generator(1)))
    _, got = select_batch_topk(*given_pre(pre), n)
    expected = pre.flatten().topk(n).values
    assert_close(got.sort(descending=True).values, expected[expected > 0], rtol=1e-6, atol=0)


@each("bad", [torch.inf, torch.nan])
@each("guess", [None, 1.0, torch.inf, torch.nan])
@each("select", [select_batch_topk, select_topk])
def test_the_search_ends_on_what_overflowed(select: Callable[..., Any], guess: float | None, bad: float) -> None:
    def alarm(*_: Any) -> None:
        pytest.fail("the search for a bound does not end")

    x, encoder, bias = torch.ones(8, 2), torch.ones(8, 2), torch.full((8,), bad)
    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        select(x, encoder, bias, 3, guess)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@each("n", [1, BLOCK + 3])
def test_what_is_parallel_is_taken_from_each_row(n: int) -> None:
    rows = torch.nn.functional.normalize(torch.randn(n, 50, generator=generator(0)), dim=1)
    gradient = torch.randn(n, 50, generator=generator(1))
    expected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    for exact in (gradient.double(), gradient):
        kernels.take_parallel(exact, rows.to(exact))
        assert_close(exact, expected.to(exact), rtol=1e-5, atol=1e-5)
    transposed = torch.randn(50, n, generator=generator(2)).T
    expected = transposed - (transposed * rows).sum(1, keepdim=True) * rows
    kernels.take_parallel(transposed, rows)
    assert_close(transposed, expected, rtol=1e-5, atol=1e-5)
