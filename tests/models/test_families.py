"""Every family on odd sizes and padding, and each claim that a family breaks refused rather than wrong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from cases import examples
from headscope.attribution import HeadWeights, decoder_share_through_output, dfa_by_head, dfa_by_source
from headscope.decomposition import Upstream
from headscope.errors import ModelError
from headscope.models.families import FAMILIES
from headscope.site import Site
from naive_model import naive

MIXED = [name for name, family in FAMILIES.items() if not family.not_mixed]
WRITTEN_OUT = [name for name in MIXED if name != "gemma3"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}
NORMED = {"atol": 1e-5, "rtol": 1e-5}  # RMSNorms compute in float32


@pytest.fixture(scope="module")
def models(random_model):
    return {name: random_model(name, dtype=torch.float64) for name in FAMILIES}


def some_tokens(shape, seed=0):
    return torch.randint(1, 98, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- odd sizes
@examples(12)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 5, 6, 13, 64]),
    seed=st.integers(0, 3),
    family=st.sampled_from(WRITTEN_OUT),
)
def test_any_size_is_the_forward_pass_written_out(models, batch, length, seed, family):
    model, tokens = models[family], some_tokens((batch, length), seed)
    sites = [Site(kind, layer) for layer in (0, 1) for kind in ("pattern", "z", "attn_out", "mlp_out", "resid_post")]
    expected, logits = naive(model, tokens)
    for site, value in model.read(tokens, sites).items():
        assert_close(value, expected[site], **EXACT)
    assert_close(model.logits(tokens), logits, **EXACT)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3_text"])
def test_one_head_is_enough(random_model, family):
    one = {"n_head": 1} if family == "gpt2" else {"num_attention_heads": 1}
    one |= {} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 1}
    model = random_model(family, dtype=torch.float64, **one)
    tokens = some_tokens((2, 9))
    expected, logits = naive(model, tokens)
    attention = model.attention(tokens, 1)
    assert attention.pattern.shape == (2, 1, 9, 9)
    assert_close(attention.z, expected[Site("z", 1)], **EXACT)
    assert_close(model.logits(tokens), logits, **EXACT)


@examples(16)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    left=st.booleans(),
    family=st.sampled_from(WRITTEN_OUT),
)
def test_padding_on_either_side_changes_nothing(models, lengths, left, family):
    model, width = models[family], max(lengths) + 2
    rows = [some_tokens((1, n), seed) for seed, n in enumerate(lengths)]
    tokens, attended = torch.full((len(rows), width), 3), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (own, n) in enumerate(zip(rows, lengths, strict=True)):
        place = slice(width - n, None) if left else slice(n)
        tokens[row, place], attended[row, place] = own[0], True
    sites = [Site(kind, 1) for kind in ("v", "z", "attn_out", "resid_post")]
    found, logits = model.read(tokens, sites, attended=attended), model.logits(tokens, attended=attended)
    attention = model.attention(tokens, 1, attended=attended)
    for row, own in enumerate(rows):
        for site, value in model.read(own, sites).items():
            assert_close(found[site][row, attended[row]], value[0], **EXACT)
        assert_close(logits[row, attended[row]], model.logits(own)[0], **EXACT)
        assert_close(
            attention.pattern[row][:, attended[row]][..., attended[row]], model.attention(own, 1).pattern[0], **EXACT
        )
    assert attention.pattern.isfinite().all()
    assert (attention.pattern.transpose(1, 3)[~attended] == 0).all(), "nobody sees padding"


# ------------------------------------------------------------------------------------------------------------- restarts
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_sites_are_read_from_a_run_that_is_continued(models, family):
    model, tokens = models[family], some_tokens((2, 9))
    sites = [Site(kind, 1) for kind in ("resid_pre", "pattern", "z", "mlp_out", "resid_post", "ln_final_scale")]
    with model.restartable(1) as restart:
        model.losses(tokens)
    edit = {Site("z", 1): lambda value: value + 1}
    with model.edit(edit):
        expected = model.read(tokens, sites)
        found = model.read(tokens, sites, restart=restart)
        early = model.read(tokens, sites[:2], restart=restart)
    for site in sites:
        assert torch.equal(found[site], expected[site])
    assert torch.equal(early[sites[1]], expected[sites[1]])
    with pytest.raises(ModelError, match=r"z of layer 0 from a run that is continued at layer 1"):
        model.read(tokens, [Site("z", 0)], restart=restart)


# ------------------------------------------------------------------------------------- claims that hold or are refused
@pytest.mark.parametrize("family", MIXED)
def test_dfa_sums_to_the_pre_activation(models, random_sae, family):
    model, tokens = models[family], some_tokens((2, 12))
    sae = random_sae(model)
    attention = model.attention(tokens, 1)
    weights = HeadWeights.of(sae, model)
    row, query, latent = sae.pre_activations(attention.z).gt(0).nonzero(as_tuple=True)
    by_source = dfa_by_source(weights, attention, row, query, latent)
    by_head = dfa_by_head(weights, attention.z[row, query], latent)
    assert_close(by_source.sum(-1), by_head, **EXACT)
    pre = sae.pre_activations(attention.z)[row, query, latent]
    assert_close(by_head.sum(-1) + weights.bias[latent], pre, **EXACT)


@pytest.mark.parametrize("family", MIXED)
def test_shares_through_the_output_are_of_what_is_written(models, random_sae, family):
    """Each head's part of a token's attn_out, were z one decoder row: a norm after it divides all parts alike."""
    model = models[family]
    sae = random_sae(model)
    parts = model.family.parts(dict(model.module.named_modules())[f"{model.family.blocks}.1"])
    shares = decoder_share_through_output(sae, model)
    z = sae.W_dec[:5]
    written = []
    for head in range(4):
        own = torch.zeros_like(z)
        own[:, head * model.spec.d_head : (head + 1) * model.spec.d_head] = z[
            :, head * model.spec.d_head : (head + 1) * model.spec.d_head
        ]
        projected = parts.output_projection(own) - parts.output_projection(torch.zeros_like(own))
        norm = parts.attention_post_norm
        written.append((projected if norm is None else projected * norm.gain).norm(dim=-1))
    expected = torch.stack(written, 1)
    assert_close(shares[:5], expected / expected.sum(1, keepdim=True), **NORMED)


@pytest.mark.parametrize("family", MIXED)
def test_the_stream_is_taken_apart_or_refused(models, family):
    model, tokens = models[family], some_tokens((2, 9))
    if model.spec.post_norm:
        with pytest.raises(ModelError, match=r"sum over heads: a norm after[\s\S]*linear in z"):
            Upstream(model, 1)
        with pytest.raises(ModelError, match="a norm after the output projection"):
            model.W_O(1)
        return
    stream = Upstream(model, 1).run(tokens)
    total = sum((stream.vector(part) for part in stream.parts()), torch.zeros(()))
    assert_close(total, model.read(tokens, [Site("resid_pre", 1)])[Site("resid_pre", 1)], **NORMED)


@pytest.mark.parametrize("family", MIXED)
def test_scores_are_split_or_refused(models, family):
    model, tokens = models[family], some_tokens((9,))
    sites = Site("resid_pre", 1), Site("ln1_scale", 1), Site("q", 1)
    stream, scale, q = (model.read(tokens[None], [site])[site][0] for site in sites)
    if model.spec.qk_norm or model.spec.scores_cap is not None:
        with pytest.raises(ModelError, match=r"queries and keys are normed|scores are capped"):
            model.queries_and_keys(tokens, 1, stream[None], scale)
        return
    found, _ = model.queries_and_keys(tokens, 1, stream[None], scale)
    assert_close(found.sum(0), q, **NORMED)


@pytest.mark.parametrize("family", ["gemma2"])
def test_capped_logits_are_no_sum(models, family):
    with pytest.raises(ModelError, match="capped at 30"):
        models[family].final_parts(torch.ones(2, 32, dtype=torch.float64))


@pytest.mark.parametrize("family", MIXED)
def test_final_losses_and_the_mlp_are_those_of_the_run(models, family):
    model, tokens = models[family], some_tokens((2, 9))
    sites = Site("mlp_in", 1), Site("mlp_out", 1), Site("resid_post", 1)
    mlp_in, mlp_out, final = (model.read(tokens, [site])[site] for site in sites)
    assert_close(model.mlp(1, mlp_in.flatten(0, 1)), mlp_out.flatten(0, 1), **EXACT)
    losses = model.final_losses(final[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(losses, model.losses(tokens).flatten(), **EXACT)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXED])
def test_where_z_is_not_mixed_values_it_is_read_and_dfa_refused(models, family):
    model, tokens = models[family], some_tokens((2, 9))
    seen = []
    projection = model.module.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits = model.logits(tokens)
    hook.remove()
    site = Site("z", 1)
    assert torch.equal(model.read(tokens, [site])[site], seen[0])
    assert seen[0].shape[-1] == model.width(site) == model.spec.n_heads * model.spec.d_head
    with model.edit({site: torch.zeros_like}):
        assert (model.logits(tokens) - logits).abs().max() > 1e-3
    assert_close(model.value_offset(1), torch.zeros(model.width(site), dtype=torch.float64), atol=1e-12, rtol=0)
    for call in (lambda: model.attention(tokens, 1), lambda: model.W_V(1), lambda: model.token_values(1)):
        with pytest.raises(ModelError, match=r"from source to query: (a gate|its values)[\s\S]*pattern @ v"):
            call()
