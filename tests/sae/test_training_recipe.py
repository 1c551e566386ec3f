"""The published recipes, step by step beside a loop that is written as they say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from headscope.errors import TrainingError
from headscope.sae.presets import KISSANE_GPT2_COEFFICIENTS, PRESETS, preset
from headscope.sae.training.schedule import coefficient_at, l0_at, rate, steer
from headscope.sae.training.trainer import Trainer
from naive_training import NaiveTraining
from small_training import BATCH, config, data

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SMALL: dict[str, Any] = {"d_sae": 40, "batch": BATCH, "tokens": BATCH * 48, "buffer": 512, "lr": 1e-2}
POST = SMALL | {"resample_every": 16, "resample": 2, "warmup_steps": 10, "dead_after": 8 * BATCH, "coefficient": 0.01}


def beside(name: str, **changes: Any) -> tuple[Trainer, NaiveTraining]:
    """A preset in small, some of whose latents cannot fire, and the naive loop with the same weights."""
    t = Trainer(data(256), replace(preset(name), **changes))
    t.p["b_enc"][[3, 5, 11, 30]] = -100.0
    return t, NaiveTraining(t.p, t.config)


def assert_same_weights(t: Trainer, naive: NaiveTraining, step: int) -> None:
    for name, weight in naive.p.items():
        assert_close(t.p[name], weight.detach(), **EXACT, msg=lambda m, name=name: f"{name} after step {step}: {m}")


@pytest.mark.parametrize("dead_below", [0.0, 0.02])
@pytest.mark.parametrize("name", ["seed-gelu-2l", "kissane-gpt2"])
def test_the_posts_recipe_is_the_naive_loop(name: str, dead_below: float) -> None:
    t, naive = beside(name, **POST, dead_below=dead_below)
    t.p["b_enc"][[7, 8]] -= 2.0  # these fire seldom
    naive.p["b_enc"].data.copy_(t.p["b_enc"])
    resampled, rare = [], set()
    for step in range(48):
        x = data(BATCH, seed=step + 1)
        status = t.step(x)
        assert status.lr == pytest.approx(t.config.lr * naive.factor(), rel=1e-12)
        naive.step(x)
        assert t.dead.nonzero()[:, 0].tolist() == naive.dead()
        if t.step_number in t.config.resampled_at:
            draws = torch.Generator()
            draws.set_state(t.generator.get_state())
            x = data(300, seed=1000 + step)
            assert t.replaceable.nonzero()[:, 0].tolist() == naive.to_start_anew()
            rare |= {*naive.to_start_anew()} - {*naive.dead()}
            resampled.append(t.resample(x))
            naive.resample(x, draws)
        assert_same_weights(t, naive, step)
    assert len(resampled) == 2
    assert resampled[0] >= 4
    assert bool(rare) == bool(dead_below)


def naive_start_of_april(seed: int) -> tuple[float, dict[str, Tensor]]:
    """The factor on inputs that gives `data(256)` a mean norm of sqrt(d_in), and the weights to start from."""
    norms = [row.square().sum().sqrt().item() for row in data(256)]
    decoder = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed)).double()
    for row in decoder:
        row *= 0.1 / row.norm()
    weights = {"encoder": decoder.clone(), "decoder": decoder}
    zeros = {"b_enc": torch.zeros(40).double(), "b_dec": torch.zeros(16).double()}
    return 4.0 / (sum(norms) / len(norms)), weights | zeros


def test_the_recipe_of_april_2024_is_the_naive_loop_from_its_own_start() -> None:
    small = {"d_sae": 40, "batch": BATCH, "tokens": BATCH * 48, "buffer": 512, "lr": 1e-2}
    t = Trainer(data(256), replace(preset("anthropic-april-2024"), **small, seed=3))
    factor, p = naive_start_of_april(seed=3)
    naive = NaiveTraining(p, t.config)
    assert_close(t.scale, torch.full((16,), factor, dtype=torch.float64), **EXACT)
    assert_same_weights(t, naive, step=-1)
    for step in range(48):
        x = data(BATCH, seed=step + 1)
        status = t.step(x)
        assert status.coefficient == pytest.approx(naive.coefficient(), rel=1e-12)
        assert status.lr == pytest.approx(1e-2 * naive.factor(), rel=1e-12)
        naive.step(x * factor)
        assert_same_weights(t, naive, step)
        if step == 0:
            assert status.l0 > 10  # latents fire from the start
    assert t.p["b_dec"].abs().max() > 0.05
    norms = t.p["decoder"].norm(dim=1)
    assert norms.max() - norms.min() > 0.05  # rows are free, indeed


def test_clipping_changes_what_is_applied() -> None:
    """Adam does not feel the size of all gradients, but their sizes from step to step."""
    ends: list[Tensor] = []
    for clip in (None, 0.01):
        t, _ = beside("anthropic-april-2024", **SMALL | {"clip": clip})
        for step in range(4):
            t.step(data(BATCH, seed=step) * (1 + step))
        ends.append(t.p["encoder"])
        gradients = [weight.grad for weight in t.p.values() if weight.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        assert (norm <= 0.01 * (1 + 1e-9)) == (clip is not None)
    assert (ends[0] - ends[1]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------------ schedule
def test_the_posts_learning_rate() -> None:
    chosen = preset("seed-gelu-2l")
    at = {0: 0.1, 500: 0.55, 1000: 1.0, 49_999: 1.0, 50_000: 0.1, 50_500: 0.55, 51_000: 1.0}
    at |= {100_000: 0.1, 200_000: 0.1, 250_000: 1.0, chosen.n_steps - 1: 1.0}
    assert {step: pytest.approx(rate(chosen, step)) for step in at} == at


def test_a_linear_warm_up_and_a_line_to_zero() -> None:
    chosen = config(tokens=BATCH * 1000, warmup_steps=200, decay=0.3)
    at = {0: 1 / 200, 99: 0.5, 199: 1.0, 200: 1.0, 700: 1.0, 701: 299 / 300, 850: 0.5, 999: 1 / 300}
    assert {step: pytest.approx(rate(chosen, step)) for step in at} == at
    assert [rate(config(tokens=BATCH * 3), step) for step in range(3)] == pytest.approx([1 / 200, 2 / 200, 3 / 200])
    assert [rate(replace(chosen, decay=0.0, warmup_steps=0), step) for step in (0, 500, 999)] == [1, 1, 1]


def test_a_given_coefficient_rises_and_stays() -> None:
    chosen = config(variant="relu", coefficient=4.0, coefficient_warmup=0.1, tokens=BATCH * 1000)
    assert [coefficient_at(chosen, step, 4.0) for step in (0, 50, 100, 999)] == [0, 2, 4, 4]
    assert coefficient_at(replace(chosen, coefficient_warmup=0.0), 0, 4.0) == 4.0


def test_steering_raises_the_coefficient_of_what_is_too_dense() -> None:
    chosen = config(variant="relu", target_l0=10.0)
    assert steer(chosen, 2.0, 20.0, 0) > 2.0 > steer(chosen, 2.0, 5.0, 0) > 0
    assert steer(chosen, 2.0, 10.0, 0) == 2.0
    assert 0 < steer(chosen, 2.0, 0.0, 0) < 2.0


@pytest.mark.parametrize("variant", ["jumprelu", "gated"])
def test_thresholds_and_gates_start_dense(variant: str) -> None:
    chosen = config(variant=variant, target_l0=10.0, d_sae=1000, tokens=BATCH * 1000)
    wanted = {0: 80.0, 200: 40.0, 400: 20.0, 600: 10.0, 601: 10.0, 999: 10.0}
    assert {step: pytest.approx(l0_at(chosen, step)) for step in wanted} == wanted
    assert steer(chosen, 2.0, 40.0, 0) < 2.0 < steer(chosen, 2.0, 40.0, 600)
    assert l0_at(replace(chosen, d_sae=80), 0) == pytest.approx(20.0)  # a quarter of all latents
    assert l0_at(replace(chosen, d_sae=20), 0) == 10.0
    assert {l0_at(replace(chosen, variant=v), 0) for v in ("relu", "topk", "batchtopk")} == {10.0}


def test_resampling_is_spread_over_the_first_60_percent_or_as_asked() -> None:
    at = {n: sorted(config(tokens=BATCH * 100, resample=n).resampled_at) for n in (0, 1, 3)}
    assert at == {0: [], 1: [60], 3: [20, 40, 60]}
    assert sorted(preset("seed-gelu-2l").resampled_at) == [50_000, 100_000, 150_000, 200_000]
    assert sorted(preset("kissane-gpt2").resampled_at) == [25_000, 50_000, 75_000, 100_000]


# ------------------------------------------------------------------------------------------------------------- presets
def test_presets_have_the_published_numbers() -> None:
    post, gpt2, april = (preset(name) for name in ("seed-gelu-2l", "kissane-gpt2", "anthropic-april-2024"))
    assert (post.d_sae, post.lr, post.coefficient, post.batch, post.tokens) == (16_384, 1e-3, 2.0, 4096, 2 * 10**9)
    assert (post.buffer, post.betas, post.resample_by) == (384 * 4096, (0.9, 0.99), "random")
    assert (post.dead_after, post.dead_below, gpt2.dead_below) == (102_400_000, 1e-7, 1e-6)
    assert (gpt2.d_sae, gpt2.lr, gpt2.batch, gpt2.dead_after) == (24_576, 1.2e-3, 4096, 51_200_000)
    assert (gpt2.betas, gpt2.resample_by, gpt2.resample) == ((0.9, 0.99), "loss", 4)
    assert (april.lr, april.betas, april.clip, april.decay) == (5e-5, (0.9, 0.999), 1.0, 0.2)
    assert (april.coefficient_warmup, april.decoder, april.n_steps) == (0.05, "free", 200_000)
    assert (april.scaling, april.center, april.start) == ("norm", "none", "transpose")
    assert (april.variant, april.coefficient, april.warmup_steps, april.resampled_at) == ("relu", 5.0, 0, frozenset())
    assert len(KISSANE_GPT2_COEFFICIENTS) == 12
    assert gpt2.coefficient == KISSANE_GPT2_COEFFICIENTS[2]
    assert all(0 < c < 4 for c in KISSANE_GPT2_COEFFICIENTS)


def test_a_preset_that_does_not_exist() -> None:
    with pytest.raises(TrainingError, match=r"(?s)preset 'none'.*expected: .*seed-gelu-2l.*do: "):
        preset("none")
    assert set(PRESETS) >= {"default"}
