"""Gradients of the loss are those of finite differences, and first-order effects are told beside exact ones."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import add, at
from headscope.site import Site
from headscope.studies.what import first_order as module
from headscope.studies.what.first_order import first_order


@pytest.fixture(scope="module", params=[0, 1])
def live(request, random_model, random_corpus, random_sae, tmp_path_factory):
    model = random_model("gpt_neox", dtype=torch.float64)
    sae = random_sae(model, 12, site=Site("z", request.param))
    folder = tmp_path_factory.mktemp("first") / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model, 8, 16), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


def test_an_estimate_is_the_slope_of_a_small_ablation(live):
    found = first_order(live, [0, 5], max_tokens=4)
    model, layer, size = live.model, live.sae.site.layer, live.index.block_size
    directions = live.sae.W_dec @ model.W_O(layer)
    active = {j: live.index.activations(j) for j in (0, 5)}
    for latent, position, estimate in zip(found.latent, found.position, found.estimate, strict=True):
        block, query = divmod(int(position), size)
        tokens = torch.from_numpy(live.index.tokens_of(block).astype(np.int64))[None]
        f = active[latent].activation[active[latent].position == position]
        write = float(f[0]) * directions[latent]
        losses = []
        for step in (-1e-5, 1e-5):
            with model.edit({Site("attn_out", layer): at(add(-step * write), positions=query)}):
                losses.append(model.losses(tokens).sum().item())
        assert_allclose(estimate, (losses[1] - losses[0]) / 2e-5, rtol=1e-5, atol=1e-7)


def test_estimates_go_with_exact_effects(live, monkeypatch):
    found = first_order(live, range(12))
    assert found.n > 100
    assert found.pearson == pytest.approx(np.corrcoef(found.estimate, found.exact)[0, 1])
    assert found.pearson > 0.3
    assert found.slope == pytest.approx((found.estimate * found.exact).sum() / (found.estimate**2).sum())
    monkeypatch.setattr(module, "_BATCH_TOKENS", 1)
    assert_allclose(first_order(live, range(12)).estimate, found.estimate, rtol=1e-9, atol=1e-12)


def test_too_few_pairs_have_no_correlation(live):
    few = first_order(live, [int(live.index.table()["n_active"].to_numpy().argmax())], max_tokens=3)
    assert (few.n, few.pearson, few.slope) == (3, None, None)


def test_a_gradient_changes_nothing_in_the_model(live):
    tokens = torch.randint(1, 98, (2, 12), generator=torch.Generator().manual_seed(0))
    before = live.model.losses(tokens)
    gradient = live.model.loss_gradient(tokens, Site("attn_out", 0))
    assert gradient.shape == (2, 12, 32)
    assert not any(p.requires_grad or p.grad is not None for p in live.model.module.parameters())
    assert torch.equal(live.model.losses(tokens), before)
