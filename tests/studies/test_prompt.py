"""A prompt with features and heads ablated: the numbers against runs spliced by hand, and what is refused."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from headscope.corpus import encode
from headscope.errors import CorpusError, IndexFormatError, StudyError
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.interventions import add, replace
from headscope.models.hf import Model
from headscope.sae.model import SAE
from headscope.site import Site
from headscope.studies.prompt import prompts as study
from headscope.studies.prompt.prompts import Prompts
from headscope.studies.prompt.records import FeatureAblation, HeadAblation, parse_ablation, parse_ablations
from headscope.studies.support.replacement import Replacement
from precise import PreciseRMSNorm

EXACT = {"atol": 1e-9, "rtol": 1e-9}
TEXT = "def add(one, two):\n    return one + two"
SUBJECTS = {  # family, changes, layer of the SAE (of 3), activation
    "neox, last layer": ("gpt_neox", {}, 2, "relu"),
    "neox, parallel, middle": ("gpt_neox", {"use_parallel_residual": True}, 1, "relu"),
    "gpt2, middle, jumprelu": ("gpt2", {}, 1, "jumprelu"),
    "llama, last, topk": ("llama", {}, 2, "topk"),
}
QUERY = 14


@pytest.fixture(scope="module", params=SUBJECTS)
def prompts(request, random_model, random_corpus, random_sae, tmp_path_factory) -> Prompts:
    family, changes, layer, activation = SUBJECTS[request.param]
    model = random_model(family, dtype=torch.float64, n_layers=3, **changes)
    if family == "llama":
        for block in model.module.model.layers:
            block.input_layernorm = PreciseRMSNorm(block.input_layernorm)
            block.post_attention_layernorm = PreciseRMSNorm(block.post_attention_layernorm)
        model.module.model.norm = PreciseRMSNorm(model.module.model.norm)
        model = Model(model.module, model.tokenizer, model.bos, model.spec.name)
    sae = random_sae(model, 40, activation, site=Site("z", layer))
    folder = tmp_path_factory.mktemp("prompt") / "index"
    build_index(model, [(sae, SAERecord("random", "sha256:0"))], random_corpus(model, 80, 24), folder)
    return Prompts(LiveIndex(FeatureIndex.open(folder), model, sae))


@pytest.fixture
def tokens(prompts: Prompts) -> tuple[int, ...]:
    return prompts.encode(TEXT)


@contextmanager
def spliced(model: Model, layer: int, change):
    """Change z by hand: a hook on what goes into the output projection, no edit of this package."""
    projection = [m for name, m in model.module.named_modules() if name.endswith(OUTPUTS[model.spec.family])][layer]
    handle = projection.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


OUTPUTS = {"gpt_neox": "attention.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}


def losses(model: Model, tokens) -> torch.Tensor:
    logits = model.module(input_ids=torch.tensor(tokens)[None]).logits[0]
    return nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")


def without(sae: SAE, where: dict[int, list[int] | None]):
    """z - sum of f_j d_j, all f read of the z that comes in; `where`: positions by latent, None for all."""

    def change(z: torch.Tensor) -> torch.Tensor:
        f, out = sae.encode(z), z.clone()
        for latent, positions in where.items():
            rows = slice(None) if positions is None else positions
            out[0, rows] -= f[0, rows, latent, None] * sae.W_dec[latent]
        return out

    return change


def active_at(prompts: Prompts, tokens, query: int = QUERY) -> list[int]:
    run = prompts.run(tokens)
    return run.latent[(run.position == query) & (run.activation > 0)].tolist()


# --- the prompt as it is


def test_the_bos_stands_in_front_and_its_spelling_is_text(prompts: Prompts) -> None:
    assert prompts.encode(TEXT) == (prompts.bos, *encode(prompts.model.tokenizer, [TEXT])[0])
    spelled = prompts.encode("<|bos|>x")
    assert spelled[0] == prompts.bos
    assert prompts.bos not in spelled[1:]
    assert len(spelled) == 9


def test_a_run_has_every_active_feature_and_the_losses(prompts: Prompts, tokens) -> None:
    run = prompts.run(tokens)
    z = prompts.model.read(torch.tensor(tokens)[None], [prompts.sae.site])[prompts.sae.site][0]
    f = prompts.sae.encode(z).numpy()
    dense = np.zeros_like(f)
    dense[run.position, run.latent] = run.activation
    assert_allclose(dense, f, **EXACT)
    assert len(run.latent) == (f > 0).sum()
    assert_allclose(run.loss, losses(prompts.model, tokens), **EXACT)
    order = list(zip(run.position, -run.activation, strict=True))
    assert order == sorted(order)
    assert np.array_equal(run.ablated, run.activation)
    assert np.array_equal(run.ablated_loss, run.loss)


def test_features_of_a_token_sum_to_what_they_are(prompts: Prompts, tokens) -> None:
    found = prompts.features(tokens, QUERY)
    assert found.latent.tolist() == active_at(prompts, tokens)
    assert found.target == tokens[QUERY + 1]
    z = prompts.model.read(torch.tensor(tokens)[None], [prompts.sae.site])[prompts.sae.site][0]
    pre = prompts.sae.pre_activations(z)[QUERY]
    for i, latent in enumerate(found.latent):
        dfa = prompts.dfa(tokens, int(latent), QUERY)
        assert_allclose(found.by_head[i], dfa.by_source.sum(1), **EXACT)
        assert_allclose(found.by_head[i].sum() + dfa.bias, pre[latent], **EXACT)
        assert abs(dfa.residual) < 1e-9
        by_source = dfa.by_source.sum(0)
        assert found.source[i] == np.abs(by_source).argmax()
        assert_allclose(found.source_dfa[i], by_source[found.source[i]], **EXACT)
        assert_allclose(dfa.pattern.sum(1), 1, **EXACT)


def test_the_direct_effect_is_what_the_logit_loses_by_the_direct_path(prompts: Prompts, tokens) -> None:
    model, sae = prompts.model, prompts.sae
    last = model.spec.n_layers - 1
    stream, scale = Site("resid_post", last), Site("ln_final_scale", last)
    batch = torch.tensor(tokens)[None]
    found = prompts.features(tokens, QUERY, target=9)
    kept = model.read(batch, [scale])[scale]
    before = model.logits(batch)[0, QUERY]
    for latent, activation, effect in zip(found.latent, found.activation, found.effect, strict=True):
        written = activation * sae.W_dec[latent] @ model.W_O(sae.site.layer)
        with model.edit({stream: add(-written), scale: replace(kept)}):
            after = model.logits(batch)[0, QUERY]
        change = (before - before.mean()) - (after - after.mean())
        assert_allclose(effect, change[9], **EXACT)


def test_the_target_at_the_end_is_the_likeliest_token(prompts: Prompts, tokens) -> None:
    found = prompts.features(tokens, len(tokens) - 1)
    assert found.target == prompts.model.logits(torch.tensor(tokens)[None])[0, -1].argmax()


def test_a_context_of_the_corpus_is_what_the_index_says(prompts: Prompts) -> None:
    index = prompts.live.index
    n = 0
    for latent in range(0, 40, 8):
        stored = index.activations(latent)
        for position, activation in list(zip(stored.position, stored.activation, strict=True))[::150]:
            block, query = divmod(int(position), index.block_size)
            dfa = prompts.dfa(index.tokens_of(block)[: query + 1].tolist(), latent, query)
            assert_allclose(dfa.activation, activation, rtol=1e-5)
            [live] = prompts.live.dfa(int(position), [latent])
            assert_allclose(dfa.by_source, live.by_source, **EXACT)
            n += 1
    assert n > 8


# --- ablations


@pytest.mark.parametrize("everywhere", [True, False])
def test_ablating_a_feature_is_the_splice(prompts: Prompts, tokens, everywhere: bool) -> None:
    latent = active_at(prompts, tokens)[0]
    ablation = FeatureAblation(latent, None if everywhere else QUERY)
    run = prompts.run(tokens, [ablation])
    with spliced(
        prompts.model, prompts.sae.site.layer, without(prompts.sae, {latent: None if everywhere else [QUERY]})
    ):
        expected = losses(prompts.model, tokens)
        logits = prompts.model.module(input_ids=torch.tensor(tokens)[None]).logits[0]
    assert_allclose(run.ablated_loss, expected.detach(), **EXACT)
    assert np.abs(run.ablated_loss - run.loss)[QUERY] > 1e-6, "it does something"
    off = (run.latent == latent) & ((run.position == QUERY) | everywhere)
    assert (run.ablated[off] == 0).all()
    assert np.array_equal(run.ablated[~off], run.activation[~off])
    found = prompts.next_tokens(tokens, QUERY, [ablation])
    p = logits[QUERY].softmax(0).numpy()
    assert_allclose(found.ablated_probability, p[found.token], **EXACT)
    assert_allclose(found.ablated_logit, logits[QUERY, found.token], **EXACT)
    if not everywhere:
        assert np.array_equal(run.ablated_loss[:QUERY], run.loss[:QUERY]), "nothing before it changes"


def test_features_at_one_token_are_read_before_any_is_taken_out(prompts: Prompts, tokens) -> None:
    one, two = active_at(prompts, tokens)[:2]
    run = prompts.run(tokens, parse_ablations([f"f{two}", f"f{one}@{QUERY}"]))
    with spliced(prompts.model, prompts.sae.site.layer, without(prompts.sae, {one: [QUERY], two: None})):
        assert_allclose(run.ablated_loss, losses(prompts.model, tokens).detach(), **EXACT)


@pytest.mark.parametrize("by", ["zero", "mean"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("position", [None, 7])
def test_ablating_a_head_puts_something_else_in_its_place(prompts: Prompts, tokens, layer, by, position) -> None:
    model, head = prompts.model, 2
    own = slice(head * model.spec.d_head, (head + 1) * model.spec.d_head)
    instead = model.value_offset(layer) if by == "zero" else prompts.mean(layer)[0].flatten()

    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[0, slice(None) if position is None else position, own] = instead[own]
        return z

    run = prompts.run(tokens, [HeadAblation(layer, head, by, position)])
    site = prompts.sae.site
    with spliced(model, layer, change):
        expected = losses(model, tokens).detach()
        z = model.read(torch.tensor(tokens)[None], [site])[site][0]
    if layer == site.layer:
        z = change(z[None])[0]
    assert_allclose(run.ablated_loss, expected, **EXACT)
    f = prompts.sae.encode(z).numpy()
    assert_allclose(run.ablated, f[run.position, run.latent], **EXACT)
    assert (
        len(run.latent)
        == (
            (f > 0) | (prompts.sae.encode(prompts.model.read(torch.tensor(tokens)[None], [site])[site][0]).numpy() > 0)
        ).sum()
    ), "those that turn on are there too"


def test_heads_are_ablated_before_the_features_of_what_is_left(prompts: Prompts, tokens) -> None:
    site, model = prompts.sae.site, prompts.model
    own = slice(model.spec.d_head, 2 * model.spec.d_head)
    latent, instead = active_at(prompts, tokens)[0], model.value_offset(site.layer)

    def change(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[0, :, own] = instead[own]
        return without(prompts.sae, {latent: None})(z)

    ablations = parse_ablations([f"f{latent}", f"h{site.layer}.1=zero"])
    with spliced(model, site.layer, change):
        expected = losses(model, tokens).detach()
    assert_allclose(prompts.run(tokens, ablations).ablated_loss, expected, **EXACT)


def test_ablated_zero_makes_the_dfa_of_the_head_zero(prompts: Prompts, tokens) -> None:
    """The activation then is that of the other heads and the bias: a sum of what is stored."""
    layer = prompts.sae.site.layer
    found = prompts.features(tokens, QUERY)
    run = prompts.run(tokens, [HeadAblation(layer, 1, "zero")])
    here = dict(zip(run.latent[run.position == QUERY], run.ablated[run.position == QUERY], strict=True))
    for i, latent in enumerate(found.latent):
        pre = prompts.dfa(tokens, int(latent), QUERY).pre - found.by_head[i, 1]
        if here[latent] > 0:
            assert_allclose(here[latent], pre, **EXACT)


def test_what_is_ablated_where_nothing_is_changes_nothing(prompts: Prompts, tokens) -> None:
    run = prompts.run(tokens)
    absent = next(j for j in range(40) if j not in run.latent[run.position == QUERY])
    same = prompts.run(tokens, [FeatureAblation(absent, QUERY)])
    assert_allclose(same.ablated_loss, run.loss, **EXACT)


def test_the_mean_is_that_of_the_head_ablation_study(prompts: Prompts) -> None:
    expected = Replacement.of(prompts.live, "mean", max_blocks=study.MEAN_BLOCKS, seed=0)
    z, n = prompts.mean(prompts.sae.site.layer)
    assert n == expected.n
    assert_allclose(z, expected.z[0], **EXACT)
    assert prompts.live.index.n_blocks > study.MEAN_BLOCKS, "a sample"


def test_a_mean_is_taken_of_the_model_as_it_is(prompts: Prompts, tokens) -> None:
    """Also when it is first asked for together with other ablations."""
    fresh = Prompts(prompts.live)
    ablations = parse_ablations(["h0.0=zero", "h0.1=zero", "h1.2=mean"])
    assert_allclose(fresh.run(tokens, ablations).ablated_loss, prompts.run(tokens, ablations).ablated_loss, **EXACT)
    assert_allclose(fresh.mean(1)[0], prompts.mean(1)[0], **EXACT)


# --- what comes next


def test_next_tokens_are_the_softmax_of_the_models_logits(prompts: Prompts, tokens) -> None:
    ablations = parse_ablations(["h0.3=zero", f"f{active_at(prompts, tokens)[0]}@{QUERY}"])
    found = prompts.next_tokens(tokens, QUERY, ablations)
    clean = prompts.model.logits(torch.tensor(tokens)[None])[0, QUERY].numpy()
    p = np.exp(clean) / np.exp(clean).sum()
    assert_allclose(found.probability, p[found.token], **EXACT)
    assert_allclose(found.logit, clean[found.token], **EXACT)
    assert found.rank.tolist() == [1 + int((clean > clean[t]).sum()) for t in found.token]
    assert found.actual == tokens[QUERY + 1]
    assert found.actual in found.token
    assert found.rank[0] == 1
    assert set(range(1, 13)) <= set(found.rank.tolist())
    assert set(range(1, 13)) <= set(found.ablated_rank.tolist())
    run = prompts.run(tokens, ablations)
    i = found.token.tolist().index(found.actual)
    assert_allclose(-np.log(found.probability[i]), run.loss[QUERY], **EXACT)
    assert_allclose(-np.log(found.ablated_probability[i]), run.ablated_loss[QUERY], **EXACT)
    assert found.divergence > 0
    last = prompts.next_tokens(tokens, len(tokens) - 1)
    assert last.actual is None
    assert last.divergence == 0


def test_the_model_is_as_before_afterwards(prompts: Prompts, tokens) -> None:
    before = prompts.model.fingerprint(), prompts.run(tokens).loss.tolist()
    with pytest.raises(StudyError):
        prompts.run(tokens, parse_ablations(["h0.0=zero", "f39@999"]))
    prompts.run(tokens, parse_ablations(["h0.0=mean", "f3"]))
    assert (prompts.model.fingerprint(), prompts.run(tokens).loss.tolist()) == before


# --- what is refused


def test_prompts_that_cannot_be_read_are_refused(prompts: Prompts) -> None:
    for text, said in (("", "an empty prompt"), ("x" * 64, "65 tokens")):
        with pytest.raises(CorpusError, match=said):
            prompts.encode(text)
    with pytest.raises(CorpusError, match="tokens"):
        prompts.run([0, 4, 98])
    assert len(prompts.run(prompts.encode("x" * 63)).loss) == 63, "the whole context can be used"


@pytest.mark.parametrize(
    ("name", "said"),
    [("f40", "feature 40"), ("f3@99", "position 99"), ("h3.0=zero", "layer 3"), ("h1.4=mean", "head 4")],
)
def test_ablations_of_what_there_is_not_are_refused(prompts: Prompts, tokens, name: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        prompts.run(tokens, parse_ablations([name]))
    with pytest.raises(StudyError, match=said):
        prompts.next_tokens(tokens, 3, parse_ablations([name]))


def test_places_that_there_are_not_are_refused(prompts: Prompts, tokens) -> None:
    n = len(tokens)
    for ask, said in (
        (lambda: prompts.features(tokens, n), f"position {n}"),
        (lambda: prompts.features(tokens, 3, target=98), "token 98"),
        (lambda: prompts.next_tokens(tokens, -1), "position -1"),
        (lambda: prompts.dfa(tokens, 40, 3), "feature 40"),
        (lambda: prompts.dfa(tokens, 4, n), f"position {n}"),
        (lambda: prompts.mean(3), "layer 3"),
    ):
        with pytest.raises(StudyError, match=said):
            ask()


def test_an_sae_of_another_layer_is_refused(prompts: Prompts, random_sae) -> None:
    with pytest.raises(IndexFormatError, match=r"blocks\.0"):
        LiveIndex(prompts.live.index, prompts.model, random_sae(prompts.model, 40, site=Site("z", 0)))


@given(st.integers(0, 10**8), st.none() | st.integers(0, 10**8), st.sampled_from(["zero", "mean"]))
def test_ablations_are_read_as_they_are_written(number: int, position: int | None, by) -> None:
    for ablation in (FeatureAblation(number, position), HeadAblation(number % 9999, 3, by, position)):
        assert parse_ablation(ablation.name) == ablation


@pytest.mark.slow
@given(st.text(max_size=12))
def test_other_texts_are_no_ablation(text: str) -> None:
    for other in (text, f"f{text}", f"f7@{text}", f"h1.3={text}"):
        if not re.fullmatch(r"f\d+(@\d+)?|h1\.3=(zero|mean)(@\d+)?", other, re.ASCII):
            with pytest.raises(StudyError) as caught:
                parse_ablation(other)
            assert "f7@12" in caught.value.expected


def test_several_ablations_are_each_made_once_in_one_order() -> None:
    names = ["f7", "h1.2=zero@3", "f7", "h0.5=mean", "f3@2"]
    assert [a.name for a in parse_ablations(names)] == ["h0.5=mean", "h1.2=zero@3", "f3@2", "f7"]
    assert parse_ablations(names) == parse_ablations(names[::-1])
    with pytest.raises(StudyError, match="65 ablations"):
        parse_ablations([f"f{i}" for i in range(65)])
    for both in (["h1.2=zero", "h1.2=mean@3"], ["h1.2=zero@3", "h1.2=mean@3"]):
        with pytest.raises(StudyError, match=r"head 1\.2 ablated as"):
            parse_ablations(both)
    parse_ablations(["h1.2=zero@3", "h1.2=mean@4", "h1.3=mean"])
