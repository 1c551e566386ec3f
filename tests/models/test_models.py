"""Reading and editing a model: explicit = fast = a forward pass written out, and the model is left as it was."""

from contextlib import ExitStack

import pytest
import torch
from torch.testing import assert_close

from cases import each
from families import FAMILIES, build
from headscope.errors import ModelError
from headscope.models import attention as attention_function
from headscope.models.attention import ATTENTION_KINDS, repeat_heads
from headscope.models.families import family_of
from headscope.site import KINDS, Site
from naive_model import capped, hidden, naive, parts, scaling
from unchanged import left_unchanged

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, shared_model):
    return build(shared_model, request.param, dtype=torch.float64)


def some_tokens(model, seed=0, shape=(3, 17)):
    return torch.randint(1, model.spec.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokens(model):
    return some_tokens(model)


def has(model, site):
    last = model.spec.n_layers - 1
    return (site.kind != "resid_mid" or not model.spec.parallel) and (
        site.kind != "ln_final_scale" or site.layer == last
    )


def sites_of(model):
    everything = [Site(kind, layer) for layer in range(model.spec.n_layers) for kind in KINDS]
    return [site for site in everything if has(model, site)]


def site_of(model, kind, layer=0):
    """The site of a kind in a layer, or where the model has it; None if it has no such place."""
    site = Site(kind, model.spec.n_layers - 1 if kind == "ln_final_scale" else layer)
    return site if has(model, site) else None


# ------------------------------------------------------------------------------------------------------------- reading
def test_every_site_is_that_of_a_forward_pass_written_out(model, tokens):
    expected, logits = naive(model, tokens)
    read = model.read(tokens, sites_of(model))
    assert read.keys() == expected.keys() == set(sites_of(model))
    for site, value in expected.items():
        assert_close(read[site], value, msg=lambda m, s=site: f"{s}: {m}", **EXACT)
    assert_close(model.logits(tokens), logits, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_too(random_model, family):
    model = build(random_model, family)
    tokens = some_tokens(model)
    expected, _ = naive(model, tokens)
    for site, value in model.read(tokens, sites_of(model)).items():
        assert_close(
            value, expected[site], atol=1e-5 * expected[site][expected[site].isfinite()].abs().max(), rtol=1e-5
        )


@each("length", [1, 2, 64])
def test_reading_one_site_is_reading_all(model, length):
    tokens = some_tokens(model, shape=(2, length))
    together = model.read(tokens, sites_of(model))
    for site in sites_of(model):
        assert_close(model.read(tokens, [site])[site], together[site], **EXACT)


def test_reading_nothing_is_nothing(model, tokens):
    assert model.read(tokens, []) == {} == model.attentions(tokens, [])


def test_shapes_are_those_that_site_states(model, tokens):
    spec, (batch, n) = model.spec, tokens.shape
    stream, square = (batch, n, spec.d_model), (batch, spec.n_heads, n, n)
    shapes = dict.fromkeys(KINDS, stream) | {
        "q": (batch, n, spec.n_heads, spec.d_head),
        "k": (batch, n, spec.n_kv_heads, spec.d_head),
        "v": (batch, n, spec.n_kv_heads, spec.d_head),
        "scores": square,
        "pattern": square,
        "z": (batch, n, spec.n_heads * spec.d_head),
        **dict.fromkeys(("ln1_scale", "ln2_scale", "ln_final_scale"), (batch, n, 1)),
    }
    for site, value in model.read(tokens, sites_of(model)).items():
        assert value.shape == shapes[site.kind], site


def test_the_identities_between_sites_hold(model, tokens):
    read = model.read(tokens, sites_of(model))
    for layer in range(model.spec.n_layers):
        at = {site.kind: value for site, value in read.items() if site.layer == layer}
        q, k, v = (repeat_heads(at[kind], model.spec.n_heads) for kind in ("q", "k", "v"))
        unseen = hidden(model, layer, 17)
        assert (at["scores"][..., unseen] == -torch.inf).all()
        raw = capped(torch.einsum("bqhe,bshe->bhqs", q, k) * scaling(model), model.spec.scores_cap)
        assert_close(at["scores"][..., ~unseen], raw[..., ~unseen], **EXACT)
        assert_close(at["pattern"], at["scores"].softmax(-1), **EXACT)
        assert_close(at["z"], torch.einsum("bhqs,bshe->bqhe", at["pattern"], v).flatten(2), **EXACT)
        bias = parts(model, layer)["projection"].bias
        if model.spec.post_norm:
            post = parts(model, layer)["post1"]
            assert_close(at["attn_out"], post(parts(model, layer)["projection"](at["z"])), **EXACT)
            one = at["z"] @ model.output_directions(layer)  # but for the scale of each token
            assert_close(unit(one), unit(at["attn_out"]), atol=1e-6, rtol=1e-6)
        else:
            assert_close(at["attn_out"], at["z"] @ model.W_O(layer) + (0 if bias is None else bias), **EXACT)
            assert torch.equal(model.W_O(layer), model.output_directions(layer))
        assert_close(at["resid_post"], at["resid_pre"] + at["attn_out"] + at["mlp_out"], **EXACT)
        if model.spec.parallel:
            assert_close(at["mlp_in"], at["resid_pre"], **EXACT)
        else:
            assert_close(at["mlp_in"], at["resid_mid"], **EXACT)
            assert_close(at["resid_mid"], at["resid_pre"] + at["attn_out"], **EXACT)
    assert_close(read[Site("resid_post", 0)], read[Site("resid_pre", 1)], atol=0, rtol=0)


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


@each("kind", KINDS)
def test_a_run_stops_after_the_deepest_site(model, tokens, kind):
    site = site_of(model, kind)
    if site is None:
        return
    called = []
    modules = {f"{name} {layer}": m for layer in (0, 1) for name, m in parts(model, layer).items() if name != "final"}
    modules |= {"final": parts(model, 0)["final"], "unembedding": model.module.get_output_embeddings()}
    modules = {name: m for name, m in modules.items() if not name.startswith("post")}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, m in modules.items()]
    model.read(tokens, [site, Site("resid_pre", 0)])
    for hook in hooks:
        hook.remove()
    first = ["block 0", "norm1 0", "attention 0", "projection 0", "norm2 0", "mlp 0"]
    until = {"resid_pre": 1, "ln1_scale": 2, "z": 4, "attn_out": 4, "mlp_out": 6, "resid_post": 6}
    until |= dict.fromkeys(ATTENTION_KINDS, 3) | dict.fromkeys(("resid_mid", "mlp_in", "ln2_scale"), 5)
    if kind == "ln_final_scale":
        assert called[-1] == "final"
    else:
        assert called == first[: until[kind]]


def test_layers_that_need_no_steps_keep_their_fast_path(model, tokens, monkeypatch):
    calls = []
    fast = attention_function.sdpa_attention_forward

    def counted(module, *args, **kwargs):
        calls.append(module)
        return fast(module, *args, **kwargs)

    monkeypatch.setattr(attention_function, "sdpa_attention_forward", counted)
    model.read(tokens, [Site("pattern", 1), Site("z", 1)])
    if model.spec.scores_cap is not None:
        assert calls == [], "SDPA cannot cap scores"
        return
    assert calls == [parts(model, 0)["attention"]]
    model.read(tokens, [Site("v", 1), Site("z", 1)])
    assert calls == [parts(model, 0)["attention"]] * 2 + [parts(model, 1)["attention"]]
    model.read(tokens, [Site("resid_post", 1)])
    assert len(calls) == 3, "no layer is watched: transformers calls SDPA itself"


# ----------------------------------------------------------------------------------------------------------- attention
@each("layer", [0, 1])
def test_z_is_pattern_times_value(model, tokens, layer):
    attention = model.attention(tokens, layer)
    z = torch.einsum("bhqs,bshe->bqhe", attention.pattern, attention.value).flatten(2)
    assert_close(attention.z, z, atol=1e-12, rtol=1e-12)
    assert_close(model.read(tokens, [Site("z", layer)])[Site("z", layer)], z, **EXACT)


@each("layer", [0, 1])
def test_patterns_are_causal_and_sum_to_one(model, tokens, layer):
    pattern = model.attention(tokens, layer).pattern
    assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-12, rtol=0)
    assert (pattern.triu(1) == 0).all()
    reference = eager_patterns(model, tokens)[layer]
    assert_close(pattern, reference, atol=1e-6, rtol=1e-5)  # its softmax is always float32


