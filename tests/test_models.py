"""Reading and editing a model: explicit = fast = plain transformers, and the model is left as it was."""

import pytest
import torch
from torch.testing import assert_close

from headscope.errors import ModelError
from headscope.models.families import family_of
from headscope.site import Site

FAMILIES = ["gpt_neox", "gpt2", "llama"]


@pytest.fixture(params=FAMILIES)
def model(request, random_model):
    return random_model(request.param, dtype=torch.float64)


@pytest.fixture
def tokens(model):
    return torch.randint(1, model.spec.d_vocab, (3, 17), generator=torch.Generator().manual_seed(0))


def weights_of(model):
    return {name: t.clone() for name, t in model.module.state_dict().items()}


@pytest.mark.parametrize("layer", [0, 1])
def test_z_is_pattern_times_value(model, tokens, layer):
    attention = model.attention(tokens, layer)
    z = torch.einsum("bhqs,bshe->bqhe", attention.pattern, attention.value).flatten(2)
    assert_close(attention.z, z, atol=1e-12, rtol=1e-12)
    assert_close(model.read(tokens, [Site("z", layer)])[Site("z", layer)], z, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("layer", [0, 1])
def test_patterns_are_causal_and_sum_to_one(model, tokens, layer):
    pattern = model.attention(tokens, layer).pattern
    assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-12, rtol=0)
    assert (pattern.triu(1) == 0).all()
    reference = eager_patterns(model, tokens)[layer]
    assert_close(pattern, reference, atol=1e-6, rtol=1e-5)  # its softmax is always float32


def eager_patterns(model, tokens):
    model.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model.module(tokens, output_attentions=True, use_cache=False).attentions
    finally:
        model.module.set_attn_implementation("sdpa")


@pytest.mark.parametrize("layer", [0, 1])
def test_the_residual_stream_is_the_sum_of_its_parts(model, tokens, layer):
    sites = [Site(kind, layer) for kind in ("resid_pre", "z", "attn_out", "mlp_out")]
    read = model.read(tokens, sites)
    resid_pre, z, attn_out, mlp_out = (read[s] for s in sites)
    bias = model._output_projection(layer).bias
    assert_close(attn_out, z @ model.W_O(layer) + (0 if bias is None else bias), atol=1e-10, rtol=1e-10)
    if layer == 0:
        after = model.read(tokens, [Site("resid_pre", 1)])[Site("resid_pre", 1)]
        assert_close(after, resid_pre + attn_out + mlp_out, atol=1e-10, rtol=1e-10)


def test_losses_are_the_cross_entropy_of_the_logits(model, tokens):
    logits = model.logits(tokens)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    assert_close(model.losses(tokens).flatten(), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_restarted_run_is_the_whole_run(model, tokens, layer):
    with model.restartable(layer) as restart:
        clean = model.losses(tokens)
    assert torch.equal(model.losses(tokens, restart), clean)
    with model.edit({Site("z", layer): lambda z: 2 * z}):
        assert torch.equal(model.losses(tokens, restart), model.losses(tokens))
    assert torch.equal(model.losses(tokens, restart), clean)


@pytest.mark.parametrize("kind", ["z", "attn_out", "mlp_out", "resid_pre"])
def test_an_edit_with_its_own_value_changes_nothing_and_another_does(model, tokens, kind):
    clean, site = model.logits(tokens), Site(kind, 0)
    with model.edit({site: lambda value: value.clone()}):
        assert torch.equal(model.logits(tokens), clean)
    with model.edit({site: torch.zeros_like}):
        edited = model.logits(tokens)
        assert (model.read(tokens, [site])[site] == 0).all() or kind != "resid_pre"
    assert (edited - clean).abs().max() > 1e-3
    assert torch.equal(model.logits(tokens), clean)


def test_a_position_edited_changes_nothing_before_it(model, tokens):
    clean = model.logits(tokens)

    def late(value):
        return torch.cat([value[:, :9], value[:, 9:] + 1], dim=1)

    with model.edit({Site("z", 0): late}):
        edited = model.logits(tokens)
    assert torch.equal(edited[:, :9], clean[:, :9])


def test_the_model_is_bit_identical_after_edits_that_raise(model, tokens):
    before, clean = weights_of(model), model.logits(tokens)

    def fail(value):
        raise RuntimeError("in the middle of a run")

    with pytest.raises(RuntimeError, match="in the middle"), model.edit({Site("z", 1): fail}):
        model.logits(tokens)
    with pytest.raises(KeyError), model.edit({Site("mlp_out", 0): torch.zeros_like}):
        raise KeyError
    model.attention(tokens, 1)
    model.value_offset(1)
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model.logits(tokens), clean)
    assert model.module.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._blocks.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_offset_is_the_part_of_z_that_no_text_changes(model, tokens, layer):
    """c = b_V + b_ln1 @ W_V: z - c is linear in the normed residual without its bias."""
    offset = model.value_offset(layer)
    norm = getattr(model._blocks[layer], model.family.attention_norm)
    bias = getattr(norm, "bias", None)
    seen = []
    hook = norm.register_forward_hook(lambda _m, _a, out: seen.append(out))
    attention = model.attention(tokens, layer)
    hook.remove()
    value = attention.value.flatten(2)
    normed = seen[0] if bias is None else seen[0] - bias

    def doubled(_module, _args, _output):
        return 2 * normed if bias is None else 2 * normed + bias

    hook = norm.register_forward_hook(doubled)
    twice = model.attention(tokens, layer).value.flatten(2)
    hook.remove()
    assert_close(twice - _expanded(model, offset), 2 * (value - _expanded(model, offset)), atol=1e-9, rtol=1e-9)


def _expanded(model, offset):
    return offset.view(1, 1, -1)


def test_logit_directions_give_the_logits_at_unit_scale(model, tokens):
    final = torch.randn(5, model.spec.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = model.module
    for part in model.family.final_norm.split("."):
        norm = getattr(norm, part)
    centred = final - final.mean(1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else final
    scale = (centred.square().mean(1, keepdim=True) + 1e-300).sqrt()
    head = model.module.get_output_embeddings()
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        logits = head(norm(final)) - head(torch.zeros_like(final) if bias is None else bias.expand_as(final))
    expected = (logits - logits.mean(1, keepdim=True)) * scale
    assert_close(final @ model.logit_directions, expected, atol=1e-4, rtol=1e-4)  # the norm's epsilon is left out


def test_a_layer_that_does_not_exist_is_named(model, tokens):
    with pytest.raises(ModelError, match=r"layer 7 .*\n.*0 to 1"):
        model.read(tokens, [Site("z", 7)])
    with pytest.raises(ModelError, match="layer -1"):
        model.attention(tokens, -1)
    with pytest.raises(ModelError, match="layer 2"), model.edit({Site("z", 2): torch.zeros_like}):
        pass


def test_an_unknown_family_is_refused_with_where_to_add_it():
    with pytest.raises(ModelError, match=r"'bloom'[\s\S]*families.py"):
        family_of("bloom")
