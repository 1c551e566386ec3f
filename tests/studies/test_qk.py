"""Scores by pairs of parts: they sum to the model's own, and name what the planted heads look for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from cases import examples
from headscope.decomposition import Part
from headscope.errors import HeadscopeError, ModelError
from headscope.interventions import add
from headscope.models.hf import Model
from headscope.site import Site
from headscope.studies.how.qk import CONSTANT, PromptScores
from judging import assert_same_scale, judged_by, named, of_transformerlens  # noqa: F401 - a fixture
from precise import EXACT, SETTINGS, precise, text

PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}


@pytest.fixture(scope="module", params=[*SETTINGS, "gpt_neox-partial"])
def subject(request, random_model, random_sae):
    """A model of three layers, and SAEs of two earlier components."""
    changes = PARTIAL if request.param == "gpt_neox-partial" else {}
    model = precise(random_model, request.param.removesuffix("-partial"), **changes)
    return model, [random_sae(model, 40, site=Site("mlp_out", 0)), random_sae(model, 30, "topk", site=Site("z", 1))]


@examples(15)
@given(seed=st.integers(0, 2**16), length=st.integers(1, 10), with_saes=st.booleans(), layer=st.integers(0, 2))
def test_pairs_sum_to_the_models_scores_at_every_head_query_and_key(subject, seed, length, with_saes, layer):
    model, saes = subject
    tokens = text(model, length, seed)
    prompt = PromptScores(model, layer, tokens, saes=[s for s in saes if with_saes and s.site.layer < layer])
    site = Site("scores", layer)
    expected = model.read(tokens[None], [site])[site][0]
    for head in range(model.spec.n_heads):
        for query in range(length):
            split = prompt.split(head, query)
            assert_close(split.keys.tolist(), list(range(query + 1)))
            assert_close(split.pairs.sum((0, 1)), expected[head, query, : query + 1].numpy(), **EXACT)
            assert split.residual < 1e-9
    names = [part.name for part in prompt.parts]
    assert len(set(names)) == len(names)
    assert ("position" in names) == (model.spec.family == "gpt2")


def test_a_limit_of_features_keeps_the_sum(subject):
    model, saes = subject
    tokens = text(model, 8)
    whole, few = (PromptScores(model, 2, tokens, saes=saes, max_features=n) for n in (1000, 3))
    for prompt in (whole, few):
        split = prompt.split(1, 7)
        assert_close(split.pairs.sum((0, 1)), split.scores, **EXACT)
    assert sum(part.kind == "feature" for part in few.parts) == 6
    others = whole.parts.index(Part("features", 0, site="mlp_out"))
    assert not np.abs(whole.split(1, 7).pairs[others]).max() > 1e-12  # all features have names


def test_contrasts_sum_to_what_they_contrast(subject):
    model, _ = subject
    split = PromptScores(model, 2, text(model, 9)).split(0, 8)
    for key in range(9):
        assert_close(split.contrast(key).sum(), split.scores[key] - split.scores.mean(), **EXACT)
        expected = split.pattern[key] * (split.scores[key] - split.pattern @ split.scores)
        assert_close(split.attention(key).sum(), expected, **EXACT)
    top = split.top(3, 5)
    assert abs(top[0][2]) == np.abs(split.contrast(3)).max()


def test_the_attention_contrast_is_the_derivative_of_the_pattern(subject):
    model, _ = subject
    split = PromptScores(model, 1, text(model, 7)).split(2, 6)
    a, b, small = 0, 3, 1e-6
    without = torch.tensor(split.scores - small * split.pairs[a, b]).softmax(0).numpy()
    for key in range(7):
        assert_close((split.pattern[key] - without[key]) / small, split.attention(key)[a, b], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["query", "key"])
def test_sources_of_an_earlier_head_sum_to_its_part(subject, side):
    model, _ = subject
    prompt = PromptScores(model, 2, text(model, 8))
    split = prompt.split(3, 7)
    part = Part("head", 1, 2)
    i = prompt.parts.index(part)
    for key in (0, 4, 7):
        sources = prompt.sources(3, 7, key, part, side=side)
        expected = split.pairs[:, i, key] if side == "key" else split.pairs[i, :, key]
        assert_close(sources.sum(1).numpy(), expected, **EXACT)


def test_single_precision_closes_too(random_model):
    for setting in SETTINGS:
        model = precise(random_model, setting, dtype=torch.float32)
        split = PromptScores(model, 2, text(model, 12)).split(0, 11)
        assert split.residual < 1e-4 * (1 + np.abs(split.scores).max())


def test_a_constant_is_what_biases_make(random_model):
    model = precise(random_model, "llama")
    for layer in model.module.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.bias.data.zero_()
    prompt = PromptScores(model, 1, text(model, 6))
    i = prompt.parts.index(CONSTANT)
    assert not prompt.split(0, 5).pairs[i].any()
    assert not prompt.split(0, 5).pairs[:, i].any()


class _Normed(nn.Module):
    """A projection with a norm after it, as some families have for queries."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, x):
        return nn.functional.normalize(self.projection(x), dim=-1) * 5


