import dataclasses
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from headscope.corpus import Corpus
from headscope.errors import CorpusError, ModelError, SAEError, TrainingError
from headscope.models.hf import Model
from headscope.sae.config import TrainConfig
from headscope.sae.convert import check_fits
from headscope.sae.model import SAE, JumpReLU, ReLU
from headscope.sae.train import (
    DENSE_ABOVE,
    ActivationStream,
    Active,
    Gradients,
    Parameters,
    Status,
    Trainer,
    dense_gradients,
    gradients,
    n_activations,
    select_batch_topk,
    select_relu,
    sparse_gradients,
    train_sae,
)
from headscope.site import Site

EXACT = {"rtol": 1e-10, "atol": 1e-10}
Z1 = Site("z", 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------- gradients
def problem(batch: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[Parameters, Tensor]:
    g = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = Parameters(normal(d_sae, d_in), normal(d_sae) - 1, normal(d_sae, d_in), normal(d_in))
    return p, normal(batch, d_in)


def autograd_gradients(p: Parameters, x: Tensor, active: Active, l1: float) -> Gradients:
    """The loss as the file's head writes it, differentiated by torch; which pairs are active is held fixed."""
    leaves = [t.clone().requires_grad_(True) for t in p.tensors()]
    encoder, b_enc, decoder, b_dec = leaves
    mask = torch.zeros(len(x), len(b_enc), dtype=torch.bool)
    mask[active.row, active.latent] = True
    f = ((x - b_dec) @ encoder.T + b_enc) * mask
    error = x - (f @ decoder + b_dec)
    squared_error, l1_norm = error.square().sum(1), f.sum() / len(x)
    (squared_error.mean() + l1 * l1_norm).backward()
    return Gradients(squared_error.detach(), l1_norm.item(), error.detach(), [t.grad for t in leaves])


def assert_same(got: Gradients, expected: Gradients) -> None:
    assert_close(got.squared_error, expected.squared_error, **EXACT)
    assert_close(got.error, expected.error, **EXACT)
    assert_close(got.l1, expected.l1, **EXACT)
    for name, a, b in zip(("encoder", "b_enc", "decoder", "b_dec"), got.tensors, expected.tensors, strict=True):
        assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


SELECTIONS: dict[str, Callable[[Tensor], Active]] = {
    "relu": select_relu,
    "batchtopk": lambda pre: select_batch_topk(pre, 3 * len(pre)),
    "one pair": lambda pre: select_batch_topk(pre, 1),
    "nothing": lambda pre: select_batch_topk(pre, 0),
    "rows without": lambda pre: select_relu(torch.where(torch.arange(len(pre))[:, None] % 3 > 0, pre, -1.0)),
    "only the last row": lambda pre: select_relu(
        torch.where(torch.arange(len(pre))[:, None] + 1 == len(pre), pre, -1.0)
    ),
}


@pytest.mark.parametrize("make", [sparse_gradients, dense_gradients, gradients])
@pytest.mark.parametrize("l1", [0.0, 0.7])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_written_out_gradients_are_those_of_autograd(
    make: Callable[..., Gradients], l1: float, selection: str
) -> None:
    p, x = problem(batch=11, d_in=6, d_sae=20)
    active = SELECTIONS[selection](p.pre_activations(x))
    assert_same(make(p, x, active, l1), autograd_gradients(p, x, active, l1))


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 30), st.floats(0, 2), st.integers(0, 2**31 - 1))
def test_gradients_agree_for_any_sizes(batch: int, d_in: int, d_sae: int, l1: float, seed: int) -> None:
    p, x = problem(batch, d_in, d_sae, seed)
    active = select_relu(p.pre_activations(x))
    expected = autograd_gradients(p, x, active, l1)
    assert_same(sparse_gradients(p, x, active, l1), expected)
    assert_same(dense_gradients(p, x, active, l1), expected)


