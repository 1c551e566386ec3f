"""DFA sums to the pre-activation, and shares behave as their definitions say, on random models of three families."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from headscope.attribution import (
    HeadWeights,
    decoder_share,
    decoder_share_through_output,
    dfa_by_head,
    dfa_by_source,
    direct_logit_effects,
    encoder_share,
    encoder_share_through_value,
    source_table,
)
from headscope.sae.model import SAE, ReLU
from headscope.site import Site


@pytest.fixture(params=["gpt_neox", "gpt2", "llama"])
def model(request, random_model):
    return random_model(request.param, dtype=torch.float64)


@pytest.fixture
def sae(model):
    generator = torch.Generator().manual_seed(3)
    d_in, d_sae = model.spec.n_heads * model.spec.d_head, 11

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return SAE(
        W_enc=normal(d_in, d_sae),
        b_enc=normal(d_sae),
        W_dec=normal(d_sae, d_in),
        b_dec=normal(d_in),
        activation=ReLU(),
        site=Site("z", 1),
        model_name="random",
    )


@pytest.fixture
def run(model, sae):
    """Tokens, attention, and (row, query, latent) of some pairs, rows sorted; one row has none."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, model.spec.d_vocab, (4, 13), generator=generator)
    row = torch.tensor([0, 0, 0, 1, 3, 3])
    query = torch.tensor([0, 5, 12, 7, 12, 3])
    latent = torch.tensor([1, 1, 10, 0, 4, 4])
    return tokens, model.attention(tokens, 1), row, query, latent


def test_heads_and_bias_sum_to_the_pre_activation(model, sae, run):
    _, attention, row, query, latent = run
    weights = HeadWeights.of(sae, model)
    heads = dfa_by_head(weights, attention.z[row, query], latent)
    pre = sae.pre_activations(attention.z[row, query])[torch.arange(len(row)), latent]
    assert_close(heads.sum(1) + weights.bias[latent], pre, atol=1e-10, rtol=1e-10)


def test_sources_sum_to_heads(model, sae, run):
    _, attention, row, query, latent = run
    weights = HeadWeights.of(sae, model)
    sources = dfa_by_source(weights, attention, row, query, latent)
    assert_close(sources.sum(-1), dfa_by_head(weights, attention.z[row, query], latent), atol=1e-10, rtol=1e-10)


def test_dfa_by_source_is_the_naive_loop(model, sae, run):
    tokens, attention, row, query, latent = run
    weights = HeadWeights.of(sae, model)
    sources = dfa_by_source(weights, attention, row, query, latent)
    d_head = model.spec.d_head
    for i, (b, q, j) in enumerate(zip(row.tolist(), query.tolist(), latent.tolist(), strict=True)):
        for h in range(model.spec.n_heads):
            block = slice(h * d_head, (h + 1) * d_head)
            w = sae.W_enc[block, j]
            for s in range(tokens.shape[1]):
                value = attention.value[b, s, h] - model.value_offset(1)[block]
                expected = attention.pattern[b, h, q, s] * (value @ w)
                assert_close(sources[i, h, s], expected, atol=1e-12, rtol=1e-10)


def test_the_dfa_of_a_pair_does_not_depend_on_its_neighbours(model, sae, run):
    """A list of features gives what each gives alone."""
    _, attention, row, query, latent = run
    weights = HeadWeights.of(sae, model)
    together = dfa_by_source(weights, attention, row, query, latent)
    for i in range(len(row)):
        alone = dfa_by_source(weights, attention, row[i : i + 1], query[i : i + 1], latent[i : i + 1])
        assert_close(alone[0], together[i], atol=1e-12, rtol=1e-12)


def test_no_pairs_give_no_rows(model, sae, run):
    none = torch.empty(0, dtype=torch.long)
    assert len(dfa_by_source(HeadWeights.of(sae, model), run[1], none, none, none)) == 0


def test_later_sources_contribute_nothing(model, sae, run):
    _, attention, row, query, latent = run
    sources = dfa_by_source(HeadWeights.of(sae, model), attention, row, query, latent)
    for i, q in enumerate(query.tolist()):
        assert (sources[i, :, q + 1 :] == 0).all()