def test_norms_of_queries_and_other_runs_are_refused(random_model, no_type_checks):
    model = precise(random_model, "llama")
    tokens = text(model, 6)
    attention = model.module.model.layers[1].self_attn
    attention.q_proj = _Normed(attention.q_proj)
    PromptScores(model, 0, tokens)
    with pytest.raises(ModelError, match="scores that are not the sum of parts"):
        PromptScores(model, 1, tokens)
    gpt2 = precise(random_model, "gpt2")
    capped = {Site("scores", 1): lambda scores: 2 * torch.tanh(scores / 2)}
    with gpt2.edit(capped), pytest.raises(ModelError, match="scores"):
        PromptScores(gpt2, 1, tokens)
    with (
        gpt2.edit({Site("q", 1): add(torch.ones(gpt2.spec.d_head, dtype=torch.float64))}),
        pytest.raises(ModelError, match="scores"),
    ):
        PromptScores(gpt2, 1, tokens)
    assert isinstance(PromptScores(gpt2, 1, tokens).model, Model)


def test_what_there_is_not_is_named(random_model, no_type_checks):
    model = precise(random_model, "gpt_neox")
    prompt = PromptScores(model, 1, text(model, 6))
    for wrong, match in (
        (lambda: prompt.split(4, 0), "head 4"),
        (lambda: prompt.split(0, 6), "query 6"),
        (lambda: prompt.split(0, 3).contrast(4), "key 4 of query 3"),
        (lambda: prompt.sources(0, 5, 6, Part("head", 0, 0)), "key 6"),
        (lambda: prompt.sources(0, 5, 1, Part("embedding")), "part embedding"),
        (lambda: PromptScores(model, 3, text(model, 6)), "layer 3"),
        (lambda: PromptScores(model, 1, text(model, 65)), "65 tokens"),
    ):
        with pytest.raises(HeadscopeError, match=match):
            wrong()


@judged_by("transformer_lens")
def test_scores_and_parts_are_transformerlens(judged) -> None:
    model, tokens, theirs = judged
    n_heads, length = model.spec.n_heads, tokens.shape[1]
    if model.spec.qk_norm or model.spec.post_norm or model.spec.scores_cap is not None:
        with pytest.raises(ModelError, match="as a sum over"):
            PromptScores(model, 1, tokens[0])
        return
    for layer in range(model.spec.n_layers):
        prompt = PromptScores(model, layer, tokens[0])
        scores = named(Site("scores", layer), model, theirs)[0]
        for head in range(n_heads):
            for query in (0, 5, length - 1):
                split = prompt.split(head, query)
                ours = torch.from_numpy(split.pairs.sum((0, 1)))
                assert_same_scale(ours, scores[head, query, split.keys], 1e-4)
                hidden = np.setdiff1d(np.arange(length), split.keys)  # later keys, and those outside of a window
                assert (scores[head, query, hidden] < -1e30).all()
        total = sum(prompt.stream.vector(part)[0] for part in prompt.stream.parts())
        assert_same_scale(total, named(Site("resid_pre", layer), model, theirs)[0], 1e-5)
        for earlier in range(layer):
            z = named(Site("z", earlier), model, theirs)[0].reshape(length, n_heads, -1)
            z = z - model.value_offset(earlier).view(n_heads, -1)
            for head in range(n_heads):
                expected = z[:, head] @ model.W_O(earlier).view(n_heads, -1, model.spec.d_model)[head]
                assert_same_scale(prompt.stream.vector(Part("head", earlier, head))[0], expected, 1e-5)