@pytest.mark.parametrize("n_per_row", [1, 50])
def test_the_choice_of_sparse_or_dense_does_not_change_the_numbers(n_per_row: int) -> None:
    p, x = problem(batch=8, d_in=6, d_sae=200)
    active = select_batch_topk(p.pre_activations(x), n_per_row * len(x))
    assert (len(active.value) / (len(x) * 200) > DENSE_ABOVE) == (n_per_row == 50)
    assert_same(gradients(p, x, active, 0.1), autograd_gradients(p, x, active, 0.1))


def test_the_gradients_do_not_change_their_inputs() -> None:
    p, x = problem(batch=5, d_in=4, d_sae=9)
    before = [t.clone() for t in (*p.tensors(), x)]
    active = select_relu(p.pre_activations(x))
    sparse_gradients(p, x, active, 0.1)
    dense_gradients(p, x, active, 0.1)
    for a, b in zip((*p.tensors(), x), before, strict=True):
        assert_close(a, b, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- selection
def dense_of(active: Active, like: Tensor) -> Tensor:
    f = torch.zeros_like(like)
    f[active.row, active.latent] = active.value
    return f


@pytest.mark.parametrize("select", [select_relu, lambda pre: select_batch_topk(pre, 13)])
def test_pairs_are_ordered_by_input_and_row_starts_point_at_them(select: Callable[[Tensor], Active]) -> None:
    pre = torch.randn(7, 9, generator=generator())
    pre[3] = -1
    active = select(pre)
    flat = active.row * 9 + active.latent
    assert (flat.diff() > 0).all()
    for row, start in enumerate(active.row_starts.tolist()):
        n = int((active.row == row).sum())
        assert (active.row[start : start + n] == row).all()


def test_relu_selects_exactly_what_is_positive() -> None:
    pre = torch.randn(7, 9, generator=generator())
    assert_close(dense_of(select_relu(pre), pre), pre.relu(), rtol=0, atol=0)


def shapes_of_values() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "normal": lambda t: t,
        "ties": lambda t: (t * 2).round(),
        "all equal": lambda t: torch.ones_like(t),
        "all negative": lambda t: -t.abs() - 0.1,
        "all zero": torch.zeros_like,
        "few positives": lambda t: torch.where(t > 2.0, t, -t.abs()),
        "many magnitudes": lambda t: torch.exp(t * 12),
        "many small magnitudes": lambda t: torch.exp(t * 12 - 60),
        "one giant": lambda t: torch.where(t == t.max(), 1e30, t),
        "sorted": lambda t: t.flatten().sort().values.view_as(t),
        "one latent alone": lambda t: torch.where(torch.arange(t.shape[1]) == 0, t.abs(), -1.0),
    }


@pytest.mark.parametrize("values", shapes_of_values())
@given(
    batch=st.integers(1, 40),
    d_sae=st.integers(1, 80),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_batch_topk_selects_what_topk_over_the_flattened_batch_does(
    values: str, batch: int, d_sae: int, share: float, seed: int
) -> None:
    pre = shapes_of_values()[values](torch.randn(batch, d_sae, generator=generator(seed)))
    n = round(share * pre.numel())
    active = select_batch_topk(pre, n)
    expected = pre.flatten().topk(n).values
    expected = expected[expected > 0]
    assert_close(active.value.sort(descending=True).values, expected, rtol=0, atol=0)
    assert_close(pre[active.row, active.latent], active.value, rtol=0, atol=0)
    assert len({*zip(active.row.tolist(), active.latent.tolist(), strict=True)}) == len(active.value)
    assert active.batch == batch


@pytest.mark.parametrize("values", shapes_of_values())
def test_batch_topk_is_exact_where_its_bound_is_a_guess_from_a_sample(values: str) -> None:
    pre = shapes_of_values()[values](torch.randn(300, 1500, generator=generator(1)))
    for n in (1, 3600, 200_000):
        active = select_batch_topk(pre, n)
        expected = pre.flatten().topk(n).values
        assert_close(active.value.sort(descending=True).values, expected[expected > 0], rtol=0, atol=0)


def test_batch_topk_of_a_batch_with_its_large_values_where_the_sample_does_not_look() -> None:
    pre = torch.full((2, 262_144), 1e-3)
    pre[:, 1:1000:8] = 5.0
    pre[:, 0::8] = 100.0  # the sample is every eighth entry
    active = select_batch_topk(pre, 65_700)
    assert_close(active.value.sort().values, pre.flatten().topk(65_700).values.sort().values, rtol=0, atol=0)


@pytest.mark.parametrize("n", [3, 30])
def test_batch_topk_ends_on_values_that_overflowed(n: int) -> None:
    def alarm(*_: Any) -> None:
        pytest.fail("the search for a bound does not end")

    pre = torch.full((8, 8), torch.inf)
    pre[4:] = 1.0
    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        active = select_batch_topk(pre, n)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert len(active.value) == n


# ------------------------------------------------------------------------------------------------------------- trainer
def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"d_sae": 24, "target_l0": 3.0, "batch": 64, "tokens": 6400, "buffer": 512} | changes))