def test_frozen_patterns_make_dfa_the_effect_of_removing_a_source(model, sae, run):
    """Setting one source's value to c, with the pattern held, lowers the pre-activation by its DFA."""
    _, attention, row, query, latent = run
    weights = HeadWeights.of(sae, model)
    sources = dfa_by_source(weights, attention, row, query, latent)
    for i, (b, q, j) in enumerate(zip(row.tolist(), query.tolist(), latent.tolist(), strict=True)):
        value = attention.value[b].clone()
        value[2] = weights.offset
        z = torch.einsum("hs,she->he", attention.pattern[b, :, q], value).flatten()
        change = sae.pre_activations(attention.z[b, q])[j] - sae.pre_activations(z)[j]
        assert_close(change, sources[i, :, 2].sum(), atol=1e-10, rtol=1e-10)


def test_shares_sum_to_one(model, sae):
    for share in (
        decoder_share(sae, model.spec.n_heads),
        decoder_share_through_output(sae, model),
        encoder_share(HeadWeights.of(sae, model)),
        encoder_share_through_value(HeadWeights.of(sae, model), model, 1),
    ):
        assert (share >= 0).all()
        assert_close(share.sum(1), torch.ones(sae.d_sae, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rescaling_a_head_changes_the_share_in_z_and_not_the_one_through_the_output(model, sae):
    """W_V -> 5 W_V, W_O -> W_O / 5 of one head leaves the model as it was; so must a share that means something."""
    d_head, n_heads = model.spec.d_head, model.spec.n_heads
    before = decoder_share(sae, n_heads), decoder_share_through_output(sae, model)
    scaled = sae.W_dec.clone()
    scaled[:, :d_head] *= 5  # the decoder of the same feature in the new basis of z
    sae = SAE(sae.W_enc, sae.b_enc, scaled, sae.b_dec, ReLU(), sae.site, "random")
    model.W_O(1)[:d_head] /= 5  # a view of the weight
    after = decoder_share(sae, n_heads), decoder_share_through_output(sae, model)
    assert (after[0] - before[0]).abs().max() > 0.05
    assert_close(after[1], before[1], atol=1e-12, rtol=1e-12)


def test_patterns_sum_to_one_so_the_value_bias_joins_the_bias(model, sae, run):
    """Each head's DFA over its sources is `(z_h - c_h) . w`: c is in no head, whatever is attended to."""
    _, attention, row, query, latent = run
    assert_close(attention.pattern.sum(-1), torch.ones_like(attention.pattern[..., 0]), atol=1e-12, rtol=0)
    weights = HeadWeights.of(sae, model)
    moved = dataclasses.replace(attention, value=attention.value + 3.0, z=attention.z + 3.0)
    plain, shifted = (dfa_by_source(weights, a, row, query, latent).sum(-1) for a in (attention, moved))
    expected = 3.0 * weights.encoder[:, latent].sum(-1).T
    assert_close(shifted - plain, expected, atol=1e-10, rtol=1e-10)


def test_the_source_table_is_the_dfa_of_a_token_attended_to_alone(model, sae):
    """One token read alone: its attention is all to itself, and its DFA is its row of the table."""
    weights, values = HeadWeights.of(sae, model), model.token_values(1)
    tokens, latent = torch.arange(model.spec.d_vocab), torch.arange(sae.d_sae)
    for head in range(model.spec.n_heads):
        table = source_table(weights, values[:, head], head, latent)
        assert table.shape == (sae.d_sae, len(tokens))
        block = slice(head * model.spec.d_head, (head + 1) * model.spec.d_head)
        c = model.value_offset(1)[block]
        for t in (0, 5, 97):
            assert_close(table[:, t], (values[t, head] - c) @ sae.W_enc[block], atol=1e-12, rtol=1e-12)


def test_logit_effects_are_the_ends_of_the_full_product(model, sae):
    full = sae.W_dec @ model.W_O(1) @ model.logit_directions
    effects = direct_logit_effects(sae, model, k=5, rows=4)
    values, tokens = full.sort(dim=1, descending=True)
    assert_close(effects.top_values, values[:, :5])
    assert_close(effects.top_tokens, tokens[:, :5])
    assert_close(effects.bottom_values, values.flip(1)[:, :5])
    assert_close(effects.mean, full.mean(1), atol=1e-12, rtol=0)
    centred = full - full.mean(1, keepdim=True)
    std = full.std(1, correction=0)
    assert_close(effects.std, std)
    assert_close(effects.skew, (centred**3).mean(1) / std**3)
    assert_close(effects.kurtosis, (centred**4).mean(1) / std**4)