def eager_patterns(model, tokens):
    eager = model.replica().module  # transformers leaves its hooks on a model whose attention it puts out
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return eager(tokens, output_attentions=True, use_cache=False).attentions


def test_the_attention_of_several_layers_in_one_run_is_that_of_each(model, tokens):
    together = model.attentions(tokens, [0, 1])
    assert together.keys() == {0, 1}
    for layer, attention in together.items():
        alone = model.attention(tokens, layer)
        for name in ("pattern", "value", "z"):
            assert_close(getattr(attention, name), getattr(alone, name), **EXACT)


def test_shared_keys_and_values_are_repeated_for_their_query_heads(random_model):
    model = random_model("llama", dtype=torch.float64)
    tokens = some_tokens(model)
    v, attention = model.read(tokens, [Site("v", 1)])[Site("v", 1)], model.attention(tokens, 1)
    assert v.shape[2] == 2
    for head in range(4):
        assert_close(attention.value[:, :, head], v[:, :, head // 2], **EXACT)
        assert_close(repeat_heads(v, 4)[:, :, head], v[:, :, head // 2], atol=0, rtol=0)


# -------------------------------------------------------------------------------------------------------------- losses
def test_losses_are_the_cross_entropy_of_the_logits(model, tokens):
    logits = model.logits(tokens)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    assert_close(model.losses(tokens).flatten(), expected, atol=1e-12, rtol=1e-12)


@each("kind", KINDS)
@each("layer", [0, 1])
def test_a_restarted_run_is_the_whole_run(model, tokens, layer, kind):
    site = site_of(model, kind, layer)
    if site is None:
        return
    with model.restartable(layer) as restart:
        clean = model.losses(tokens)
    assert torch.equal(model.losses(tokens, restart), clean)
    with model.edit({site: EDITS[kind]}):
        edited = model.losses(tokens, restart)
        assert torch.equal(edited, model.losses(tokens))
    assert not torch.equal(edited, clean)
    assert torch.equal(model.losses(tokens, restart), clean)


@each("kind", ["resid_pre", "z", "pattern", "resid_post"])
def test_an_edit_made_while_a_restartable_run_was_made_is_made_once(model, tokens, kind):
    edits = {Site(kind, layer): EDITS[kind] for layer in (0, 1)}
    with model.edit(edits):
        with model.restartable(1) as restart:
            edited = model.losses(tokens)
        assert torch.equal(model.losses(tokens, restart), edited)
    with model.edit({Site(kind, 0): EDITS[kind]}):
        only_before = model.losses(tokens)
    assert torch.equal(model.losses(tokens, restart), only_before), "what came before the layer stays edited"


# ------------------------------------------------------------------------------------------------------------- editing
EDITS = dict.fromkeys(KINDS, lambda value: 1.5 * value.roll(1, 1) + 0.3) | {
    "scores": lambda value: 1.7 * value.roll(1, 1),  # heads: minus infinity stays where it is
    "pattern": lambda value: 0.5 * value.roll(1, 1) + 0.1,
    **dict.fromkeys(("ln1_scale", "ln2_scale", "ln_final_scale"), lambda value: 1.5 * value.roll(1, 1)),
}


def close_as_the_norm_is(model, kind):
    """RMSNorms compute in float32 whatever the model does; an edited scale shows it."""
    return EXACT if layer_normed(model) or not kind.endswith("scale") else {"atol": 1e-5, "rtol": 1e-5}


def layer_normed(model):
    return isinstance(parts(model, 0)["norm1"], torch.nn.LayerNorm)


@each("layer", [0, 1])
@each("kind", KINDS)
def test_an_edit_changes_all_that_follows_as_written_out(model, tokens, kind, layer):
    site = site_of(model, kind, layer)
    if site is None:
        return
    expected, logits = naive(model, tokens, {site: EDITS[kind]})
    with model.edit({site: EDITS[kind]}):
        assert_close(model.logits(tokens), logits, **close_as_the_norm_is(model, kind))
        for other, value in model.read(tokens, sites_of(model)).items():
            assert_close(
                value, expected[other], msg=lambda m, s=other: f"{s}: {m}", **close_as_the_norm_is(model, kind)
            )
    assert (logits - model.logits(tokens)).abs().max() > 1e-3


@each("kind", KINDS)
def test_a_site_edited_to_its_own_value_changes_nothing(model, tokens, kind):
    clean, site = model.logits(tokens), site_of(model, kind)
    if site is None:
        return
    with model.edit({site: lambda value: value.clone()}):
        edited = model.logits(tokens)
    if kind in ("scores", "pattern") or kind.endswith("scale"):
        assert_close(edited, clean, **EXACT)
    else:
        assert torch.equal(edited, clean)
    assert torch.equal(model.logits(tokens), clean)


def test_edits_everywhere_at_once_are_made_in_the_order_of_the_model(model, tokens):
    edits = {site: EDITS[site.kind] for site in reversed(sites_of(model))}
    logits = naive(model, tokens, edits)[1]
    with model.edit(edits):
        tolerance = close_as_the_norm_is(model, "ln1_scale")
        assert_close(model.logits(tokens), logits, **tolerance)
    with ExitStack() as stack:
        for site, function in edits.items():
            stack.enter_context(model.edit({site: function}))
        assert_close(model.logits(tokens), logits, **tolerance)


@each(
    "kinds",
    [
        {"resid_pre": [1]},
        {"resid_mid": [1]},
        {"resid_post": [0]},
        {"resid_pre": [0], "attn_out": [0, 1], "mlp_out": [0, 1]},
        {"resid_pre": [0], "z": [0, 1], "mlp_in": [0, 1]},
        {"resid_pre": [0], "q": [0, 1], "k": [0, 1], "v": [0, 1]},
        {"resid_pre": [0], "scores": [0, 1], "v": [0, 1], "ln2_scale": [0, 1]},
        {"resid_post": [1], "ln_final_scale": [1]},
    ],
)
def test_patching_all_that_is_upstream_gives_the_other_prompts_run(model, tokens, kinds):
    sites = [site_of(model, kind, layer) for kind, layers in kinds.items() for layer in layers]
    if None in sites:
        return
    other = some_tokens(model, seed=1)
    there = model.read(other, sites)
    with model.edit({site: lambda _value, site=site: there[site] for site in sites}):
        assert_close(model.logits(tokens), model.logits(other), **EXACT)
    assert (model.logits(tokens) - model.logits(other)).abs().max() > 1e-3


def test_anothers_pattern_and_values_give_anothers_z(model, tokens):
    other = some_tokens(model, seed=1)
    there = model.read(other, [Site("v", 1), Site("pattern", 1), Site("z", 1)])
    edits = {site: lambda _value, site=site: there[site] for site in there if site.kind != "z"}
    with model.edit(edits):
        assert_close(model.read(tokens, [Site("z", 1)])[Site("z", 1)], there[Site("z", 1)], **EXACT)


def test_mlp_in_changes_what_the_mlp_reads_and_not_the_stream(model, tokens):
    kinds = ["resid_pre", "attn_out", "mlp_out", "resid_post"] + ([] if model.spec.parallel else ["resid_mid"])
    clean = {site.kind: value for site, value in model.read(tokens, [Site(k, 0) for k in kinds]).items()}
    with model.edit({Site("mlp_in", 0): EDITS["mlp_in"]}):
        read = {site.kind: value for site, value in model.read(tokens, [Site(k, 0) for k in kinds]).items()}
    for kind in {"resid_pre", "attn_out", "resid_mid"} & set(kinds):
        assert torch.equal(read[kind], clean[kind])
    assert (read["mlp_out"] - clean["mlp_out"]).abs().max() > 1e-3
    assert_close(read["resid_post"] - clean["resid_post"], read["mlp_out"] - clean["mlp_out"], **EXACT)


def test_with_the_final_scale_frozen_logits_are_linear_in_the_stream(model, tokens):
    last = model.spec.n_layers - 1
    stream, scale = Site("resid_post", last), Site("ln_final_scale", last)
    frozen = model.read(tokens, [scale])[scale]
    delta = torch.randn(model.spec.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cap = model.spec.logits_cap

    def centred():
        logits = model.logits(tokens) if cap is None else cap * torch.atanh(model.logits(tokens) / cap)
        return logits - logits.mean(-1, keepdim=True)

    with model.edit({stream: lambda value: value + 3 * delta, scale: lambda _value: frozen}):
        moved = centred()
    with model.edit({scale: lambda _value: frozen}):
        clean = centred()
    expected = 3 * (delta @ model.logit_directions) / frozen
    assert_close(moved - clean, expected, **close_as_the_norm_is(model, "ln_final_scale"))


def test_a_position_edited_changes_nothing_before_it(model, tokens):
    clean = model.logits(tokens)

    def late(value):
        return torch.cat([value[:, :9], EDITS["z"](value[:, 9:])], dim=1)

    for kind in ("z", "k", "v", "resid_post"):
        with model.edit({Site(kind, 0): late}):
            edited = model.logits(tokens)
        assert torch.equal(edited[:, :9], clean[:, :9])
        assert (edited[:, 9:] - clean[:, 9:]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------- nesting
@each("kind", [k for k in KINDS if k != "scores"])
def test_the_inner_edit_is_given_the_outer_ones_result_and_reads_come_last(model, tokens, kind):
    site = site_of(model, kind)
    if site is None:
        return
    clean = model.read(tokens, [site])[site]
    with model.edit({site: lambda value: 2 * value}):
        with model.edit({site: lambda value: value + 1}):
            assert_close(model.read(tokens, [site])[site], 2 * clean + 1, **EXACT)
            together = model.logits(tokens)
        assert_close(model.read(tokens, [site])[site], 2 * clean, **EXACT)
        outer = model.logits(tokens)
    with model.edit({site: lambda value: 2 * value + 1}):
        assert torch.equal(model.logits(tokens), together)
    with model.edit({site: lambda value: 2 * value}):
        assert torch.equal(model.logits(tokens), outer)
    assert torch.equal(model.read(tokens, [site])[site], clean)


def test_all_that_reads_can_be_used_within_an_edit(model, tokens):
    edit = {Site("resid_pre", 0): EDITS["resid_pre"], Site("pattern", 1): EDITS["pattern"]}
    expected, _ = naive(model, tokens, edit)
    constants = model.value_offset(1), model.W_V(1), model.token_values(1)
    with model.edit(edit):
        attention = model.attention(tokens, 1)
        z = model.read(tokens, [Site("z", 0), Site("z", 1)])
        for got, clean in zip((model.value_offset(1), model.W_V(1), model.token_values(1)), constants, strict=True):
            assert_close(got, clean, atol=1e-12, rtol=1e-12)
    assert_close(attention.pattern, expected[Site("pattern", 1)], **EXACT)
    for site, value in z.items():
        assert_close(value, expected[site], **EXACT)


def test_an_edit_may_itself_run_the_model(model, tokens):
    """What it needs of the weights is of the model without edits."""

    def subtract(value):
        return value - model.value_offset(1)

    offset = model.value_offset(1)
    with model.edit({Site("z", 1): lambda value: value - offset}):
        expected = model.logits(tokens)
    with model.edit({Site("z", 1): subtract}):
        assert_close(model.logits(tokens), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_an_edit_may_run_the_model_between_two_others(random_model, family):
    model = random_model(family, dtype=torch.float64)
    tokens, offset = some_tokens(model), model.value_offset(1)
    mid, mlp_in = Site("resid_mid", 0), Site("mlp_in", 0)
    with model.edit({mid: EDITS["resid_mid"], mlp_in: lambda value: value + offset}):
        expected = model.logits(tokens)
    with model.edit({mid: EDITS["resid_mid"], mlp_in: lambda value: value + model.value_offset(1)}):
        assert_close(model.logits(tokens), expected, atol=1e-12, rtol=1e-12)


# -------------------------------------------------------------------------------------------------- leaving no trace
@each("kind", KINDS)
def test_the_model_is_bit_identical_after_edits_that_raise(model, tokens, kind):
    clean, site = model.logits(tokens), site_of(model, kind, 1)
    if site is None:
        return

    def fail(value):
        raise RuntimeError("in the middle of a run")

    failing = model.edit({site: fail})
    with left_unchanged(model):
        with pytest.raises(RuntimeError, match="in the middle"), model.edit({site: EDITS[kind]}), failing:
            model.logits(tokens)
        with pytest.raises(KeyError), model.edit({site: EDITS[kind]}):
            raise KeyError
        with pytest.raises(RuntimeError), model.edit({site: fail}):
            model.read(tokens, sites_of(model))
        with pytest.raises(RuntimeError), model.edit({site: fail}), model.restartable(0):
            model.losses(tokens)
        with pytest.raises(ModelError, match="token id 10,000"):
            model.token_values(1, torch.tensor([10_000]))
        for left in (model.attention(tokens, 1), model.value_offset(1), model.W_V(1), model.token_values(1)):
            assert left is not None
        assert torch.equal(model.logits(tokens), clean)


def test_a_run_that_failed_leaves_nothing_for_the_next(random_model):
    model = random_model("gpt2", dtype=torch.float64)
    tokens, runs = some_tokens(model), []
    clean = model.logits(tokens)

    def only_at_first(value):
        runs.append(None)
        return 2 * value if len(runs) == 1 else value

    def fail_at_first(value):
        if len(runs) == 1:
            raise RuntimeError
        return value

    with model.edit({Site("resid_mid", 0): only_at_first, Site("ln2_scale", 0): fail_at_first}):
        with pytest.raises(RuntimeError):
            model.logits(tokens)
        assert torch.equal(model.logits(tokens), clean)


# ------------------------------------------------------------------------------------------------------------- weights
@each("layer", [0, 1])
def test_the_offset_is_the_part_of_z_that_no_text_changes(model, tokens, layer):
    """c = b_V + b_ln1 @ W_V: z - c is linear in the normed residual without its bias."""
    offset = model.value_offset(layer)
    norm = parts(model, layer)["norm1"]
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
    assert_close(twice - offset, 2 * (value - offset), atol=1e-9, rtol=1e-9)


@each("layer", [0, 1])
def test_values_are_linear_in_the_normed_stream_by_w_v(model, tokens, layer):
    resid, scale = Site("resid_pre", layer), Site("ln1_scale", layer)
    read = model.read(tokens, [resid, scale])
    centred = read[resid]
    if layer_normed(model):
        centred = centred - centred.mean(-1, keepdim=True)
    W_V = model.W_V(layer)  # noqa: N806 - the field's name
    assert W_V.shape == (model.spec.n_heads, model.spec.d_model, model.spec.d_head)
    value = torch.einsum("bsd,hde->bshe", centred / read[scale], W_V) + model.value_offset(layer).unflatten(0, (4, -1))
    tolerance = EXACT if layer_normed(model) else {"atol": 1e-5, "rtol": 1e-5}  # its norm is float32
    assert_close(model.attention(tokens, layer).value, value, **tolerance)


@each("layer", [0, 1])
def test_a_tokens_value_is_that_of_a_sequence_of_one(model, layer):
    tokens = torch.tensor([5, 0, 97, 5])
    middle = torch.full((1, 1), model.spec.context // 2)
    seen = []
    hook = parts(model, layer)["projection"].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, 0]))
    with torch.no_grad():
        for token in tokens:
            model.module(input_ids=token.view(1, 1), position_ids=middle, use_cache=False)
    hook.remove()
    assert_close(model.token_values(layer, tokens).flatten(1), torch.stack(seen), **EXACT)
    everything = model.token_values(layer)
    assert everything.shape == (model.spec.d_vocab, model.spec.n_heads, model.spec.d_head)
    assert_close(everything[tokens], model.token_values(layer, tokens), **EXACT)


def test_token_values_do_not_depend_on_how_they_are_cut_into_batches(model, monkeypatch):
    whole = model.token_values(1)
    monkeypatch.setattr("headscope.models.hf._TOKEN_ROWS", 7)
    assert_close(model.token_values(1), whole, **EXACT)


def test_logit_directions_give_the_logits_at_unit_scale(model, tokens):
    final = torch.randn(5, model.spec.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = parts(model, 0)["final"]
    centred = final - final.mean(1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else final
    scale = (centred.square().mean(1, keepdim=True) + 1e-300).sqrt()
    head = model.module.get_output_embeddings()
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        logits = head(norm(final)) - head(torch.zeros_like(final) if bias is None else bias.expand_as(final))
    expected = (logits - logits.mean(1, keepdim=True)) * scale
    assert_close(final @ model.logit_directions, expected, atol=1e-4, rtol=1e-4)  # the norm's epsilon is left out


# ------------------------------------------------------------------------------------------------------ what is refused
def test_a_layer_that_does_not_exist_is_named(model, tokens):
    with pytest.raises(ModelError, match=r"layer 7 .*\n.*0 to 1"):
        model.read(tokens, [Site("z", 7)])
    with pytest.raises(ModelError, match="layer -1"):
        model.attention(tokens, -1)
    with pytest.raises(ModelError, match="layer 2"), model.edit({Site("z", 2): torch.zeros_like}):
        pass
    for weights in (model.W_O, model.W_V, model.value_offset, model.token_values):
        with pytest.raises(ModelError, match="layer 2"):
            weights(2)


def test_sites_that_a_model_does_not_have_are_refused(random_model):
    model = random_model("gpt_neox", use_parallel_residual=True)
    with pytest.raises(ModelError, match=r"resid_mid .*side by side[\s\S]*use resid_pre, mlp_in or resid_post"):
        model.read(some_tokens(model), [Site("resid_mid", 0)])
    with pytest.raises(ModelError, match="side by side"), model.edit({Site("resid_mid", 0): torch.zeros_like}):
        pass
    with pytest.raises(ModelError, match=r"final norm's scale in layer 0[\s\S]*layer 1, the last"):
        model.read(some_tokens(model), [Site("ln_final_scale", 0)])


@each("kind", ["pattern", "v", "mlp_in", "ln1_scale"])
def test_no_sae_sits_at_the_other_sites(model, kind):
    with pytest.raises(ModelError, match=rf"an SAE of {kind}[\s\S]*z, attn_out, mlp_out, resid_pre"):
        model.width(Site(kind, 0))


@each("kind", KINDS)
def test_an_edit_that_returns_another_shape_or_type_is_refused(model, tokens, kind):
    site, clean = site_of(model, kind), model.logits(tokens)
    if site is None:
        return
    for wrong in (lambda value: value[:1], lambda value: value.float()):
        message = rf"edit of {kind} of layer \d[\s\S]*torch.float64 \(3, "
        with pytest.raises(ModelError, match=message), model.edit({site: wrong}):
            model.logits(tokens)
    assert torch.equal(model.logits(tokens), clean)


def test_an_unknown_family_is_refused_with_where_to_add_it():
    with pytest.raises(ModelError, match=r"'bloom'[\s\S]*families.py"):
        family_of("bloom")
