from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from headscope.errors import SAEError
from headscope.models.hf import Model
from headscope.sae.model import SAE, JumpReLU, ReLU, TopK
from headscope.site import Site

RandomSAE = Callable[..., SAE]
ACTIVATIONS = ("relu", "jumprelu", "topk", "gated")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Model]) -> Model:
    return random_model("gpt_neox")


def inputs(sae: SAE, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, sae.d_in, generator=torch.Generator().manual_seed(7), dtype=sae.W_enc.dtype)


def naive_activation(sae: SAE, pre: list[float]) -> list[float]:
    """One row, one number at a time."""
    match sae.activation:
        case ReLU():
            return [max(p, 0.0) for p in pre]
        case JumpReLU(threshold):
            return [p if p > t and p > 0 else 0.0 for p, t in zip(pre, threshold.tolist(), strict=True)]
        case TopK(k):
            kept = sorted(range(len(pre)), key=lambda j: -pre[j])[:k]
            return [max(p, 0.0) if j in kept else 0.0 for j, p in enumerate(pre)]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_and_decode_equal_a_naive_loop(
    model: Model, random_sae: RandomSAE, activation: str, apply_b_dec_to_input: bool
) -> None:
    sae = random_sae(model, 20, activation, apply_b_dec_to_input=apply_b_dec_to_input, dtype=torch.float64)
    x = inputs(sae, 5)
    for row, vector in enumerate(x):
        centred = vector - sae.b_dec if apply_b_dec_to_input else vector
        pre = [
            sum(float(centred[i] * sae.W_enc[i, j]) for i in range(sae.d_in)) + float(sae.b_enc[j])
            for j in range(sae.d_sae)
        ]
        f = torch.tensor(naive_activation(sae, pre), dtype=torch.float64)
        x_hat = sae.b_dec.clone()
        for j in range(sae.d_sae):
            x_hat += f[j] * sae.W_dec[j]
        assert_close(sae.pre_activations(x)[row], torch.tensor(pre, dtype=torch.float64), **EXACT)
        assert_close(sae.encode(x)[row], f, **EXACT)
        assert_close(sae(x)[row], x_hat, **EXACT)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_the_bias_is_the_constant_part_of_the_pre_activation(
    model: Model, random_sae: RandomSAE, apply_b_dec_to_input: bool
) -> None:
    sae = random_sae(model, apply_b_dec_to_input=apply_b_dec_to_input, dtype=torch.float64)
    x = inputs(sae, 9)
    assert_close(sae.pre_activations(x), x @ sae.W_enc + sae.bias, **EXACT)
    assert_close(sae.pre_activations(torch.zeros_like(x[0])), sae.bias, **EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_axes_do_not_matter(model: Model, random_sae: RandomSAE, activation: str) -> None:
    sae = random_sae(model, activation=activation)
    x = inputs(sae, 2, 3, 4)
    f = sae.encode(x)
    assert f.shape == (2, 3, 4, sae.d_sae)
    assert_close(f.flatten(0, 2), sae.encode(x.flatten(0, 2)))
    assert_close(sae.encode(x[1, 2, 3]), f[1, 2, 3])
    assert sae(x).shape == x.shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_never_negative_and_some_are_zero(model: Model, random_sae: RandomSAE, activation: str) -> None:
    sae = random_sae(model, activation=activation)
    f = sae.encode(inputs(sae, 50))
    assert (f >= 0).all()
    assert 0 < int((f > 0).sum()) < f.numel()


def test_jumprelu_keeps_only_what_exceeds_its_threshold() -> None:
    activation = JumpReLU(torch.tensor([0.5, 0.5, 0.0, -1.0, -1.0]))
    pre = torch.tensor([0.5, 0.6, 0.1, 0.2, -0.5])
    assert_close(activation(pre), torch.tensor([0.0, 0.6, 0.1, 0.2, 0.0]))


@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_topk_keeps_at_most_k_and_never_a_negative(k: int, seed: int) -> None:
    pre = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)) - 0.5
    f = TopK(k)(pre)
    assert ((f > 0).sum(1) == (pre > 0).sum(1).clamp(max=k)).all()
    for own, kept in zip(pre, f, strict=True):
        assert_close(kept.sort().values, own.relu().sort().values * (torch.arange(12) >= 12 - k))


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", ["b_enc", "W_dec", "b_dec"])
def test_sizes_that_do_not_fit_are_refused(model: Model, random_sae: RandomSAE, name: str) -> None:
    weights = weights_of(random_sae(model))
    weights[name] = torch.cat([weights[name], weights[name][:1]])
    with pytest.raises(SAEError, match=rf"(?s){name} of shape .*expected: "):
        build(weights)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(model: Model, random_sae: RandomSAE, name: str, value: float) -> None:
    weights = weights_of(random_sae(model))
    weights[name].view(-1)[3] = value
    with pytest.raises(SAEError, match=rf"(?s){name} holds NaN or infinity.*expected: .*do: "):
        build(weights)


