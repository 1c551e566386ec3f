"""Edits on a whole batch: the same as a loop over examples, positions and heads."""

import pytest
import torch
from torch.testing import assert_close

from cases import each
from headscope.errors import HeadscopeError, ModelError
from headscope.interventions import add, at, constant, pin, reconstruction, replace
from headscope.sae.model import SAE, ReLU
from headscope.site import Site

FAMILIES = ["gpt_neox", "gpt2", "llama"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}
BATCH, N = 3, 11


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, shared_model):
    return shared_model(request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens(model):
    return torch.randint(1, model.spec.d_vocab, (BATCH, N), generator=torch.Generator().manual_seed(0))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value_at(model, tokens, site):
    return model.read(tokens, [site])[site]


def edited_at(model, tokens, site, edit):
    with model.edit({site: edit}):
        return value_at(model, tokens, site)


# -------------------------------------------------------------------------------------------------------------- values
@each("kind", ["z", "resid_pre", "attn_out", "mlp_out", "resid_post", "mlp_in"])
def test_a_constant_is_the_same_everywhere(model, tokens, kind):
    site = Site(kind, 0)
    vector = normal(value_at(model, tokens, site).shape[-1])
    assert_close(edited_at(model, tokens, site, constant(vector)), vector.expand(BATCH, N, -1), atol=0, rtol=0)


@each("kind", ["z", "q", "pattern", "resid_mid", "ln2_scale"])
def test_values_of_another_run_stand_in(model, tokens, kind):
    site = Site(kind, 1)
    there = value_at(model, tokens.flip(1), site)
    assert_close(edited_at(model, tokens, site, replace(there)), there, atol=0, rtol=0)
    with pytest.raises(ModelError, match=rf"an edit of {kind} of layer 1"), model.edit({site: replace(there[:1])}):
        model.logits(tokens)


def test_a_vector_or_values_are_added(model, tokens):
    site = Site("resid_pre", 1)
    clean, vector, values = value_at(model, tokens, site), normal(32), normal(BATCH, N, 32)
    assert_close(edited_at(model, tokens, site, add(vector)), clean + vector, **EXACT)
    assert_close(edited_at(model, tokens, site, add(values)), clean + values, **EXACT)


# ---------------------------------------------------------------------------------------------------------------- SAEs
@pytest.fixture(scope="module", params=["relu", "jumprelu", "topk"])
def sae(request, model, random_sae):
    return random_sae(model, activation=request.param)


def test_a_reconstruction_drops_the_error_or_keeps_it(model, tokens, sae):
    z = value_at(model, tokens, sae.site)
    assert (sae(z) - z).abs().max() > 1e-3
    assert_close(edited_at(model, tokens, sae.site, reconstruction(sae)), sae(z), **EXACT)
    assert_close(edited_at(model, tokens, sae.site, reconstruction(sae, with_error=True)), z, atol=0, rtol=0)
    clean = model.logits(tokens)
    with model.edit({sae.site: reconstruction(sae, with_error=True)}):
        assert torch.equal(model.logits(tokens), clean)


def test_an_sae_without_error_changes_nothing(model, tokens):
    site, width = Site("z", 1), model.spec.n_heads * model.spec.d_head
    eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(2 * width, dtype=torch.float64)
    both = torch.cat([eye, -eye], 1)
    sae = SAE(both, zero, both.T.contiguous(), zero[:width], ReLU(), site, "random")
    clean = model.logits(tokens)
    with model.edit({site: reconstruction(sae)}):
        assert_close(model.logits(tokens), clean, **EXACT)


@each("activation", [0.0, 2.5])
def test_a_feature_is_pinned_with_the_error_kept(model, tokens, sae, activation):
    z = value_at(model, tokens, sae.site)
    f = sae.encode(z)
    j = int(f.sum((0, 1)).argmax())
    expected = z + (activation - f[..., j, None]) * sae.W_dec[j]
    edit = reconstruction(sae, pin(j, activation), with_error=True)
    assert_close(edited_at(model, tokens, sae.site, edit), expected, **EXACT)
    assert (expected - z).abs().max() > 1e-3


def test_features_are_pinned_within_the_reconstruction(model, tokens, sae):
    f = sae.encode(value_at(model, tokens, sae.site))
    first, second = f.sum((0, 1)).topk(2).indices.tolist()
    f[..., [first, second]] = 1.5
    edit = reconstruction(sae, pin([first, second], 1.5))
    assert_close(edited_at(model, tokens, sae.site, edit), sae.decode(f), **EXACT)


@each("shape", [(BATCH,), (BATCH, N)])
def test_each_row_can_have_a_feature_and_activations_of_its_own(model, tokens, sae, shape):
    f = sae.encode(value_at(model, tokens, sae.site))
    latents, activations = f.sum(1).argmax(-1), normal(*shape).abs()
    for row, latent in enumerate(latents):
        f[row, :, latent] = activations[row]
    edit = reconstruction(sae, pin(latents, activations))
    assert_close(edited_at(model, tokens, sae.site, edit), sae.decode(f), **EXACT)


def test_ablating_what_is_not_active_or_pinning_to_its_own_value_changes_nothing(model, tokens, random_sae):
    sae = random_sae(model)
    f = sae.encode(value_at(model, tokens, sae.site))
    clean = model.logits(tokens)
    silent = (f == 0).all(0).all(0).nonzero()[:, 0].tolist()
    assert silent
    live = int(f.sum((0, 1)).argmax())
    for change in (pin(silent), pin(live, f[..., live])):
        with model.edit({sae.site: reconstruction(sae, change, with_error=True)}):
            assert torch.equal(model.logits(tokens), clean)


def test_ablating_and_adding_again_changes_nothing(model, tokens, sae):
    f = sae.encode(value_at(model, tokens, sae.site))
    j = int(f.sum((0, 1)).argmax())
    clean = model.logits(tokens)
    ablated, again = reconstruction(sae, pin(j), with_error=True), add(f[..., j, None] * sae.W_dec[j])
    with model.edit({sae.site: ablated}):
        assert (model.logits(tokens) - clean).abs().max() > 1e-3
        with model.edit({sae.site: again}):
            assert_close(model.logits(tokens), clean, **EXACT)


# --------------------------------------------------------------------------------------------------------------- where
MASK = torch.rand(BATCH, N, generator=torch.Generator().manual_seed(4)) < 0.4
HEAD_MASK = torch.tensor([[True, False, False, True], [False, True, False, False], [False, False, False, False]])
PLACES = {
    "all": {},
    "one row": {"rows": 1},
    "rows": {"rows": [2, 0]},
    "rows by mask": {"rows": torch.tensor([True, False, True])},
    "one position": {"positions": 4},
    "last": {"positions": -1},
    "positions": {"positions": range(2, 5)},
    "one position a row": {"positions": torch.tensor([7, 0, -1], dtype=torch.int32)},
    "positions by mask": {"positions": MASK},
    "rows and positions": {"rows": [0], "positions": torch.tensor([7, 0, 3])},
}
HEADS = {
    "one head": {"heads": 1},
    "heads": {"heads": [1, -1]},
    "one head a row": {"heads": torch.tensor([1, 0, 1])},
    "rows, positions, heads": {"rows": [0, 2], "positions": torch.tensor([7, 0, 3]), "heads": (1,)},
}


def listed(choice, row, n):
    """What is chosen in one row, as plain numbers."""
    if choice is None:
        return list(range(n))
    if isinstance(choice, torch.Tensor):
        chosen = choice[row]
        return chosen.nonzero().flatten().tolist() if choice.dtype == torch.bool else [int(chosen) % n]
    return [i % n for i in ([choice] if isinstance(choice, int) else choice)]


def looped(clean, edited, spec, kind, rows=None, positions=None, heads=None):
    """One example, one position and one head at a time."""
    result = clean.clone()
    if isinstance(rows, torch.Tensor):
        rows = rows.nonzero().flatten().tolist()
    for row in listed(rows, 0, BATCH):
        for position in listed(positions, row, N):
            match kind:
                case "scores" | "pattern":
                    for head in listed(heads, row, spec.n_heads):
                        result[row, head, position] = edited[row, head, position]
                case "q" | "k" | "v":
                    for head in listed(heads, row, clean.shape[2]):
                        result[row, position, head] = edited[row, position, head]
                case "z":
                    for head in listed(heads, row, spec.n_heads):
                        block = slice(head * spec.d_head, (head + 1) * spec.d_head)
                        result[row, position, block] = edited[row, position, block]
                case _:
                    result[row, position] = edited[row, position]
    return result


def assert_kept_to(model, tokens, kind, place):
    site = Site(kind, 1)
    clean = value_at(model, tokens, site)
    values = clean.roll(1, 0) * 1.5 if kind == "scores" else normal(*clean.shape)
    expected = looped(clean, values, model.spec, kind, **place)
    assert_close(edited_at(model, tokens, site, at(replace(values), **place)), expected, atol=0, rtol=0)
    assert place == {} or not torch.equal(expected, values)
    assert not torch.equal(expected, clean)


@each("place", PLACES)
@each("kind", ["z", "q", "k", "v", "scores", "pattern", "resid_mid", "mlp_in", "ln1_scale"])
def test_an_edit_kept_to_rows_and_positions_is_a_loop_over_them(model, tokens, kind, place):
    assert_kept_to(model, tokens, kind, PLACES[place])


@each("place", HEADS)
@each("kind", ["z", "q", "k", "v", "scores", "pattern"])
def test_an_edit_kept_to_heads_is_a_loop_over_them(model, tokens, kind, place):
    assert_kept_to(model, tokens, kind, HEADS[place])


def test_a_mask_can_choose_other_heads_in_each_row(model, tokens):
    assert_kept_to(model, tokens, "z", {"heads": HEAD_MASK})
    assert_kept_to(model, tokens, "pattern", {"heads": HEAD_MASK, "positions": MASK})


def test_an_edit_kept_twice_is_kept_to_what_both_choose(model, tokens):
    site = Site("z", 1)
    clean = value_at(model, tokens, site)
    values = normal(*clean.shape)
    twice = at(at(replace(values), positions=[2, 3, 4]), positions=[4, 5], heads=[1])
    expected = looped(clean, values, model.spec, "z", positions=[4], heads=[1])
    assert_close(edited_at(model, tokens, site, twice), expected, atol=0, rtol=0)


def test_one_batch_patches_every_head_each_in_a_row_of_its_own(model):
    """Row h has head h patched: the same as one run a head."""
    site, n_heads = Site("z", 0), model.spec.n_heads
    prompts = torch.randint(1, model.spec.d_vocab, (2, N), generator=torch.Generator().manual_seed(3))
    clean, corrupt = prompts[:1], prompts[1:]
    there = value_at(model, clean, site)
    with model.edit({site: at(replace(there.expand(n_heads, -1, -1)), heads=torch.arange(n_heads))}):
        together = model.logits(corrupt.expand(n_heads, -1))
    for head in range(n_heads):
        with model.edit({site: at(replace(there), heads=head)}):
            assert_close(together[head], model.logits(corrupt)[0], **EXACT)


def test_all_heads_patched_are_the_whole_of_attn_out(model, tokens):
    other = tokens.flip(0).roll(1, 1)
    z, out = Site("z", 0), Site("attn_out", 0)
    there = model.read(other, [z, out])
    with model.edit({z: at(replace(there[z]), heads=range(model.spec.n_heads))}):
        by_heads = model.logits(tokens)
    with model.edit({out: replace(there[out])}):
        assert_close(by_heads, model.logits(tokens), **EXACT)


# ------------------------------------------------------------------------------------------------------ what is refused
@each("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_in", "mlp_out", "ln1_scale"])
def test_heads_are_refused_where_there_are_none_before_anything_runs(model, kind):
    edit = {Site(kind, 0): at(torch.zeros_like, heads=[0])}
    with pytest.raises(ModelError, match=rf"heads \[0\] at {kind} of layer 0[\s\S]*z, q, k, v, scores or pattern"):
        model.edit(edit).__enter__()