def data(n: int, d_in: int = 16, seed: int = 0) -> Tensor:
    g = generator(seed)
    return torch.randn(n, d_in, generator=g) * torch.rand(d_in, generator=g) * 0.2 + torch.randn(d_in, generator=g)


def trainer(steps: int = 0, **changes: Any) -> Trainer:
    made = Trainer(data(512), config(**changes))
    for step in range(steps):
        made.step(step, data(64, seed=step + 1))
    return made


def test_the_first_dictionary_is_of_data_at_unit_norm_and_tied() -> None:
    t = trainer()
    assert_close(t.p.decoder.norm(dim=1), torch.ones(24))
    assert_close(t.p.encoder, t.p.decoder, rtol=0, atol=0)
    samples = data(512) * t.scale
    assert_close(t.p.b_dec.detach(), samples.mean(0))
    centred = samples - samples.mean(0)
    cosines = torch.nn.functional.normalize(centred, dim=1) @ t.p.decoder.detach().T
    assert (cosines.max(0).values > 0.99).all()


def test_inputs_are_scaled_to_a_mean_distance_of_root_d_in() -> None:
    t = trainer()
    x = data(512) * t.scale
    assert_close((x - x.mean(0)).norm(dim=1).mean(), torch.tensor(4.0))


@pytest.mark.parametrize("variant", ["relu", "batchtopk"])
def test_decoder_rows_keep_unit_norm_and_the_applied_gradient_is_orthogonal_to_them(variant: str) -> None:
    t = Trainer(data(512).double(), config(variant=variant))
    for step in range(8):
        rows = t.p.decoder.detach().clone()
        t.step(step, data(64, seed=step).double())
        applied = t.p.decoder.grad
        assert applied.abs().max() > 1e-3
        assert_close((applied * rows).sum(1), torch.zeros(24, dtype=torch.float64), **EXACT)
        assert_close(t.p.decoder.norm(dim=1), torch.ones(24, dtype=torch.float64), **EXACT)


def test_only_the_decoder_gradient_is_changed_before_it_is_applied() -> None:
    t = trainer(steps=2, variant="relu")
    x = data(64, seed=9) * t.scale
    p = Parameters(*(tensor.detach().clone() for tensor in t.p.tensors()))
    expected = dense_gradients(p, x, select_relu(p.pre_activations(x)), t.l1)
    d_decoder = expected.tensors[2]
    expected.tensors[2] = d_decoder - (d_decoder * p.decoder).sum(1, keepdim=True) * p.decoder
    t.step(2, x / t.scale)
    for tensor, grad in zip(t.p.tensors(), expected.tensors, strict=True):
        assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    t = trainer(tokens=64 * 1000, lr=0.5)
    assert t.config.n_steps == 1000
    expected = {0: 1 / 200, 99: 0.5, 199: 1.0, 200: 1.0, 700: 1.0, 701: 299 / 300, 850: 0.5, 999: 1 / 300}
    assert {step: pytest.approx(t.rate(step)) for step in expected} == expected
    for step in (0, 199, 999):
        t.step(step, data(64))
        assert t.adam.param_groups[0]["lr"] == pytest.approx(0.5 * expected[step])