@pytest.mark.parametrize("threshold", [torch.zeros(47), torch.full((48,), torch.nan)])
def test_a_threshold_that_does_not_fit_is_refused(model: Model, random_sae: RandomSAE, threshold: torch.Tensor) -> None:
    with pytest.raises(SAEError, match="threshold"):
        build(weights_of(random_sae(model)), JumpReLU(threshold))


@pytest.mark.parametrize("k", [-1, 0, 49])
def test_a_k_that_no_row_can_have_is_refused(model: Model, random_sae: RandomSAE, k: int) -> None:
    with pytest.raises(SAEError, match="k"):
        build(weights_of(random_sae(model)), TopK(k))


def weights_of(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: getattr(sae, name).clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def build(weights: dict[str, torch.Tensor], activation: ReLU | JumpReLU | TopK | None = None) -> SAE:
    return SAE(**weights, activation=activation or ReLU(), site=Site("z", 1), model_name="m")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_to_converts_all_numbers_and_leaves_the_original(model: Model, random_sae: RandomSAE, activation: str) -> None:
    sae = random_sae(model, activation=activation)
    double = sae.to(torch.float64)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert getattr(double, name).dtype == torch.float64
        assert getattr(sae, name).dtype == torch.float32
    if isinstance(double.activation, JumpReLU):
        assert double.activation.threshold.dtype == torch.float64
    x = inputs(sae, 4)
    assert_close(double(x.double()), sae(x).double(), rtol=1e-4, atol=1e-5)
    assert (double.site, double.model_name, double.metadata) == (sae.site, sae.model_name, sae.metadata)
    assert sae.to("cpu").W_enc.device.type == "cpu"


def test_the_kind_says_what_it_was_trained_as(random_model, random_sae):
    model = random_model("gpt_neox")
    plain = {"relu": "ReLU", "jumprelu": "JumpReLU", "topk": "TopK (k = 5)", "gated": "Gated"}
    for activation, kind in plain.items():
        assert random_sae(model, activation=activation).kind == kind
    sae = random_sae(model, activation="jumprelu")
    trained = {
        "BatchTopK (k = 12)": {"variant": "batchtopk", "target_l0": 12.0, "prefixes": []},
        "Matryoshka BatchTopK (k = 3.5)": {"variant": "batchtopk", "target_l0": 3.5, "prefixes": [4, 8]},
        "BatchTopK (k = 64)": {"dict_class": "BatchTopKSAE", "k": 64},
        "Matryoshka BatchTopK (k = 64)": {"dict_class": "MatryoshkaBatchTopKSAE", "k": 64},
        "BatchTopK": {"architecture": "batchtopk"},
    }
    for kind, config in trained.items():
        made = replace(sae, metadata={"training": {"config": config}})
        assert made.kind == f"{kind}, applied as JumpReLU"
    for other in ({"variant": "jumprelu"}, {"dict_class": "JumpReluAutoEncoder"}, {"variant": 3}, None, "x"):
        assert replace(sae, metadata={"training": {"config": other}}).kind == "JumpReLU"
    for metadata in ({}, {"training": None}, {"training": []}):
        assert replace(sae, metadata=metadata).kind == "JumpReLU"