@each(
    ("place", "message"),
    [
        ({"rows": [3]}, r"rows \[3\][\s\S]*from -3 to 2"),
        ({"rows": torch.tensor([0, 1])}, r"rows torch.int64 \(2,\)[\s\S]*mask of shape \(3,\), or a sequence"),
        ({"rows": torch.tensor([True, False])}, r"rows torch.bool \(2,\)"),
        ({"positions": N}, r"positions \[11\][\s\S]*from -11 to 10"),
        ({"positions": torch.tensor([1, -12, 2])}, r"positions \[1, -12, 2\]"),
        ({"positions": torch.tensor([1, 2])}, r"positions torch.int64 \(2,\)[\s\S]*one for each row, shape \(3,\)"),
        ({"positions": MASK[:, 1:]}, r"positions torch.bool \(3, 10\)[\s\S]*\(3, 11\)"),
        ({"heads": [0, 4]}, r"heads \[0, 4\][\s\S]*from -4 to 3"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_places_that_do_not_exist_are_refused(model, tokens, place, message):
    with model.edit({Site("z", 0): at(torch.zeros_like, **place)}), pytest.raises(HeadscopeError, match=message):
        model.logits(tokens)


def test_a_shared_head_is_one_of_the_shared_ones(shared_model):
    model = shared_model("llama", dtype=torch.float64)
    tokens = torch.randint(1, 98, (BATCH, N), generator=torch.Generator().manual_seed(0))
    with model.edit({Site("v", 0): at(torch.zeros_like, heads=[2])}), pytest.raises(HeadscopeError, match=r"-2 to 1"):
        model.logits(tokens)


def test_latents_that_do_not_exist_are_refused(model, tokens, random_sae):
    sae = random_sae(model)
    edit = {sae.site: reconstruction(sae, pin(48), with_error=True)}
    with model.edit(edit), pytest.raises(HeadscopeError, match=r"latents \[48\][\s\S]*from -48 to 47"):
        model.logits(tokens)


def test_an_edit_within_a_place_must_keep_the_shape_too(model, tokens):
    with (
        model.edit({Site("z", 0): at(lambda value: value[:1], positions=[0])}),
        pytest.raises(ModelError, match="an edit of z of layer 0"),
    ):
        model.logits(tokens)
