"""Patching a feature between two prompts: identities, what is planted, brute force, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from cases import examples
from headscope.errors import CorpusError, HeadscopeError, ModelError, SAEError
from headscope.models.load import load_model
from headscope.sae.model import SAE
from headscope.site import Site
from headscope.studies.how.corruptions import (
    FeatureMetric,
    pair,
    prompt,
    replace_tokens,
    shuffle,
    swap_earlier,
    unused_token,
)
from headscope.studies.how.feature_patching import patch_features
from headscope.studies.how.patching import Node, average, interaction, nodes_of, patch, role
from judging import judged_by, run_judge
from planted import OUT, Head, V, induction_sequences, planted_model, planted_sae

EXACT = {"atol": 1e-10, "rtol": 0}


# ------------------------------------------------------------------------------------------------------------- planted
@pytest.fixture(scope="module")
def planted():
    return planted_model(), planted_sae()


@pytest.fixture(scope="module")
def sequences(planted):
    """For each of some sequences A B ... A: the pair with its first A replaced, and the position of B."""
    model, sae = planted
    made = []
    for tokens, where, second in zip(*induction_sequences(12), strict=True):
        metric = FeatureMetric(model, sae, int(second))
        made.append((pair(metric, tokens, swap_earlier(tokens, unused(tokens))), int(where)))
    return made


def unused(tokens):
    return next(t for t in range(1, V) if t not in tokens)


def test_the_previous_token_head_at_b_is_all_there_is_in_layer_0(sequences):
    for prompts, where in sequences:
        found = patch(prompts, nodes_of(prompts, ["z"], layers=[0], by_position=True))
        expected = np.array([node == Node("z", 0, 0, where) for (node,) in found.patches], dtype=float)
        for scores in (found.denoising.pre_score, found.denoising.activation_score):
            assert_allclose(scores, expected, **EXACT)
        for scores in (found.noising.pre_score, found.noising.activation_score):
            assert_allclose(scores, 1 - expected, **EXACT)
        assert found.roles()[found.number(Node("z", 0, 0, where))] == "necessary and sufficient"
        assert found.roles().count("no effect") == len(found.patches) - 1


def test_the_path_goes_on_through_the_keys_and_pattern_of_the_induction_head(sequences):
    prompts, where = sequences[0]
    matter = {
        Node("token", position=where - 1),
        Node("resid_pre", 0, None, where - 1),
        Node("k", 1, 0, where),
        Node("pattern", 1, 0, prompts.query),
        Node("z", 1, 0, prompts.query),
        Node("z", 0, 0, where),
        Node("v", 0, 0, where - 1),
        Node("attn_out", 0, None, where),
        Node("resid_mid", 0, None, where),
        Node("resid_post", 0, None, where),
        Node("resid_pre", 1, None, where),
    }
    kinds = ["token", "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    found = patch(prompts, nodes_of(prompts, kinds, by_position=True))
    assert Node("z", 1, 1, prompts.query) in {node for (node,) in found.patches}
    assert Node("attn_out", 1) not in {dataclasses.replace(node, position=None) for (node,) in found.patches}
    expected = np.array([node in matter for (node,) in found.patches], dtype=float)
    assert expected.sum() == len(matter)
    assert_allclose(found.denoising.pre_score, expected, **EXACT)
    assert_allclose(found.noising.pre_score, 1 - expected, **EXACT)


def two_heads(latent_bias):
    """A feature of B by induction (head 0) and of 3 as the current token (head 1), by one bias or another."""
    sae = planted_sae()
    encoder = torch.zeros_like(sae.W_enc)
    encoder[7, 0], encoder[sae.d_in // 2 + 3, 0] = 1.0, 1.0
    return dataclasses.replace(sae, W_enc=encoder, b_enc=torch.full_like(sae.b_enc, latent_bias))


@pytest.mark.parametrize(("bias", "kind", "excess"), [(-0.5, "OR", 1 / 3), (-1.5, "AND", 1)])
def test_a_feature_of_two_heads_is_told_as_or_and_and(planted, bias, kind, excess):
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    metric = FeatureMetric(planted[0], two_heads(bias), 0)
    prompts = pair(metric, clean, replace_tokens(clean, {-1: 11}))
    found = interaction(prompts, Node("z", 1, 0), Node("z", 1, 1))
    assert found.kind == kind
    assert_allclose(found.excess, [-excess, excess], **EXACT)
    other = interaction(prompts, Node("z", 0, 1), Node("mlp_out", 0))
    assert other.kind == "neither"
    assert other.excess == (0, 0)


def test_an_and_feature_is_seen_by_its_two_directions_alone(planted):
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    metric = FeatureMetric(planted[0], two_heads(-1.5), 0)
    prompts = pair(metric, clean, replace_tokens(clean, {-1: 11}))
    found = patch(prompts, [Node("z", 1, 0), Node("z", 1, 1), Node("z", 0, 0), Node("z", 1)])
    assert found.roles() == ("AND", "AND", "no effect", "necessary and sufficient")
    assert_allclose(found.noising.activation_score, [0, 0, 1, 0], **EXACT)
    assert_allclose(found.noising.pre_score, [0.5, 0.5, 1, 0], **EXACT)  # graded: the pre-activation is a sum
    assert_allclose(found.denoising.pre_score, [0.5, 0.5, 0, 1], **EXACT)


@pytest.mark.parametrize(
    ("loss", "gain", "expected"),
    [
        (0.0, 0.0, "no effect"),
        (0.2, 0.0, "AND"),
        (0.0, 0.2, "OR"),
        (0.5, 0.5, "part"),
        (1.0, 1.0, "necessary and sufficient"),
    ],
)
def test_roles_by_the_two_directions(loss, gain, expected):
    assert role(loss, gain) == expected
    assert role(loss, gain, threshold=0.3) == ("no effect" if expected in ("AND", "OR") else expected)


def moved(scores, by):
    return dataclasses.replace(scores, pre_score=scores.pre_score + 0.1 * by)


def test_averages_over_pairs(sequences):
    kinds = ["z", "mlp_out"]
    results = [patch(prompts, nodes_of(prompts, kinds)) for prompts, _ in sequences]
    for effect in average(results):
        matters = effect.patch[0] in (Node("z", 0, 0), Node("z", 1, 0))
        assert effect.noising.n == 12
        assert (effect.noising.null.value, effect.denoising_activation.null.value) == (1, 0)
        assert effect.noising.value == pytest.approx(0 if matters else 1)
        assert effect.denoising_activation.value == pytest.approx(1 if matters else 0)
        ends = effect.denoising.low, effect.denoising.high  # none if all pairs are alike to the last bit
        assert ends == (None, None) or ends == pytest.approx((effect.denoising.value,) * 2)
    apart = [dataclasses.replace(r, noising=moved(r.noising, i)) for i, r in enumerate(results)]
    spread = average(apart)[0].noising
    assert spread.low < spread.value < spread.high
    few = average(results[:3])[0].noising
    assert few.low is None
    assert "3 pairs" in few.missing
    with pytest.raises(HeadscopeError, match="0 results"):
        average([])
    with pytest.raises(HeadscopeError, match="2 results"):
        average([results[0], patch(sequences[0][0], [Node("z", 0)])])


# ---------------------------------------------------------------------------------------------------------- identities
def random_pair(random_model, random_sae, family, *, seed=0, length=14, shared=1, site=None, n_layers=3):
    """A random model and SAE, and two prompts with a feature that one of them turns off."""
    model = random_model(family, dtype=torch.float64, n_layers=n_layers, seed=seed)
    sae = random_sae(model, 200, site=site)
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = torch.randint(1, model.spec.d_vocab, (2, length), generator=generator)
    clean[0] = model.bos
    corrupted[:shared] = clean[:shared]
    f = sae.encode(model.read(torch.stack([clean, corrupted]), [sae.site])[sae.site][:, -1])
    latent = int((f[0] * (f[1] == 0)).argmax())
    return pair(FeatureMetric(model, sae, latent), clean, corrupted)


FAMILIES = ["gpt_neox", "gpt2", "llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_nothing_everything_and_all_heads(random_model, random_sae, family):
    prompts = random_pair(random_model, random_sae, family)
    every = prompts.metric.model.spec
    heads = tuple(Node("z", 1, h) for h in range(every.n_heads))
    whole = [Node("token"), Node("resid_pre", 0), Node("resid_post", 1), Node("resid_pre", 2), Node("z", 2)]
    parts = (Node("resid_pre", 1), Node("attn_out", 1), Node("mlp_out", 1))
    found = patch(prompts, [(), *whole, parts, heads, Node("z", 1), Node("attn_out", 1), Node("resid_pre", 1)])
    assert_allclose(found.noising.pre_score[:7], [1, 0, 0, 0, 0, 0, 0], **EXACT)
    assert_allclose(found.denoising.pre_score[:7], [0, 1, 1, 1, 1, 1, 1], **EXACT)
    for scores in (found.noising.pre_score, found.denoising.pre_score):
        assert_allclose(scores[[7, 8]], scores[9], **EXACT)
        assert abs(scores[9] - found.noising.pre_score[0]) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_patched_with_itself_changes_nothing(random_model, random_sae, family):
    """What comes before the first token that differs is the same in both runs."""
    prompts = random_pair(random_model, random_sae, family, shared=9)
    kinds = ["token", "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    kinds += ["position"] if family == "gpt2" else []
    before = [n for n in nodes_of(prompts, kinds, by_position=True) if n.position is not None and n.position < 9]
    assert len(before) > 9 * 3 * prompts.metric.model.spec.n_heads
    found = patch(prompts, before)
    assert_allclose(found.noising.pre_score, 1, **EXACT)
    assert_allclose(found.denoising.pre_score, 0, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", [Site("z", 2), Site("attn_out", 1), Site("mlp_out", 2), Site("resid_pre", 2)])
def test_each_patch_is_a_run_of_its_own_with_that_patch(random_model, random_sae, family, site):
    """Against plain edits of whole values, one run a patch."""
    prompts = random_pair(random_model, random_sae, family, site=site, length=9)
    model, metric = prompts.metric.model, prompts.metric
    kinds = ["q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_mid"]
    nodes = list(nodes_of(prompts, kinds, by_position=True))[::7]
    assert {node.kind for node in nodes} == set(kinds)
    found = patch(prompts, nodes)
    runs = ((found.noising, prompts.clean, prompts.corrupted), (found.denoising, prompts.corrupted, prompts.clean))
    for scores, base, other in runs:
        for node, got in zip(nodes, scores.pre, strict=True):
            values = model.read(base[None], [node.site])[node.site].clone()
            taken = model.read(other[None], [node.site])[node.site]
            match node.kind:
                case "pattern":
                    values[0, node.head, node.position] = taken[0, node.head, node.position]
                case "q" | "k" | "v":
                    values[0, node.position, node.head] = taken[0, node.position, node.head]
                case "z":
                    block = slice(node.head * model.spec.d_head, (node.head + 1) * model.spec.d_head)
                    values[0, node.position, block] = taken[0, node.position, block]
                case _:
                    values[0, node.position] = taken[0, node.position]
            with model.edit({node.site: lambda _old, values=values: values}):
                assert metric.read(base, prompts.query).pre == pytest.approx(got, abs=1e-10)


@examples(12)
@given(seed=st.integers(0, 50), length=st.integers(3, 20), rows=st.integers(1, 9))
def test_batches_of_any_size_give_the_same(random_model, random_sae, seed, length, rows):
    prompts = random_pair(random_model, random_sae, "gpt2", seed=seed, length=length, n_layers=2)
    nodes = nodes_of(prompts, ["token", "z", "mlp_out"], by_position=True)[: 3 * rows]
    whole = patch(prompts, nodes)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("headscope.studies.how.patch_runs._BATCH_TOKENS", rows * length)
        pieces = patch(prompts, nodes)
    assert_allclose(pieces.noising.pre, whole.noising.pre, **EXACT)
    assert_allclose(pieces.denoising.pre, whole.denoising.pre, **EXACT)


def test_token_and_position_together_are_the_embedding(random_model, random_sae):
    """Prompts of different lengths: what both end with stands at other positions."""
    model = random_model("gpt2", dtype=torch.float64)
    sae = random_sae(model, 400)
    clean = torch.tensor([0, 5, 9, 11, 13, 17, 23, 29])
    corrupted = torch.tensor([0, 5, 40, 41, 42, 13, 17, 23, 29])
    f = sae.encode(model.read(clean[None], [sae.site])[sae.site][0, -1])
    g = sae.encode(model.read(corrupted[None], [sae.site])[sae.site][0, -1])
    metric = FeatureMetric(model, sae, int((f * (g == 0)).argmax()))
    with pytest.raises(HeadscopeError, match="8 and 9 tokens"):
        pair(metric, clean, corrupted)
    prompts = pair(metric, clean, corrupted, align=True)
    assert prompts.counterpart.tolist() == [0, 1, -1, -1, 5, 6, 7, 8]
    at = 5
    both = (Node("token", position=at), Node("position", position=at))
    found = patch(prompts, [*both, both, Node("resid_pre", 0, None, at)])
    for scores, nothing in ((found.noising.pre_score, 1), (found.denoising.pre_score, 0)):
        assert scores[0] == pytest.approx(nothing, abs=1e-10)  # the same token
        assert abs(scores[1] - nothing) > 1e-3  # at another place
        assert_allclose(scores[2], scores[3], **EXACT)
    with pytest.raises(HeadscopeError, match="different lengths"):
        patch(prompts, [Node("pattern", 0)])
    with pytest.raises(HeadscopeError, match="no counterpart"):
        patch(prompts, [Node("z", 0, 0, 2)])
    assert {n.position for n in nodes_of(prompts, ["mlp_out"], by_position=True)} == {0, 1, 4, 5, 6, 7}


# ----------------------------------------------------------------------------------------------------------- bad input
def test_prompts_that_cannot_be_used(planted):
    model, sae = planted
    with pytest.raises(CorpusError, match="empty"):
        prompt(model, "")
    with pytest.raises(CorpusError, match="empty"):
        prompt(model, [])
    with pytest.raises(CorpusError, match="41 tokens"):
        prompt(model, " ".join(["w3"] * 40))
    with pytest.raises(CorpusError, match="24"):
        prompt(model, [0, 24])
    assert prompt(model, "w5 w3").tolist() == [0, 5, 3]
    assert prompt(model, "<bos>").tolist()[0] == 0
    clean, other = torch.tensor([0, 5, 3, 7, 9, 3]), torch.tensor([0, 5, 4, 7, 9, 3])
    metric = FeatureMetric(model, sae, 7)
    assert pair(metric, clean, other).on.activation == pytest.approx(0.5)
    for wrong, clean_, other_, query in (
        ("6 and 5 tokens", clean, other[:-1], -1),
        ("query 6", clean, other, 6),
        ("same prompt", clean, clean, -1),
        ("is off at position 4", clean, other, 4),
        ("still on", clean, torch.tensor([0, 6, 3, 7, 9, 3]), -1),
    ):
        with pytest.raises(HeadscopeError, match=wrong):
            pair(metric, clean_, other_, query=query)
    with pytest.raises(HeadscopeError, match="no counterpart"):
        pair(metric, clean, torch.tensor([0, 5, 4, 7, 9, 8, 8]), align=True)


def test_features_and_nodes_that_there_are_not(planted):
    model, sae = planted
    with pytest.raises(HeadscopeError, match="latent 49"):
        FeatureMetric(model, sae, 2 * V + 1)
    with pytest.raises(ModelError, match="layer 5"):
        FeatureMetric(model, dataclasses.replace(sae, site=Site("z", 5)), 0)
    narrow = dataclasses.replace(sae, W_enc=sae.W_enc[1:], W_dec=sae.W_dec[:, 1:], b_dec=sae.b_dec[1:])
    with pytest.raises(SAEError, match="vectors of 111"):
        FeatureMetric(model, narrow, 0)
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    prompts = pair(FeatureMetric(model, sae, 7), clean, swap_earlier(clean, 4))
    for node, error, wrong in (
        (Node("z", 0, 2), ModelError, "head 2"),
        (Node("mlp_out", 0, 0), ModelError, "no head"),
        (Node("z", 3), ModelError, "layer 3"),
        (Node("attn_out", 1), HeadscopeError, "after"),
        (Node("z", 0, 0, 6), HeadscopeError, "position 6"),
    ):
        with pytest.raises(error, match=wrong):
            patch(prompts, [node])
    with pytest.raises(HeadscopeError, match="patch of z"):
        patch(prompts, [Node("z", 0)]).number(Node("z", 0, 0))


@pytest.mark.usefixtures("no_type_checks")
def test_a_kind_that_there_is_not(planted):
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    prompts = pair(FeatureMetric(*planted, 7), clean, swap_earlier(clean, 4))
    with pytest.raises(HeadscopeError, match="a node 'logits'"):
        patch(prompts, [Node("logits")])


def test_a_rotary_model_has_no_position_embedding(random_model, random_sae):
    prompts = random_pair(random_model, random_sae, "gpt_neox")
    with pytest.raises(ModelError, match="position embeddings"):
        patch(prompts, [Node("position")])


def test_corruptions(planted):
    tokens = torch.tensor([0, 5, 3, 7, 3, 3])
    assert swap_earlier(tokens, 4).tolist() == [0, 5, 4, 7, 4, 3]
    assert swap_earlier(tokens, 4, only=2).tolist() == [0, 5, 4, 7, 3, 3]
    assert swap_earlier(tokens, 4, query=4).tolist() == [0, 5, 4, 7, 3, 3]
    for named in ({"query": 1}, {"only": 3}):
        with pytest.raises(HeadscopeError, match="to be replaced"):
            swap_earlier(tokens, 4, **named)
    with pytest.raises(HeadscopeError, match="to be replaced"):
        swap_earlier(tokens, 3)
    assert replace_tokens(tokens, {1: 8, -1: 9}).tolist() == [0, 8, 3, 7, 3, 9]
    with pytest.raises(HeadscopeError, match="positions"):
        replace_tokens(tokens, {6: 1})
    mixed = shuffle(tokens, seed=1)
    assert mixed.tolist() != tokens.tolist()
    assert sorted(mixed.tolist()) == sorted(tokens.tolist())
    assert mixed[[0, -1]].tolist() == [0, 3]
    assert shuffle(tokens, seed=1).tolist() == mixed.tolist()
    with pytest.raises(HeadscopeError, match="of 1 kinds"):
        shuffle(torch.tensor([0, 3, 3, 3]))
    drawn = {unused_token(planted[0], tokens, seed=s) for s in range(40)}
    assert not drawn & {0, 3, 5, 7}
    assert len(drawn) > 5
    with pytest.raises(HeadscopeError, match="vocabulary"):
        unused_token(planted[0], torch.arange(V))


# --------------------------------------------------------------------------------------------------- features as nodes
def detector():
    """The planted model with an MLP in layer 0 that marks token 7, and induction carrying the mark; SAEs of both.

    The SAE of the MLP has the mark four fifths (latent 0; the rest is error), a feature that nothing reads (1), and one
    that is never active (2).
    """
    model, sae = planted_model(), planted_sae()
    block = model.module.transformer.h[0].mlp
    block.c_fc.weight.data[7, 0], block.c_fc.bias.data[0] = 20.0, -10.0
    block.c_proj.weight.data[0, OUT.start] = 0.1  # gelu(10) is 10: the mark is 1
    Head(model.module.transformer.h[1].attn, 0).value[OUT.start, V + 1] = 1.0
    encoder = torch.zeros_like(sae.W_enc)
    encoder[V + 1, 0] = 1.0
    marked = dataclasses.replace(sae, W_enc=encoder)
    into, out = torch.zeros(sae.d_in, 3, dtype=torch.float64), torch.zeros(3, sae.d_in, dtype=torch.float64)
    into[OUT.start, :2] = 1.0
    out[0, OUT.start], out[1, OUT.start + 3], out[2, OUT.start] = 0.8, 1.0, 1.0
    upstream = SAE(
        into, -torch.tensor([0.0, 0.0, 1.0]).double(), out, sae.b_dec, sae.activation, Site("mlp_out", 0), "planted"
    )
    return model, marked, upstream


def test_the_mlp_feature_that_detects_the_token_is_found_and_its_error_told_apart():
    model, marked, upstream = detector()
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    prompts = pair(FeatureMetric(model, marked, 0), clean, replace_tokens(clean, {3: 8}))
    assert patch(prompts, [Node("mlp_out", 0)]).roles() == ("necessary and sufficient",)
    for positions in (None, [3], [3, 3]):
        found = patch_features(prompts, upstream, positions)
        assert found.latents.tolist() == [0, 1]
        assert_allclose(found.change, [1, 1], **EXACT)
        assert_allclose(found.noising.pre_score, [0.2, 1], **EXACT)
        assert_allclose(found.denoising.pre_score, [0.8, 0], **EXACT)
        assert_allclose(found.denoising.activation_score, [0.6, 0], **EXACT)
        assert found.bar("site") == pytest.approx((0, 1))
        assert found.bar("features") == pytest.approx((0.2, 0.8))
        assert found.bar("error") == pytest.approx((0.8, 0.2))
        assert found.few == 1
        assert len(found.null_noising.pre_score) == 32
        assert abs(found.null_effect.value) < 0.1  # of directions as long; half go against it
        assert found.null_effect.high < 0.5 < (1 - 0.2 + 0.8) / 2
    nothing = patch_features(prompts, upstream, [1, 5])
    assert len(nothing.latents) == 0
    assert nothing.bar("site") == pytest.approx((1, 0))
    assert nothing.few is None
    assert nothing.null_effect is None


@pytest.mark.parametrize("upstream_site", [Site("mlp_out", 0), Site("z", 1), Site("resid_pre", 2)])
def test_upstream_features_are_patched_as_edits_would(random_model, random_sae, upstream_site):
    prompts = random_pair(random_model, random_sae, "gpt_neox", length=8)
    model, metric = prompts.metric.model, prompts.metric
    upstream = random_sae(model, 60, site=upstream_site, seed=5)
    found = patch_features(prompts, upstream)
    x, other = (model.read(t[None], [upstream.site])[upstream.site] for t in (prompts.clean, prompts.corrupted))
    f, g = upstream.encode(x), upstream.encode(other)
    assert set(found.latents) == set((f != g).any(1)[0].nonzero()[:, 0].tolist())
    assert_allclose(found.change, (f - g).sum(1)[0, found.latents], **EXACT)
    for number in (0, 1, len(found.latents) - 1):
        j = found.latents[number]
        edited = x + (g - f)[..., j, None] * upstream.W_dec[j]
        with model.edit({upstream.site: lambda _x, edited=edited: edited}):
            assert metric.read(prompts.clean, prompts.query).pre == pytest.approx(found.noising.pre[number], abs=1e-10)
    whole = patch(prompts, [Node(upstream_site.kind, upstream_site.layer)])
    assert found.bar("site") == pytest.approx((whole.noising.pre_score[0], whole.denoising.pre_score[0]), abs=1e-10)
    everything = x + (g - f) @ upstream.W_dec
    with model.edit({upstream.site: lambda _x: everything}):
        pre = metric.read(prompts.clean, prompts.query).pre
    assert found.bars_noising.pre[1] == pytest.approx(pre, abs=1e-10)
    with model.edit({upstream.site: lambda _x: other + (f - g) @ upstream.W_dec}):
        pre = metric.read(prompts.clean, prompts.query).pre
    assert found.bars_noising.pre[2] == pytest.approx(pre, abs=1e-10)
    assert_allclose(found.together_noising.pre[0], found.noising.pre[0], **EXACT)


def test_upstream_saes_that_cannot_be_used():
    model, marked, upstream = detector()
    clean = torch.tensor([0, 5, 3, 7, 9, 3])
    prompts = pair(FeatureMetric(model, marked, 0), clean, replace_tokens(clean, {3: 8}))
    for site in (Site("z", 1), Site("mlp_out", 1)):
        with pytest.raises(HeadscopeError, match="before blocks"):
            patch_features(prompts, dataclasses.replace(upstream, site=site))
    with pytest.raises(ModelError, match="layer 2"):
        patch_features(prompts, dataclasses.replace(upstream, site=Site("mlp_out", 2)))
    for positions in ([6], []):
        with pytest.raises(HeadscopeError, match="positions"):
            patch_features(prompts, upstream, positions)


# -------------------------------------------------------------------------------------------------- TransformerLens 3.9
@judged_by("transformer_lens")
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_patches_are_those_of_transformerlens(random_model, random_sae, save_model, tmp_path, family):
    """Every head and position of layer 0, one run of theirs each."""
    folder = save_model(random_model(family), tmp_path / "model")
    model = load_model(str(folder))
    sae = random_sae(model, 200)
    clean, corrupted = torch.randint(1, 98, (2, 7), generator=torch.Generator().manual_seed(1))
    f = sae.encode(model.read(torch.stack([clean, corrupted]), [sae.site])[sae.site][:, -1])
    prompts = pair(FeatureMetric(model, sae, int((f[0] * (f[1] == 0)).argmax())), clean, corrupted)
    direction = sae.W_enc[:, prompts.metric.latent]
    np.savez(tmp_path / "in.npz", clean=clean.numpy(), corrupted=corrupted.numpy(), direction=direction.numpy())
    run_judge("transformer_lens_patching.py", folder, tmp_path / "in.npz", tmp_path / "out.npz")
    theirs = np.load(tmp_path / "out.npz")
    scale = theirs["clean"] - theirs["corrupted"]
    for kind in ("z", "v", "pattern", "attn_out", "mlp_out", "resid_post"):
        found = patch(prompts, nodes_of(prompts, [kind], layers=[0], by_position=True))
        for way, scores in (("noising", found.noising), ("denoising", found.denoising)):
            expected = (theirs[f"{way} {kind}"] - theirs["corrupted"]) / scale
            assert np.ptp(expected) > 0.01
            assert_allclose(scores.pre_score, expected, atol=1e-4, rtol=0)