def test_a_short_run_never_exceeds_either_end_of_the_schedule() -> None:
    t = trainer(tokens=64 * 3)
    assert [t.rate(step) for step in range(3)] == pytest.approx([1 / 200, 2 / 200, 3 / 200])


def test_the_steps_cover_the_tokens_asked_for() -> None:
    assert config(tokens=6400).n_steps == 100
    assert config(tokens=6401).n_steps == 101
    assert config(tokens=1).n_steps == 1


def test_a_status_states_the_measures_of_its_batch() -> None:
    t = trainer(steps=4)
    x = data(64, seed=5)
    p = Parameters(*(tensor.detach().clone() for tensor in t.p.tensors()))
    scaled = x * t.scale
    active = select_batch_topk(p.pre_activations(scaled), 3 * 64)
    error = scaled - dense_of(active, p.pre_activations(scaled)) @ p.decoder - p.b_dec
    status = t.step(4, x)
    assert status.l0 == len(active.value) / 64 == 3.0
    assert status.squared_error == pytest.approx(error.square().sum(1).mean().item(), rel=1e-4)
    variance = (scaled - scaled.mean(0)).square().sum().item()
    assert status.explained_variance == pytest.approx(1 - error.square().sum().item() / variance, rel=1e-4)
    assert (status.step, status.n_steps, status.tokens) == (4, 100, 5 * 64)


def test_the_l1_coefficient_is_steered_towards_the_target() -> None:
    too_dense, too_sparse = trainer(variant="relu", target_l0=0.1), trainer(variant="relu", target_l0=23.0)
    first = [too_dense.l1, too_sparse.l1]
    for t in (too_dense, too_sparse):
        t.step(0, data(64))
    assert too_dense.l1 > first[0]
    assert too_sparse.l1 < first[1]
    assert trainer(steps=3).l1 == 0


# ---------------------------------------------------------------------------------------------------------- resampling
def resample(t: Trainer, dead: list[int]) -> Gradients:
    """Declare some latents dead and resample them on a batch."""
    t.fired[:] = True
    t.fired[dead] = False
    x = data(64, seed=77) * t.scale
    with torch.no_grad():
        result = gradients(t.p, x, t.select(x), t.l1)
        t._resample(x, result)
    return result


def state(t: Trainer) -> dict[str, Tensor]:
    moments = {
        f"{i} {name}": t.adam.state[tensor][name]
        for i, tensor in enumerate(t.p.tensors())
        for name in ("exp_avg", "exp_avg_sq")
    }
    weights = {f"{i}": tensor.detach() for i, tensor in enumerate(t.p.tensors())}
    return {name: tensor.clone() for name, tensor in (weights | moments).items()}


@pytest.mark.parametrize("variant", ["relu", "batchtopk"])
@pytest.mark.parametrize("dead", [[3, 7, 8], [0], list(range(23))])
def test_resampling_changes_only_dead_latents(variant: str, dead: list[int]) -> None:
    t = trainer(steps=6, variant=variant)
    before, x = state(t), data(30, seed=5) * t.scale
    pre = t.p.pre_activations(x).detach()
    result = resample(t, dead)
    alive = [i for i in range(24) if i not in dead]
    assert_close(t.p.pre_activations(x)[:, alive].detach(), pre[:, alive])
    after = state(t)
    for name, tensor in before.items():
        if name.startswith("3"):  # b_dec
            assert_close(after[name], tensor, rtol=0, atol=0)
        else:
            assert_close(after[name][alive], tensor[alive], rtol=0, atol=0)
            if "exp" in name:
                assert_close(after[name][dead], torch.zeros_like(tensor[dead]), rtol=0, atol=0)
    directions = torch.nn.functional.normalize(result.error, dim=1)
    assert ((after["2"][dead] @ directions.T).max(1).values > 1 - 1e-5).all()
    assert_close(after["2"].norm(dim=1), torch.ones(24))
    factor = 0.2 if variant == "relu" else 1.0
    size = factor * before["0"][alive].norm(dim=1).mean()
    assert_close(after["0"][dead], after["2"][dead] * size)
    assert_close(after["1"][dead], torch.zeros(len(dead)), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["relu", "batchtopk"])
