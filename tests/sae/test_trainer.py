"""One step of training, resampling, and the SAE that comes out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from headscope.errors import TrainingError
from headscope.sae.model import SAE, Gated, JumpReLU, ReLU, TopK
from headscope.sae.training import objectives
from headscope.sae.training.dictionary import geometric_median, scale_of
from headscope.sae.training.trainer import Trainer
from headscope.site import Site
from small_training import (
    APRIL,
    BATCH,
    D_HEAD,
    RECIPES,
    config,
    data,
    mean_max_cosine,
    outcome,
    planted,
    trainer,
    w_o,
    weights,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
Z1 = Site("z", 1)
every_recipe = pytest.mark.parametrize("name", RECIPES)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------------- start
@pytest.mark.parametrize("variant", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_the_first_dictionary_is_of_data_at_unit_norm_and_tied(variant: str) -> None:
    t = trainer(variant=variant)
    samples = data(512) * t.scale
    centred = normalize(samples - samples.mean(0), dim=1)
    decoder, encoder = t.p["decoder"], t.p["encoder"]
    assert_close(decoder.norm(dim=1), ones(24))
    assert ((centred @ decoder.T).max(0).values > 0.99).all()
    assert_close(t.p["b_dec"], samples.mean(0))
    assert_close(normalize(encoder, dim=1), decoder)
    assert_close(encoder.norm(dim=1), encoder[0].norm().expand(24))


def test_the_first_dictionary_is_in_the_subspace_where_inputs_vary() -> None:
    g = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(16, 5, generator=g, dtype=torch.float64)).Q.T
    x = torch.randn(400, 5, generator=g, dtype=torch.float64) @ basis + 3.0
    t = trainer(samples=x, start="subspace", scaling="none")
    assert_close(t.p["decoder"] @ basis.T @ basis, t.p["decoder"])
    assert_close(t.p["decoder"].norm(dim=1), ones(24))
    assert torch.linalg.matrix_rank(t.p["decoder"]) == 5


def test_a_random_start_ties_nothing_and_scales_nothing() -> None:
    t = trainer(start="random", variant="relu")
    assert_close(t.p["decoder"].norm(dim=1), ones(24))
    cosines = (normalize(t.p["encoder"], dim=1) * t.p["decoder"]).sum(1)
    assert cosines.abs().max() < 0.9
    assert t.p["encoder"].square().mean().item() == pytest.approx(2 / 16, rel=0.2)
    assert not t.p["b_enc"].any()


@pytest.mark.parametrize(("decoder", "norm"), [("free", 0.1), ("unit", 1.0)])
@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated", "topk", "batchtopk"])
def test_a_start_as_the_transpose_is_random_for_both(variant: str, decoder: Any, norm: float) -> None:
    t = trainer(start="transpose", variant=variant, decoder=decoder)
    assert torch.equal(t.p["encoder"], t.p["decoder"])
    assert_close(t.p["decoder"].norm(dim=1), norm * ones(24))
    cosines = normalize(t.p["decoder"], dim=1) @ t.p["decoder"].T / norm
    assert (cosines - torch.eye(24).double()).abs().max() < 0.9
    assert not t.p["b_enc"].any()
    for step in range(4):
        t.step(data(BATCH, seed=step))
    assert not torch.equal(t.p["encoder"], t.p["decoder"])


@every_recipe
def test_the_first_reconstructions_are_better_than_none(name: str) -> None:
    t = trainer(**RECIPES[name])
    x = data(512)
    error = outcome(t, x).error
    assert error.square().sum() < ((x - x.mean(0)) * t.scale).square().sum()


@pytest.mark.parametrize("center", ["mean", "median", "zero", "none"])
def test_b_dec_starts_at_the_centre_that_is_asked_for(center: Any) -> None:
    t = trainer(center=center)
    samples = data(512) * t.scale
    expected = {"mean": samples.mean(0), "median": geometric_median(samples)}
    assert_close(t.p["b_dec"], expected.get(center, samples[0] * 0))


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    x = data(101)
    x[:30] += 10  # it is not the mean
    median = geometric_median(x)
    units = normalize(x - median, dim=1)
    assert units.sum(0).norm() < 1e-2  # where the gradient vanishes
    assert (x - median).norm(dim=1).sum() < (x - x.mean(0)).norm(dim=1).sum()


@pytest.mark.parametrize(("scaling", "parts"), [("site", 1), ("head", 4), ("none", 0)])
def test_inputs_are_scaled_to_a_mean_distance_of_root_d(scaling: Any, parts: int) -> None:
    x = data(512)
    scale = scale_of(x, scaling, D_HEAD)
    if scaling == "none":
        assert_close(scale, ones(16))
        return
    centred = ((x - x.mean(0)) * scale).unflatten(1, (parts, -1))
    assert_close(centred.norm(dim=2).mean(0), ones(parts) * (16 / parts) ** 0.5)
    assert scale.unique().numel() == parts


def test_inputs_are_scaled_to_a_mean_norm_of_root_d() -> None:
    x = data(512)
    scale = scale_of(x, "norm", 0)
    assert_close((x * scale).norm(dim=1).mean(), torch.tensor(4.0, dtype=torch.float64))
    assert scale.unique().numel() == 1
    assert scale[0] < 0.9 * scale_of(x, "site", 0)[0]  # inputs lie far from 0


def test_after_w_o_inputs_are_as_long_as_they_are_scaled_to_be() -> None:
    t, x = trainer(scaling="norm", error_in="output"), data(512)
    metric = t.objective.space.metric
    assert metric is not None
    lengths = (((x * t.scale) @ metric) * x * t.scale).sum(1).sqrt()
    assert_close(lengths.mean(), torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("changes", [{"scaling": "head"}, {"error_in": "output"}])
def test_what_only_z_has_is_refused_elsewhere(changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"(?s)at a site without heads or W_O.*expected: .*do: leave out"):
        Trainer(data(512), config(**changes))
    Trainer(data(512), config(**changes), W_O=w_o(), d_head=D_HEAD)


def test_samples_that_are_not_finite_are_refused() -> None:
    x = data(512)
    x[3, 2] = torch.nan
    with pytest.raises(TrainingError, match=r"(?s)NaN or infinity.*expected: finite.*do: "):
        Trainer(x, config())


# ---------------------------------------------------------------------------------------------------------------- step
@every_recipe
def test_decoder_rows_keep_unit_norm_and_the_applied_gradient_is_orthogonal_to_them(name: str) -> None:
    t = trainer(**RECIPES[name])
    for step in range(8):
        rows = t.p["decoder"].clone()
        t.step(data(BATCH, seed=step))
        applied = t.p["decoder"].grad
        assert applied is not None
        assert applied.abs().max() > 1e-4
        along = (applied * rows).sum(1)
        if t.config.decoder == "unit":
            assert_close(along, 0 * along, **EXACT)
            assert_close(t.p["decoder"].norm(dim=1), ones(24), **EXACT)
        else:
            assert along.abs().max() > 1e-4


@every_recipe
def test_nothing_else_is_done_to_the_gradient_before_it_is_applied(name: str) -> None:
    t = trainer(steps=3, **RECIPES[name] | {"clip": None})
    x, decoder = data(BATCH, seed=9), t.p["decoder"].clone()
    expected = outcome(t, x, t.coefficient).gradients
    if t.config.decoder == "unit":
        along = (expected["decoder"] * decoder).sum(1, keepdim=True)
        expected["decoder"] = expected["decoder"] - along * decoder
    t.step(x)
    for weight, gradient in expected.items():
        assert_close(t.p[weight].grad, gradient, **EXACT)


@every_recipe
def test_the_error_falls(name: str) -> None:
    t = trainer(**RECIPES[name], lr=5e-3, warmup_steps=5, coefficient=0.0)
    x = data(512)
    before = outcome(t, x).error.square().sum()
    for step in range(60):
        t.step(data(BATCH, seed=step + 1))
    assert outcome(t, x).error.square().sum() < 0.9 * before


@every_recipe
def test_a_status_states_the_measures_of_its_batch(name: str) -> None:
    t = trainer(steps=4, **RECIPES[name])
    x = data(BATCH, seed=5)
    expected = outcome(t, x, t.coefficient)
    scaled = x * t.scale
    metric = t.objective.space.metric
    root = (
        torch.eye(16, dtype=torch.float64)
        if metric is None
        else torch.linalg.cholesky(metric + 1e-12 * ones(16).diag())
    )
    error = (expected.error @ root).square().sum().item()
    variance = ((scaled - scaled.mean(0)) @ root).square().sum().item()
    status = t.step(x)
    assert status.l0 == len(expected.active) / BATCH
    assert status.squared_error == pytest.approx(error / BATCH, rel=1e-8)
    assert status.explained_variance == pytest.approx(1 - error / variance, rel=1e-8)
    assert (status.step, status.n_steps, status.tokens, status.dead) == (4, 100, 5 * BATCH, 0.0)
    assert status.lr == pytest.approx(t.config.lr * 5 / 200)


@pytest.mark.parametrize("target_l0", [0.5, 3.0, 7.25])
def test_batchtopk_keeps_exactly_k_a_row_on_average(target_l0: float) -> None:
    t = trainer(target_l0=target_l0)
    assert [t.step(data(BATCH, seed=step)).l0 for step in range(20)] == [target_l0] * 20


def test_topk_keeps_exactly_k_in_each_row() -> None:
    t = trainer(steps=10, variant="topk")
    active = outcome(t, data(BATCH, seed=50)).active
    assert (torch.bincount(active.row, minlength=BATCH) == 3).all()


@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated"])
def test_the_coefficient_is_steered_towards_the_target(variant: str) -> None:
    too_dense, too_sparse = (trainer(variant=variant, target_l0=l0) for l0 in (0.1, 23.0))
    first = [too_dense.coefficient, too_sparse.coefficient]
    for t, aim in ((too_dense, 20.0), (too_sparse, 0.1)):
        t.p["b_enc"] += aim - 10  # whatever they start with
        t.step(data(BATCH))
    assert too_dense.coefficient > first[0]
    assert too_sparse.coefficient < first[1]
    assert trainer(steps=3, variant=variant, coefficient=0.2).coefficient == 0.2


@pytest.mark.parametrize("lr", [1e10, 1e25])
@pytest.mark.parametrize("variant", ["relu", "jumprelu", "gated", "topk", "batchtopk"])
def test_training_that_diverges_says_so_and_changes_nothing_more(lr: float, variant: str) -> None:
    t = trainer(samples=data(512).float(), lr=lr, variant=variant, warmup_steps=0)
    before: dict[str, Tensor] = {}

    def run() -> None:
        nonlocal before
        for step in range(100):
            before = weights(t)
            t.step(data(BATCH, seed=step).float())

    with pytest.raises(TrainingError, match=r"(?s)the loss at step \d+ is (nan|inf).*expected: .*do: lower --lr"):
        run()
    for name, tensor in weights(t).items():
        assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------- resampling
def let_die(t: Trainer, dead: list[int]) -> None:
    """Let some latents be dead, and no other."""
    t.step_number = 10_000
    t.last_fired[:] = t.step_number
    t.last_fired[dead] = 0


RESAMPLED = ["relu", "jumprelu", "gated", "topk", "batchtopk"]


@pytest.mark.parametrize("by", ["loss", "random"])
@pytest.mark.parametrize("variant", RESAMPLED)
@pytest.mark.parametrize("dead", [[3, 7, 8], [0], list(range(23))])
def test_resampling_changes_only_dead_latents(variant: str, by: Any, dead: list[int]) -> None:
    t = trainer(steps=6, variant=variant, resample_by=by)
    before, x, seen = weights(t), data(200, seed=77), data(30, seed=5) * t.scale

    def pre() -> Tensor:
        return (seen - t.p["b_dec"]) @ t.p["encoder"].T + t.p["b_enc"]

    pre_before, alive = pre(), [i for i in range(24) if i not in dead]
    errors = x * t.scale - t.p["b_dec"]
    let_die(t, dead)
    assert t.resample(x) == len(dead)
    assert_close(pre()[:, alive], pre_before[:, alive], rtol=0, atol=0)
    after = weights(t)
    for name, tensor in before.items():
        if name.endswith(("step", "b_dec.exp_avg", "b_dec.exp_avg_sq")) or name == "p.b_dec":
            assert_close(after[name], tensor, rtol=0, atol=0)
            continue
        assert_close(after[name][alive], tensor[alive], rtol=0, atol=0)
        if name.startswith("adam."):
            assert_close(after[name][dead], torch.zeros_like(tensor[dead]), rtol=0, atol=0)
    decoder, encoder = after["p.decoder"], after["p.encoder"]
    assert_close(decoder.norm(dim=1), ones(24))
    factor = {"loss": 0.2, "random": 0.01}[by] if variant not in ("topk", "batchtopk") else 1.0
    size = factor * before["p.encoder"][alive].norm(dim=1).mean()
    assert_close(encoder[dead], decoder[dead] * size)
    assert_close(after["p.b_enc"][dead], 0 * ones(len(dead)), rtol=0, atol=0)
    if by == "loss":
        assert ((decoder[dead] @ normalize(errors, dim=1).T).max(1).values > 1 - 1e-9).all()
    assert not t.dead.any()
    t.step(x[:BATCH])


@pytest.mark.parametrize("variant", RESAMPLED)
def test_resampling_with_no_dead_latent_changes_nothing(variant: str) -> None:
    t = trainer(steps=6, variant=variant)
    before, random = weights(t), t.generator.get_state()
    assert t.resample(data(64)) == 0
    for name, tensor in weights(t).items():
        assert_close(tensor, before[name], rtol=0, atol=0)
    assert torch.equal(t.generator.get_state(), random)


@pytest.mark.parametrize("by", ["loss", "random"])
@pytest.mark.parametrize("variant", RESAMPLED)
def test_resampling_with_all_latents_dead_starts_them_all_anew(variant: str, by: Any) -> None:
    t = trainer(steps=6, variant=variant, resample_by=by)
    let_die(t, list(range(24)))
    assert t.resample(data(10)) == 24  # of fewer inputs than latents
    assert all(tensor.isfinite().all() for tensor in weights(t).values())
    assert_close(t.p["decoder"].norm(dim=1), ones(24))
    t.step(data(BATCH))


@pytest.mark.parametrize("variant", RESAMPLED)
def test_resampling_computes_no_gradients(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(steps=6, variant=variant)
    let_die(t, [3])
    monkeypatch.setattr(objectives, "backward", None)
    assert t.resample(data(200, seed=77)) == 1


def test_badly_reconstructed_inputs_are_drawn_more_often() -> None:
    t = trainer(steps=6, d_sae=400)
    x = data(64, seed=77)
    expected_by_loss = outcome(t, x).squared_error.square()
    directions = normalize(x * t.scale - t.p["b_dec"], dim=1)
    let_die(t, list(range(399)))
    t.resample(x)  # more than there are inputs: with replacement
    drawn = torch.bincount((t.p["decoder"][:399] @ directions.T).argmax(1), minlength=64)
    expected = 399 * expected_by_loss / expected_by_loss.sum()
    assert ((drawn - expected).abs() < 5 * expected.sqrt().clamp_min(1)).all()
    assert expected.max() > 5 * expected.median()


def test_no_input_is_drawn_twice_while_there_are_enough() -> None:
    t = trainer(steps=6)
    let_die(t, list(range(20)))
    t.resample(data(40, seed=77))
    cosines = t.p["decoder"][:20] @ t.p["decoder"][:20].T
    assert (cosines - torch.eye(20).double()).max() < 1 - 1e-9


@pytest.mark.parametrize("by", ["loss", "random"])
@pytest.mark.parametrize("variant", RESAMPLED)
def test_a_latent_that_never_fires_comes_alive_by_resampling(variant: str, by: Any) -> None:
    t = trainer(variant=variant, resample_by=by, auxiliary=0.0, dead_after=4 * BATCH, lr=1e-4)
    t.p["b_enc"][5] = -1e6
    if "b_mag" in t.p:
        t.p["b_mag"][5] = -1e6
    shares = [t.step(data(BATCH, seed=step)).dead for step in range(8)]
    assert shares[4] == 0 < shares[6]
    t.resample(data(400, seed=50))
    for step in range(8):
        t.step(data(BATCH, seed=step))
    assert not t.dead[5]


# -------------------------------------------------------------------------------------------------------------- finish
def finished(t: Trainer) -> SAE:
    return t.finish(Z1, "m")


@pytest.mark.parametrize(
    "changes", [{}, {"scaling": "head"}, {"scaling": "none"}, {"scaling": "norm", "center": "none"}]
)
@every_recipe
def test_the_final_sae_reconstructs_raw_activations_as_the_trainer_does(name: str, changes: dict[str, Any]) -> None:
    assert_final_sae_is_the_trainers(trainer(steps=40, **RECIPES[name] | changes, lr=5e-3))


def test_the_final_sae_of_april_2024_is_for_raw_activations() -> None:
    t = trainer(steps=40, **APRIL, coefficient=0.1, lr=5e-3, warmup_steps=0)
    assert t.p["b_dec"].abs().max() > 0.05
    assert not finished(t).apply_b_dec_to_input
    assert_final_sae_is_the_trainers(t)


def assert_final_sae_is_the_trainers(t: Trainer) -> None:
    sae, x = finished(t), data(200, seed=300)
    kinds = {"relu": ReLU, "jumprelu": JumpReLU, "gated": Gated, "topk": TopK, "batchtopk": JumpReLU}
    assert type(sae.activation) is kinds[t.config.variant]
    if t.config.variant == "batchtopk":  # on single inputs: by its threshold
        pre = t.objective.space.seen(x * t.scale, t.p) @ t.p["encoder"].T + t.p["b_enc"]
        f = pre * (pre > t.threshold)
        x_hat = f @ t.p["decoder"] + t.p["b_dec"]
    else:
        result = outcome(t, x)
        f, x_hat = result.active.matrix(result.values), x * t.scale - result.error
    assert (f > 0).any()
    assert (f == 0).any()
    assert_close(sae(x), x_hat / t.scale, **EXACT)
    assert torch.equal(sae.encode(x) > 0, f > 0)
    if t.config.variant != "topk":
        assert_close(sae.W_dec.norm(dim=1), ones(24), **EXACT)
    assert not any(getattr(sae, weight).requires_grad for weight in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert (sae.site, sae.model_name) == (Z1, "m")


@pytest.mark.parametrize("target_l0", [0.5, 3.0, 7.25])
def test_the_batchtopk_threshold_gives_a_mean_l0_near_k(target_l0: float) -> None:
    t = trainer(steps=150, target_l0=target_l0, lr=1e-9)  # a mean over batches, of weights that stay
    sae = finished(t)
    assert isinstance(sae.activation, JumpReLU)
    assert (sae.encode(data(4000, seed=999)) > 0).sum(1).double().mean().item() == pytest.approx(target_l0, rel=0.1)


def test_the_threshold_is_zero_where_fewer_than_k_are_positive() -> None:
    t = trainer(target_l0=20.0)
    t.p["b_enc"][10:] = -1e6
    for step in range(5):
        t.step(data(BATCH, seed=step))
    threshold = finished(t).activation.threshold  # pyright: ignore[reportAttributeAccessIssue]
    assert (threshold < 0.2).all()


# ------------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("recipe", [*RECIPES.values(), APRIL], ids=[*RECIPES, "april 2024"])
def test_a_restored_trainer_goes_on_bit_for_bit(recipe: dict[str, Any]) -> None:
    changes = recipe | {"dead_after": 3 * BATCH}
    first, again = trainer(steps=12, **changes), trainer(**changes)
    again.restore(first.state())
    for t in (first, again):
        for step in range(12):
            t.p["b_enc"][5] = -1e6 if step < 6 else t.p["b_enc"][5]
            t.step(data(BATCH, seed=100 + step))
            if step == 6:
                assert t.resample(data(300, seed=400)) > 0
    assert first.coefficient == again.coefficient
    assert first.threshold == again.threshold
    for weight, tensor in weights(first).items():
        assert torch.equal(tensor, weights(again)[weight]), weight


def test_a_restored_trainer_remembers_how_often_latents_fired() -> None:
    """Cut off within the window before a resampling, after one."""
    changes = {"variant": "relu", "dead_after": 6 * BATCH, "dead_below": 0.05, "resample_every": 10, "resample": 2}
    t, again = trainer(**changes), trainer(**changes)
    for step in range(20):
        if step == 10:
            t.p["b_enc"][:12] -= 0.7
        if step == 17:
            again.restore(t.state())
        for each in (t, again)[: 1 + (step >= 17)]:
            each.step(data(BATCH, seed=step))
    assert t.firings is not None
    assert torch.equal(again.replaceable, t.replaceable)
    assert 0 < t.replaceable.sum() < 24
    assert (t.replaceable & ~t.dead).any()
    assert trainer().state()["firings"] is None


def test_firings_are_counted_in_the_window_before_a_resampling_alone() -> None:
    t = trainer(variant="relu", dead_after=3 * BATCH, dead_below=0.5, resample_every=5, resample=2)
    counted = torch.zeros(24, dtype=torch.int64)
    for step in range(12):
        active = outcome(t, data(BATCH, seed=step)).active
        t.step(data(BATCH, seed=step))
        if step + 1 in (3, 8):
            counted.zero_()
        if step + 1 in (3, 4, 5, 8, 9, 10):
            counted += torch.bincount(active.latent, minlength=24)
        assert torch.equal(t.firings, counted), step
        assert torch.equal(t.replaceable, counted < 0.5 * 3 * BATCH)
    assert counted.sum() > 0


# ------------------------------------------------------------------------------------------------ planted dictionaries
RECOVERED: dict[str, dict[str, Any]] = {
    name: RECIPES[name] for name in RECIPES if name not in ("after W_O", "matryoshka")
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", RECOVERED)
def test_a_planted_dictionary_is_recovered(name: str) -> None:
    truth, x = planted(20_000, d_in=24, n_features=32, active=2)
    steps, batch = 2000 if name == "relu" else 1000, 256  # its coefficient comes from far
    l0 = 3.0 if name in ("relu", "relu, free decoder", "gated") else 2.0
    options = {"d_sae": 64, "target_l0": l0, "batch": batch, "tokens": steps * batch, "buffer": 8192, "lr": 4e-3}
    t = Trainer(x[:8192], config(**options | RECOVERED[name]))
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        t.step(x[torch.randint(0, len(x), (batch,), generator=g)])
    sae = finished(t)
    null = mean_max_cosine(truth, torch.randn(64, 24, generator=g))
    recovered = mean_max_cosine(truth, sae.W_dec)
    assert null < 0.6
    assert recovered > 0.95
    assert (sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(l0, rel=0.15)
