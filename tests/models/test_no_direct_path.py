"""Families whose direct path is not linear in z: what they lack is left out with its reason, and nothing beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from headscope import jobs
from headscope.encode import encode
from headscope.errors import ModelError
from headscope.explorer.studies import packed
from headscope.index.build import SAERecord, build_index
from headscope.index.live import LiveIndex
from headscope.index.store import FeatureIndex
from headscope.site import Site
from headscope.studies.heads.roles import copying
from headscope.studies.heads.store import HeadPlan, study_heads
from headscope.studies.prompt.prompts import Prompts
from headscope.studies.subject import Subject
from headscope.studies.what import effects
from studied import ask

FAMILIES = ("gemma2", "gemma3_text")
TOKENS = (0, 5, 9, 5, 12, 9)
WHY = "norm after the output projection"


@pytest.fixture(scope="module", params=FAMILIES)
def live(request, random_model, random_corpus, random_sae, tmp_path_factory) -> LiveIndex:
    model = random_model(request.param)
    sae, folder = random_sae(model, 40), tmp_path_factory.mktemp(request.param) / "index"
    build_index(model, [(sae, SAERecord("random", "none"))], random_corpus(model, 40, 24), folder)
    return LiveIndex(FeatureIndex.open(folder), model, sae)


def test_the_features_of_a_prompt_are_given_and_their_direct_effect_is_not(live) -> None:
    prompts = Prompts(live)
    found = prompts.features(TOKENS, 5)
    assert len(found.latent) > 3
    read = live.model.read(torch.tensor([TOKENS]), [live.sae.site])[live.sae.site]
    pre = live.sae.pre_activations(read[0, 5])[torch.from_numpy(found.latent)]
    bias = prompts._weights.bias[torch.from_numpy(found.latent)]
    assert_close(torch.from_numpy(found.by_head).sum(1).float() + bias, pre, atol=1e-4, rtol=1e-4)
    assert found.effect is None
    assert WHY in found.effect_missing
    told = encode(found)
    assert (told["effect"], told["effect_missing"]) == (None, found.effect_missing)
    assert len(told["activation"]) == len(found.latent)


def test_what_each_family_says_of_its_direct_path(random_model) -> None:
    plain, normed = random_model("gpt_neox"), random_model("gemma3_text")
    assert plain.no_direct_path is None
    plain.check_direct_path()
    assert WHY in normed.no_direct_path
    with pytest.raises(ModelError, match="direct path from z"):
        normed.check_direct_path()


def test_what_cannot_be_given_at_all_is_refused_before_any_work(live, monkeypatch) -> None:
    def nothing(*_args: Any) -> None:
        raise AssertionError("the corpus was read")

    monkeypatch.setattr(effects.Text, "of", nothing)
    monkeypatch.setattr("headscope.jobs.studies.live", lambda *_args, **_kwargs: live)
    for asked in (lambda: effects.direct_effects(live), lambda: jobs.study("effects", "x")):
        with pytest.raises(ModelError, match="the direct path from z to the logits"):
            asked()


def test_heads_are_studied_and_written(live) -> None:
    study_heads(live, HeadPlan(n_shuffles=1, mean_blocks=4, fire_blocks=4, source_blocks=4))
    assert {"scores", "ablated"} <= {path.stem for path in (live.index.folder / "heads").glob("*.parquet")}
    assert copying(live.model, n_tokens=6, seed=0).share.isfinite().all()


def test_a_scale_of_the_norm_changes_no_rank_of_the_logits_that_a_head_copies(random_model) -> None:
    """The part of one head behind the norm is its part before it times one positive number a token."""
    model, layer, head = random_model("gemma2", dtype=torch.float64), 1, 2
    site = Site("z", layer)
    z = model.read(torch.tensor([TOKENS]), [site])[site][0].unflatten(-1, (model.spec.n_heads, -1))
    norm = model._blocks[layer].attention_post_norm
    whole = z.flatten(1) @ model._output_weight(layer)
    part = z[:, head] @ model._output_weight(layer).unflatten(0, (model.spec.n_heads, -1))[head]
    behind = part / norm.scale(whole) * norm.gain @ model.logit_directions
    ours = z[:, head] @ model.output_directions(layer).unflatten(0, (model.spec.n_heads, -1))[head]
    assert torch.equal((ours @ model.logit_directions).argsort(1), behind.argsort(1))


def test_a_page_with_its_model_opens_and_says_what_it_cannot_show(live) -> None:
    index = live.index
    latent = int(index.table()["n_active"].to_numpy().argmax())
    subject = Subject(index, live)
    at = index.examples(latent)[0].examples[0].position
    assert ask(subject, "compare_heads", latent, at=at)["heads"]
    assert ask(subject, "sources", latent, tokens=(5,))["thresholds"]
    with pytest.raises(ModelError, match=WHY):
        ask(subject, "circuit", latent, at=at)
    held = packed(subject, latent, ["token_in([#5])"])["studies"]
    proxy = '{"proxy":"token_in([#5])"}'
    assert WHY in held[f"ablation {proxy}"]["missing"]
    assert held[f"specificity {proxy}"]["counts"]
    assert "missing" not in held[f"predictions {proxy}"]


def test_a_family_with_a_gate_on_z_is_refused_before_its_text_is_read(
    random_model, random_corpus, random_sae, tmp_path: Path, monkeypatch
) -> None:
    model = random_model("afmoe")
    corpus, record = random_corpus(model), SAERecord("random", "none")
    monkeypatch.setattr("headscope.index.build.read_part", None)
    with pytest.raises(ModelError, match="a gate multiplies what the heads put out"):
        build_index(model, [(random_sae(model, 40), record)], corpus, tmp_path / "never")
    assert not (tmp_path / "never").exists()