def test_resampling_with_no_dead_latent_changes_nothing(variant: str) -> None:
    t = trainer(steps=6, variant=variant)
    before = state(t)
    resample(t, [])
    for name, tensor in state(t).items():
        assert_close(tensor, before[name], rtol=0, atol=0)


def test_resampling_with_all_latents_dead_starts_them_all_anew() -> None:
    t = trainer(steps=6)
    resample(t, list(range(24)))
    after = state(t)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert_close(after["2"].norm(dim=1), torch.ones(24))
    assert_close(after["0"], after["2"])
    t.step(6, data(64, seed=6))


def test_badly_reconstructed_inputs_are_drawn_more_often() -> None:
    t = trainer(steps=6, d_sae=400)
    result = resample(t, list(range(399)))
    directions = torch.nn.functional.normalize(result.error, dim=1)
    drawn = torch.bincount((t.p.decoder.detach()[:399] @ directions.T).argmax(1), minlength=64)
    weights = result.squared_error.double().square()
    expected = 399 * weights / weights.sum()
    spread = expected.sqrt().clamp_min(1)
    assert ((drawn - expected).abs() < 5 * spread).all()


def test_resampling_happens_as_often_as_asked_in_the_first_60_percent() -> None:
    at = []
    for n in (0, 1, 3):
        t = trainer(tokens=64 * 100, resample=n)
        at.append([step for step in range(100) if step in t._resample_at])
    assert at == [[], [60], [20, 40, 60]]


def test_a_latent_that_never_fires_comes_alive_by_resampling() -> None:
    t = trainer(tokens=64 * 10, resample=1)
    with torch.no_grad():
        t.p.b_enc[5] = -1e6
    dead = [t.step(step, data(64, seed=step)).dead for step in range(10)]
    assert dead[5] > 0
    assert t.p.b_enc[5] > -10


# -------------------------------------------------------------------------------------------------------------- finish
def test_the_final_sae_is_the_trained_one_for_raw_activations() -> None:
    t = trainer(steps=50, variant="relu")
    sae = t.finish(data(512), Z1, "m")
    x = data(20, seed=3)
    pre = t.p.pre_activations(x * t.scale).detach()
    assert isinstance(sae.activation, ReLU)
    assert_close(sae.pre_activations(x), pre / t.scale, rtol=1e-4, atol=1e-5)
    x_hat = (pre.relu() @ t.p.decoder + t.p.b_dec).detach() / t.scale
    assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-5)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert not any(getattr(sae, name).requires_grad for name in ("W_enc", "b_enc", "W_dec", "b_dec"))


