"""The closed form of the direct path is what edited runs compute, however the work is cut."""

import pytest
import torch
from torch.testing import assert_close

from headscope.interventions import add, at
from headscope.site import Site
from headscope.studies.what import direct_path
from headscope.studies.what.direct_path import Pairs, direct_loss_changes

FAMILIES = {
    "gpt_neox": ("gpt_neox", {}),
    "parallel": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def case(random_model, random_sae, family, dtype, layer=1):
    """A model, its SAE, tokens, and all active pairs with a next token."""
    name, changes = family
    model = random_model(name, dtype=dtype, **changes)
    sae = random_sae(model, 30, site=Site("z", layer))
    tokens = torch.randint(1, model.spec.d_vocab, (3, 14), generator=torch.Generator().manual_seed(5))
    found = model.read(tokens, [sae.site, Site("resid_post", 1)])
    f = sae.encode(found[sae.site])[:, :-1]
    row, query, latent = f.nonzero().unbind(1)
    pairs = Pairs(row * 13 + query, latent, f[row, query, latent])
    residual = found[Site("resid_post", 1)][:, :-1].flatten(0, 1)
    directions = sae.W_dec @ model.W_O(layer)
    return model, sae, tokens, pairs, (directions, residual, tokens[:, 1:].flatten())


def hooked(model, sae, tokens, pairs, layer):
    """The same by edited runs, a row for each pair: the write is taken from the last residual stream."""
    row, query = pairs.token // (tokens.shape[1] - 1), pairs.token % (tokens.shape[1] - 1)
    writes = -pairs.activation[:, None] * (sae.W_dec @ model.W_O(layer))[pairs.direction]
    each = torch.arange(len(row))
    clean = model.losses(tokens)[row, query]
    with model.edit({Site("resid_post", 1): at(add(writes[:, None]), positions=query)}):
        return model.losses(tokens[row])[each, query] - clean


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_closed_form_is_an_edited_run(random_model, random_sae, family, dtype, tolerance, layer):
    model, sae, tokens, pairs, rest = case(random_model, random_sae, family, dtype, layer)
    changes = direct_loss_changes(model, *rest, pairs)
    assert changes.dtype == dtype
    assert len(changes) > 100
    assert changes.abs().max() > 0.05
    if family[0] == "llama":
        tolerance = max(tolerance, 1e-5)  # transformers' RMSNorm computes in float32 whatever the model's precision
    largest = model.losses(tokens).max().item()  # of what is subtracted, to whose rounding a difference is exact
    expected = hooked(model, sae, tokens, pairs, layer)
    assert_close(changes, expected, atol=tolerance * max(1.0, largest), rtol=tolerance)


def test_any_cut_of_the_work_gives_the_same(random_model, random_sae, family, monkeypatch):
    model, _, _, pairs, rest = case(random_model, random_sae, family, torch.float64)
    whole = direct_loss_changes(model, *rest, pairs)
    for table, chunk in ((1 << 12, 1), (5_000, 300), (1 << 12, 1 << 18)):
        monkeypatch.setattr(direct_path, "_TABLE", table)
        monkeypatch.setattr(direct_path, "_CHUNK", {"cpu": chunk})
        assert_close(direct_loss_changes(model, *rest, pairs), whole, atol=1e-12, rtol=1e-12)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    shuffled = Pairs(pairs.token[order], pairs.direction[order], pairs.activation[order])
    assert_close(direct_loss_changes(model, *rest, shuffled), whole[order], atol=1e-12, rtol=1e-12)


def test_nothing_taken_changes_nothing(random_model, random_sae, family):
    model, _, _, pairs, rest = case(random_model, random_sae, family, torch.float64)
    nothing = Pairs(pairs.token, pairs.direction, torch.zeros_like(pairs.activation))
    assert_close(direct_loss_changes(model, *rest, nothing), nothing.activation, atol=1e-14, rtol=0)
    none = torch.empty(0, dtype=torch.long)
    assert len(direct_loss_changes(model, *rest, Pairs(none, none, none.double()))) == 0


def test_logits_far_from_zero_do_not_overflow(random_model, random_sae):
    """Logits of hundreds: the exponentials of float32 end at e^88."""
    untied = FAMILIES["gpt_neox"]
    model, sae, tokens, pairs, (directions, residual, target) = case(random_model, random_sae, untied, torch.float32)
    model.module.get_output_embeddings().weight.data *= 60
    changes = direct_loss_changes(model, directions, residual, target, pairs)
    assert changes.abs().max() > 10
    assert_close(changes, hooked(model, sae, tokens, pairs, 1), atol=2e-3, rtol=1e-4)