@pytest.mark.parametrize("n", [512, 9001])
@pytest.mark.parametrize("target_l0", [0.5, 3.0, 7.25])
def test_the_batchtopk_threshold_gives_a_mean_l0_of_k(n: int, target_l0: float) -> None:
    t = trainer(steps=30, target_l0=target_l0)
    x = data(n, seed=4)
    sae = t.finish(x, Z1, "m")
    assert isinstance(sae.activation, JumpReLU)
    assert sae.activation.threshold.unique().numel() == 1
    assert (sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(target_l0, abs=3 / n)


def test_the_threshold_is_zero_where_fewer_than_k_are_positive() -> None:
    t = trainer(steps=5, target_l0=20.0)
    with torch.no_grad():
        t.p.b_enc[10:] = -1e6
    sae = t.finish(data(100), Z1, "m")
    assert_close(sae.activation.threshold, torch.zeros(24))


# ------------------------------------------------------------------------------------------------ planted dictionaries
def planted(n: int, d_in: int, n_features: int, active: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x = sum of a few random unit directions with positive coefficients, plus a constant and a little noise."""
    g = generator(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=g), dim=1)
    on = torch.rand(n, n_features, generator=g).argsort(1) < active
    coefficients = on * (0.5 + torch.rand(n, n_features, generator=g))
    noise = 0.01 * torch.randn(n, d_in, generator=g)
    return directions, coefficients @ directions + noise + torch.randn(d_in, generator=g)


def mean_max_cosine(truth: Tensor, rows: Tensor) -> float:
    return (truth @ torch.nn.functional.normalize(rows, dim=1).T).max(1).values.mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "l0"), [("batchtopk", 2.0), ("relu", 3.0)])
def test_a_planted_dictionary_is_recovered(variant: str, l0: float) -> None:
    truth, x = planted(20_000, d_in=24, n_features=32, active=2)
    steps, batch = 2000, 256
    t = Trainer(
        x[:8192],
        config(variant=variant, d_sae=64, target_l0=l0, batch=batch, tokens=steps * batch, buffer=8192, lr=4e-3),
    )
    g = generator(1)
    for step in range(steps):
        status = t.step(step, x[torch.randint(0, len(x), (batch,), generator=g)])
    sae = t.finish(x[:8192], Z1, "m")
    null = mean_max_cosine(truth, torch.randn(64, 24, generator=g))
    recovered = mean_max_cosine(truth, sae.W_dec)
    assert null < 0.6
    assert recovered > 0.95
    if variant == "batchtopk":  # an L1 penalty shrinks what it reconstructs
        assert status.explained_variance > 0.9
    assert (sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(l0, rel=0.15)


# -------------------------------------------------------------------------------------------------- activation streams
@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


@pytest.fixture(scope="module")
def corpus(model: Model, random_corpus: Callable[..., Corpus]) -> Corpus:
    """No two positions after the first have the same z: each block goes on from its BOS with another token."""
    made = random_corpus(model, n_blocks=40, block_size=17)
    blocks = made.blocks.copy()
    blocks[:, 1] = np.random.default_rng(0).permutation(np.arange(1, model.spec.d_vocab))[:40]
    return dataclasses.replace(made, blocks=blocks)


@pytest.fixture(scope="module")
def everything(model: Model, corpus: Corpus) -> Tensor:
    """z of layer 1 at every position, `[block, position, d]`."""
    return model.read(torch.from_numpy(corpus.blocks).long(), [Z1])[Z1]


def numbers_of(rows: Tensor, everything: Tensor) -> list[int]:
    """Which activation each row is: its position in the flattened corpus."""
    distance, nearest = torch.cdist(rows.double(), everything.flatten(0, 1).double()).min(1)
    assert_close(distance, torch.zeros_like(distance), rtol=0, atol=1e-4)
    return nearest.tolist()


@pytest.mark.parametrize("exclude_bos", [True, False])
@pytest.mark.parametrize("buffer", [64, 200, 100_000])
def test_a_stream_yields_each_activation_about_once_an_epoch(
    model: Model, corpus: Corpus, everything: Tensor, exclude_bos: bool, buffer: int
) -> None:
    stream = ActivationStream(model, corpus, Z1, config(batch=32, buffer=buffer, exclude_bos=exclude_bos))
    special = np.flatnonzero(corpus.blocks.reshape(-1) == corpus.bos)
    wanted = set(range(corpus.n_tokens)) - (set(special.tolist()) if exclude_bos else set())
    held, epochs, counts = len(stream.buffer), 8, np.zeros(everything.shape[0] * 17, dtype=int)
    n_batches = epochs * len(wanted) // 32
    for _, batch in zip(range(n_batches), stream, strict=False):
        assert batch.shape == (32, everything.shape[-1])
        np.add.at(counts, numbers_of(batch, everything), 1)
    if not exclude_bos:  # the BOS of every block has the same z: they cannot be told apart
        first = np.arange(0, counts.size, 17)
        assert counts[first].sum() == pytest.approx(epochs * 40, abs=2 * 40 + held)
        counts, wanted = np.delete(counts, first), {w for w in wanted if w % 17}
        numbers = range(counts.size)
    else:
        assert not counts[special].any()
        numbers = sorted(wanted)
    got = counts[list(numbers)]
    waiting = 1 + -(-held // len(wanted))  # what is still in the buffer was read but not yet handed out
    assert got.max() <= epochs + waiting
    assert got.sum() == pytest.approx(epochs * len(numbers), abs=held)
    assert (got >= 1).mean() > 0.99
    assert stream.epochs <= epochs + waiting


def test_an_activation_is_handed_out_once_for_each_time_it_is_read(
    model: Model, corpus: Corpus, everything: Tensor
) -> None:
    stream = ActivationStream(model, corpus, Z1, config(batch=32, buffer=128))
    seen: list[int] = []
    for batch in stream:
        if stream.epochs > 1:
            break
        seen += numbers_of(batch, everything)
    assert len(seen) == len(set(seen)) >= 40 * 16 - 128 - 128


def test_a_batch_mixes_blocks(model: Model, corpus: Corpus, everything: Tensor) -> None:
    stream = ActivationStream(model, corpus, Z1, config(batch=64, buffer=100_000))
    blocks = {n // 17 for n in numbers_of(next(iter(stream)), everything)}
    assert len(blocks) > 20


def test_a_stream_is_decided_by_its_seed(model: Model, corpus: Corpus) -> None:
    def first(seed: int) -> Tensor:
        stream = ActivationStream(model, corpus, Z1, config(seed=seed))
        return torch.cat([batch for _, batch in zip(range(12), stream, strict=False)])

    assert_close(first(1), first(1), rtol=0, atol=0)
    assert (first(1) - first(2)).abs().max() > 0.1


def test_a_corpus_of_less_than_two_batches_is_refused(model: Model, corpus: Corpus) -> None:
    half = n_activations(corpus, config()) // 2
    with pytest.raises(TrainingError, match=r"(?s)a corpus of \d+ activations.*expected: .*do: "):
        ActivationStream(model, corpus, Z1, config(batch=half + 1, buffer=2 * half + 2))
    ActivationStream(model, corpus, Z1, config(batch=half, buffer=2 * half))


# ----------------------------------------------------------------------------------------------------------- train_sae
def small(**changes: Any) -> TrainConfig:
    return config(**({"batch": 128, "tokens": 128 * 40, "buffer": 512} | changes))


@pytest.mark.parametrize("variant", ["relu", "batchtopk"])
def test_the_same_seed_gives_the_same_weights(model: Model, corpus: Corpus, variant: str) -> None:
    def weights(seed: int) -> Tensor:
        sae = train_sae(model, corpus, Z1, small(seed=seed, variant=variant)).sae
        return torch.cat([sae.W_enc.flatten(), sae.W_dec.flatten(), sae.b_enc, sae.b_dec])

    assert_close(weights(1), weights(1), rtol=0, atol=0)
    assert (weights(1) - weights(2)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["z", "attn_out", "mlp_out", "resid_pre"])
def test_training_states_how_it_went(model: Model, corpus: Corpus, kind: Any) -> None:
    seen: list[Status] = []
    result = train_sae(model, corpus, Site(kind, 0), small(), seen.append)
    assert [s.step for s in seen] == list(range(40))
    assert result.epochs == 128 * 40 / n_activations(corpus, small())
    assert not result.interrupted
    assert result.curve[-1]["tokens"] == 128 * 40
    metadata = result.sae.metadata
    assert metadata["training"]["config"] == small().as_dict()
    assert metadata["corpus"] == corpus.provenance()
    assert (metadata["z_convention"], metadata["context_size"]) == ("raw", 17)
    assert (result.sae.site, result.sae.model_name) == (Site(kind, 0), "random gpt_neox")


def test_batchtopk_ends_with_a_mean_l0_near_k(model: Model, corpus: Corpus, everything: Tensor) -> None:
    sae = train_sae(model, corpus, Z1, small(buffer=100_000)).sae
    l0 = (sae.encode(everything[:, 1:]) > 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(3.0, rel=0.1)  # exact on the buffer, of which half was refilled


@pytest.mark.slow
@pytest.mark.parametrize("target_l0", [2.0, 6.0])
def test_relu_reaches_its_target_l0(model: Model, corpus: Corpus, everything: Tensor, target_l0: float) -> None:
    chosen = small(variant="relu", target_l0=target_l0, tokens=128 * 2500, lr=3e-3, resample=0)
    sae = train_sae(model, corpus, Z1, chosen).sae
    l0 = (sae.encode(everything[:, 1:]) > 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(target_l0, rel=0.15)


@pytest.mark.parametrize("at", [0, 7])
def test_ctrl_c_returns_what_was_trained_and_says_so(model: Model, corpus: Corpus, at: int) -> None:
    def press(status: Status) -> None:
        if status.step == at:
            raise KeyboardInterrupt

    result = train_sae(model, corpus, Z1, small(), press)
    assert result.interrupted
    assert result.sae.metadata["training"]["interrupted"] is True
    assert result.epochs == (at + 1) * 128 / n_activations(corpus, small())
    assert result.sae.encode(torch.zeros(3, 32)).shape == (3, 24)


def test_activations_that_are_not_finite_are_refused(random_model: Callable[..., Model], corpus: Corpus) -> None:
    broken = random_model("gpt_neox")
    broken.module.gpt_neox.layers[0].mlp.dense_4h_to_h.bias.data[2] = torch.nan
    with pytest.raises(TrainingError, match=r"(?s)NaN or infinity in blocks\.1\.attn\.hook_z.*expected: .*do: "):
        train_sae(broken, corpus, Z1, small())
    train_sae(broken, corpus, Site("z", 0), small(tokens=256))


@pytest.mark.parametrize("lr", [1e10, 1e25])
@pytest.mark.parametrize("variant", ["relu", "batchtopk"])
def test_training_that_diverges_says_so(lr: float, variant: str) -> None:
    t = trainer(lr=lr, variant=variant)

    def run() -> None:
        for step in range(100):
            t.step(step, data(64, seed=step))

    with pytest.raises(TrainingError, match=r"(?s)the loss at step \d+ is (nan|inf).*expected: .*do: lower --lr"):
        run()


def test_a_layer_that_does_not_exist_is_refused(model: Model, corpus: Corpus) -> None:
    with pytest.raises(ModelError, match="layer 2 of"):
        train_sae(model, corpus, Site("z", 2), small())


def test_a_corpus_that_the_model_cannot_read_is_refused(
    model: Model, corpus: Corpus, random_corpus: Callable[..., Corpus]
) -> None:
    with pytest.raises(CorpusError, match="blocks of 65 tokens"):
        train_sae(model, random_corpus(model, 4, 65), Z1, small())
    foreign = dataclasses.replace(corpus, blocks=corpus.blocks + model.spec.d_vocab)
    with pytest.raises(CorpusError, match="token id"):
        train_sae(model, foreign, Z1, small())


def test_an_sae_that_does_not_fit_is_refused(
    model: Model, random_model: Callable[..., Model], random_sae: Callable[..., SAE]
) -> None:
    check_fits(random_sae(model), model)
    llama = random_model("llama")  # z is wider than the residual stream
    check_fits(random_sae(llama), llama)
    check_fits(random_sae(llama, site=Site("mlp_out", 0)), llama)
    with pytest.raises(SAEError, match=r"(?s)vectors of 32.*expected: 48.*do: "):
        check_fits(random_sae(model), llama)
    with pytest.raises(ModelError, match="layer 5"):
        check_fits(random_sae(model, site=Site("z", 5)), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_sae": 0},
        {"target_l0": 0.0},
        {"target_l0": float("nan")},
        {"target_l0": 24.0},
        {"tokens": 0},
        {"batch": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"buffer": 127},
        {"resample": -2},
        {"seed": -1},
    ],
)
def test_values_that_cannot_train_anything_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"(?s)expected: "):
        config(**changes)
